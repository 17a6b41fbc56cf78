"""Folders from elsewhere: what they declare is checked before anything is built, read or allocated."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from hostile_folders import copy_of, hostile
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.preview import LatentPreview
from latentdiff.pipeline.trained_on import TrainedOn


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    tiny_pipeline().save_pretrained(folder)
    return folder


def edited(saved: Path, folder: Path, file: str, **values: object) -> Path:
    shutil.copytree(saved, folder)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | values))
    return folder


UNET, VAE, TEXT, SCHEDULER = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (UNET, {"layers_per_block": 10**9}, "layers_per_block"),
        (UNET, {"transformer_layers_per_block": 10**9}, "transformer_layers_per_block"),
        (UNET, {"block_out_channels": [8] * 10**5}, "block_out_channels"),
        (UNET, {"block_out_channels": [2**30, 16]}, "block_out_channels"),
        (UNET, {"block_out_channels": [2**16, 2**16]}, "does not fit the model"),
        (UNET, {"cross_attention_dim": 2**40}, "cross_attention_dim"),
        (VAE, {"layers_per_block": 10**9}, "layers_per_block"),
        (VAE, {"latent_channels": 2**40}, "latent_channels"),
        (SCHEDULER, {"num_train_timesteps": 2 * 10**9}, "num_train_timesteps"),
        (TEXT, {"num_hidden_layers": 10**6}, "says num_hidden_layers 1000000, but the weights have"),
        (TEXT, {"hidden_size": 2**40}, "says hidden_size 1099511627776, but the weights have"),
        (TEXT, {"max_position_embeddings": 2**40}, "says max_position_embeddings"),
        (TEXT, {"intermediate_size": 2**40}, "says intermediate_size"),
    ],
)
def test_declared_sizes_are_refused_at_once(saved: Path, tmp_path: Path, file: str, values: dict, message: str) -> None:
    folder = edited(saved, tmp_path / "copy", file, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as error:
        LatentDiffusionPipeline.from_pretrained(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB
    assert "\n" not in str(error.value) and grown < 512


def test_weights_are_compared_with_the_header_before_they_are_read(saved: Path, tmp_path: Path) -> None:
    """A sparse file of 20 GB whose header is consistent, but not the model's."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    size = 20 * 10**9
    header = json.dumps({"conv_in.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors does not fit the model: missing"):
        LatentDiffusionPipeline.from_pretrained(folder)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 512


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_types_in_which_no_model_computes(saved: Path, tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / f"{part}.safetensors"
    tensors = {key: value.to(dtype) for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    if dtype.is_floating_point:
        if not part.startswith("text"):  # that part is loaded in float32
            with pytest.raises(ValueError, match=f"has weights of type {name}; give a dtype to load them in"):
                LatentDiffusionPipeline.from_pretrained(folder)
        opened = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        assert {p.dtype for module in (opened.unet, opened.vae) for p in module.parameters()} == {torch.float32}
    else:
        with pytest.raises(ValueError, match=f"is of type {name}, weights are floating-point numbers"):
            LatentDiffusionPipeline.from_pretrained(folder)


def test_mixed_types_need_a_dtype(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].half()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="has weights of type float16 and float32; give a dtype to load them in"):
        LatentDiffusionPipeline.from_pretrained(folder)
    assert LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_shard_is_beside_its_index(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../../elsewhere.safetensors")}
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names the file '../../elsewhere.safetensors', which is not beside it"):
        LatentDiffusionPipeline.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Everything that can be wrong with one file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with every file that a folder can have."""
    pipeline = tiny_pipeline()
    pipeline.trained_on = TrainedOn(captions=True, unconditional=True, words=("apple", "red"))
    pipeline.preview = LatentPreview(torch.ones(3, 4), torch.ones(3), factor=2, r_squared=0.9)
    folder = tmp_path_factory.mktemp("whole") / "saved"
    pipeline.save_pretrained(folder)
    return folder


def open_part(folder: Path, file: str) -> object:
    """Open the part of a pipeline that the file belongs to; the whole of it takes longer."""
    part = file.partition("/")[0]
    if file.endswith("latent_preview.json"):
        return LatentPreview.load(folder / part)
    if part == "tokenizer":
        return CLIPTokenizer.load(folder / part)
    if part == "text_encoder":
        return TextEncoder.from_pretrained(folder / part, frozen=True)
    models = {"unet": UNet, "vae": AutoencoderKL}
    return (
        models[part].from_pretrained(folder / part)
        if part in models
        else LatentDiffusionPipeline.from_pretrained(folder)
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "scheduler", "text_encoder", "tokenizer", "unet", "vae"])
def test_hostile_folders(part: str, whole: Path, tmp_path: Path) -> None:
    """Each opens or is refused, in one line that names the file, at once, and in little memory."""
    outside = sorted(path.name for path in tmp_path.iterdir())
    before, refused, opened = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, []
    for case in hostile(whole):
        if str(Path(case.file).parent) != (part or "."):
            continue
        folder = copy_of(whole, tmp_path / "copy")
        case.do(folder / case.file)
        start = time.process_time()
        try:
            open_part(folder, case.file)
            opened.append(case)
        except ValueError as error:
            refused += 1
            line = str(error)
            assert line.isprintable() and 0 < len(line) < 400, (case, line)
            assert any(name in line for name in case.names), (case, line)
        assert time.process_time() - start < 2, case
        shutil.rmtree(folder)
    assert [case for case in opened if not case.opens] == [] and refused > 15
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 256  # MiB
    assert sorted(path.name for path in tmp_path.iterdir()) == outside
