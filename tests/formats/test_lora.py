import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from lora_files import (
    EVERYWHERE,
    TEXT_TARGETS,
    UNET_TARGETS,
    deltas,
    kohya,
    products,
    random_changes,
    random_lora,
    renamed,
)
from safetensors.torch import save_file
from tiny import normal, perturb, relative_error, tiny_pipeline, tiny_unet
from torch import Tensor

from latentdiff.formats.files import read_safetensors_header
from latentdiff.formats.lora import LoRA, lora_base, lora_file, read_lora, write_lora
from latentdiff.models.lora import adaptable_layers

PIPELINE = tiny_pipeline()
UNET, TEXT = adaptable_layers(PIPELINE.unet), adaptable_layers(PIPELINE.text_encoder.model)
# alpha is the rank, as the layouts without alpha have it
PLAIN = random_lora(PIPELINE, *EVERYWHERE, alpha=2.0)
METADATA = "lora_adapter_metadata"


def read(tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, Any] | str | None = None) -> LoRA:
    path = folder / "lora.safetensors"
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {METADATA: text} if metadata else None)
    return read_lora(path, UNET, TEXT)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], at_most: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    assert max(relative_error(actual[name], value) for name, value in expected.items()) <= at_most


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lora = replace(random_lora(PIPELINE, *EVERYWHERE, alpha=5.0), base="someone/model")
    path = tmp_path / "lora.safetensors"
    write_lora(lora, path)
    back = read_lora(path, UNET, TEXT)
    assert_same(products(back), products(lora))
    assert {change.alpha for change in back.unet.values()} == {2.0}  # which files without alpha mean
    assert back.base == lora_base(path) == "someone/model"
    with pytest.raises(ValueError, match=r"the LoRA to save has values that are not finite, in unet\.mid_block"):
        name, change = next((name, change) for name, change in lora.unet.items() if name.startswith("mid_block"))
        write_lora(LoRA({name: replace(change, down=change.down * torch.nan)}, {}), path)


LAYOUTS = {
    "diffusers": renamed(
        PLAIN, "unet.{layer}.lora.{half}.weight", "text_encoder.text_model.{layer}.lora_linear_layer.{half}.weight"
    ),
    "peft": renamed(
        PLAIN, "unet.{layer}.{half}.weight", "text_encoder.{layer}.{half}.weight", down="lora_A", up="lora_B"
    ),
    "adapter's name": renamed(
        PLAIN,
        *("unet.{layer}.lora_{half}.default.weight", "text_encoder.text_model.{layer}.lora_{half}.default.weight"),
        **{"down": "A", "up": "B"},
    ),
    "kohya": kohya(PLAIN),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_changes(layout: str, tmp_path: Path) -> None:
    assert_same(products(read(LAYOUTS[layout], tmp_path)), products(PLAIN), at_most=0)


def test_attention_processors_of_old_versions(tmp_path: Path) -> None:
    lora = random_lora(PIPELINE, alpha=2.0)
    text = {name: change for name, change in lora.text_encoder.items() if not name.endswith("fc1")}
    lora = replace(lora, text_encoder=text)
    tensors = {}
    for key, value in renamed(
        lora, "{layer}_lora.{half}.weight", "text_encoder.text_model.{layer}_lora.{half}.weight"
    ).items():
        start, last = key.rsplit(".to_" if ".to_" in key else "self_attn.", 1)
        if ".to_" in key:  # before the files had the networks' names
            tensors[f"{start}.processor.to_{last.replace('out.0_', 'out_')}"] = value
        else:
            tensors[f"{start}self_attn.to_{last.replace('_proj', '')}"] = value
    assert any(".processor.to_out_lora.down." in key for key in tensors)
    assert any(key.endswith(".self_attn.to_q_lora.up.weight") for key in tensors)
    assert_same(products(read(tensors, tmp_path)), products(lora), at_most=0)


def test_kohya_matrices_of_other_forms(tmp_path: Path) -> None:
    """1x1 convolutions as matrices and matrices as 1x1 convolutions; an alpha in whole numbers, of 0, or none."""
    lora = random_lora(PIPELINE, "proj_in", "to_q", "conv1", alpha=3.0)
    tensors = kohya(lora)
    for key, value in tensors.items():
        if "proj_in" in key and value.dim() == 4:
            tensors[key] = value.flatten(1).half()
        elif "to_q" in key and value.dim() == 2:
            tensors[key] = value[..., None, None]
    alphas = [key for key in tensors if key.endswith(".alpha")]
    tensors[alphas[0]] = torch.tensor([3])
    tensors[alphas[1]] = torch.tensor(0.0)
    del tensors[alphas[2]]
    expected = products(lora)
    names = list(lora.unet)
    expected[f"unet.{names[1]}"] *= 0
    expected[f"unet.{names[2]}"] *= 2 / 3
    actual = products(read(tensors, tmp_path))
    assert not actual.pop(f"unet.{names[1]}").any() and not expected.pop(f"unet.{names[1]}").any()
    assert_same(actual, expected, at_most=1e-3)  # halves


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """diffusers' pipeline with adapters of both networks, of several ranks and alphas."""
    folder = tmp_path_factory.mktemp("theirs")
    PIPELINE.save_pretrained(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    name = next(name for name in UNET if name.endswith("attn2.to_k"))
    pipeline.unet.add_adapter(
        peft.LoraConfig(
            r=4,
            lora_alpha=2,
            target_modules=[*UNET_TARGETS, "conv1"],
            rank_pattern={"to_q": 3, f"^{name}": 1},
            alpha_pattern={"to_q": 5, f"^{name}": 7},
        )
    )
    pipeline.text_encoder.add_adapter(
        peft.LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=list(TEXT_TARGETS),
            alpha_pattern={"q_proj": 6, "encoder.layers.1.self_attn.v_proj": 0.5},
            use_rslora=True,
        )
    )
    for network in (pipeline.unet, pipeline.text_encoder):
        perturb(network)
    return pipeline


def theirs_says(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {
        f"{part}.{name.removeprefix('text_model.')}": delta
        for part, network in parts.items()
        for name, delta in deltas(network, "default").items()
    }


@pytest.mark.parametrize("names", ["peft", "diffusers"])
def test_what_diffusers_saves_with_its_metadata(names: str, theirs: StableDiffusionPipeline, tmp_path: Path) -> None:
    networks = {"unet": theirs.unet, "text_encoder": theirs.text_encoder}
    layers = {f"{part}_lora_layers": peft.get_peft_model_state_dict(network) for part, network in networks.items()}
    if names == "diffusers":
        layers = {part: convert_state_dict_to_diffusers(tensors) for part, tensors in layers.items()}
    said = {f"{part}_lora_adapter_metadata": net.peft_config["default"].to_dict() for part, net in networks.items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **said)
    path = lora_file(tmp_path)
    assert_same(products(read_lora(path, UNET, TEXT)), theirs_says(theirs))

    # Without metadata nothing says the alphas: they are the ranks, for diffusers as well.
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    lora = read_lora(path, UNET, TEXT)
    assert all(change.alpha == change.rank for change in (*lora.unet.values(), *lora.text_encoder.values()))


def test_what_a_network_saves_by_itself(theirs: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Of diffusers, whose metadata have no prefix, and of peft, whose alphas are in another file."""
    expected = {name: delta for name, delta in theirs_says(theirs).items() if name.startswith("unet.")}
    theirs.unet.save_lora_adapter(tmp_path / "diffusers")
    assert_same(products(read_lora(lora_file(tmp_path / "diffusers"), UNET, TEXT)), expected)

    model = peft.PeftModel(tiny_unet(), theirs.unet.peft_config["default"])
    perturb(model)
    model.save_pretrained(tmp_path / "peft")
    path = lora_file(tmp_path / "peft")
    assert all(key.startswith("base_model.model.") for key in read_safetensors_header(path))
    written = {name.replace("base_model.model", "unet"): delta for name, delta in deltas(model, "default").items()}
    assert_same(products(read_lora(path, UNET, TEXT)), written)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals

Q = next(name for name in UNET if name.endswith("attn1.to_q"))
K = f"lora_unet_{Q.replace('.', '_')}"
ONE = kohya(LoRA(random_changes({Q: UNET[Q]}), {}))
DOWN, UP = f"{K}.lora_down.weight", f"{K}.lora_up.weight"


def without(key: str) -> dict[str, Tensor]:
    return {name: value for name, value in ONE.items() if name != key}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA": (ONE | {f"{K}.dora_scale": normal(8, 1)}, "DoRA is not supported"),
    "LoHa": ({f"{K}.hada_w1_a": normal(8, 2)}, "LoHa is not supported"),
    "LoKr": ({f"{K}.lokr_w1": normal(8, 2)}, "LoKr is not supported"),
    "LoCon": (ONE | {f"{K}.lora_mid.weight": normal(2, 2, 3, 3)}, "Tucker decomposition"),
    "SDXL": (ONE | {"lora_te2_text_model_encoder.lora_up.weight": normal(8, 2)}, "it is for Stable Diffusion XL"),
    "Flux": ({"transformer.single.0.attn.to_q.lora_A.weight": normal(2, 8)}, "such as Stable Diffusion 3 or Flux"),
    "kohya's Flux": (
        {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": normal(2, 8)},
        "double_blocks_0_img_attn_proj, which is no layer of this UNet: it is for another model",
    ),
    "whole model": ({"model.diffusion_model.out.0.weight": normal(8)}, "it is a whole model, not a LoRA"),
    "whole UNet": ({"conv_in.weight": normal(8, 4, 3, 3)}, r"no LoRA of a known layout: it has conv_in\.weight"),
    "bias": (ONE | {f"unet.{Q}.lora_B.bias": normal(8)}, r"no LoRA of a known layout: it has .*lora_B\.bias"),
    "half": (without(UP), "is not whole: of .*attn1.to_q it has no up matrix"),
    "alpha alone": ({f"{K}.alpha": torch.tensor(1.0)}, "has no down and no up matrix"),
    "shape": (ONE | {DOWN: normal(2, 9)}, r"whose weight is \[8, 8\], it has the matrices \[2, 9\] and \[8, 2\]"),
    "rank 0": (ONE | {DOWN: normal(0, 8), UP: normal(8, 0)}, r"does not fit: of .* \[0, 8\] and \[8, 0\]"),
    "ranks": (ONE | {UP: normal(8, 3)}, r"matrices \[2, 8\] and \[8, 3\]"),
    "vector": (ONE | {DOWN: normal(16)}, r"matrices \[16\] and \[8, 2\]"),
    "3x3": (ONE | {DOWN: normal(2, 8, 3, 3)}, r"matrices \[2, 8, 3, 3\] and \[8, 2\]"),
    "twice": (ONE | {f"unet.{Q}.lora.up.weight": normal(8, 2)}, "which are the same"),
    "NaN": (ONE | {UP: normal(8, 2) * torch.nan}, "has values that are not finite, in lora_unet_.*lora_up"),
    "alpha": (ONE | {f"{K}.alpha": torch.tensor(torch.inf)}, r"not finite, in lora_unet_.*\.alpha"),
    "alphas": (ONE | {f"{K}.alpha": torch.ones(2)}, r"\.alpha is not one number"),
    "integers": (ONE | {UP: torch.ones(8, 2, dtype=torch.int8)}, "are no floating-point numbers"),
    "nothing": ({}, "has no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refusal:
        read(tensors, tmp_path)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "must be a JSON object"),
        ("[" * 100_000, "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ({"unet.use_dora": True}, "DoRA is not supported"),
        ({"unet.lora_alpha": None}, "lora_alpha is None, must be a number"),
        ({"unet.lora_alpha": float("nan")}, "lora_alpha is nan, must be a number"),
        ({"unet.lora_alpha": 10**400}, "lora_alpha is 1000.*000, must be a number"),
        ({"unet.alpha_pattern": [1]}, r"alpha_pattern is \[1\], must be a mapping"),
        ({"unet.alpha_pattern": {"to_q": True}}, "to_q is True, must be a number"),
        ({"unet.alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern has \(a\+\)\+\$, must be a layer's name"),
    ],
)
def test_refused_metadata(metadata: dict[str, Any] | str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"metadata {METADATA}: .*{message}"):
        read(without(f"{K}.alpha"), tmp_path, metadata)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    header = json.dumps({DOWN: {"dtype": "F32", "shape": [2**40, 8], "data_offsets": [0, 8]}}).encode()
    files = {
        "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is truncated or not a safetensors file": b"\x80\x02}q\x00.",
        "is truncated or not a safetensors file .*[Ii]nvalid": len(header).to_bytes(8, "little") + header + bytes(8),
    }
    for message, content in files.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_lora(path, UNET, TEXT)
    with pytest.raises(ValueError, match=r"lora\.ckpt is no \.safetensors file, the only kind of LoRA that is read"):
        lora_file(path.rename(tmp_path / "lora.ckpt"))


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "lora.bin").touch()
    with pytest.raises(ValueError, match=r"has no LoRA \(\.safetensors\)"):
        lora_file(tmp_path)
    (tmp_path / "one.safetensors").touch()
    assert lora_file(tmp_path).name == "one.safetensors"
    (tmp_path / "two.safetensors").touch()
    with pytest.raises(ValueError, match=r"several files: name one of one\.safetensors, two\.safetensors"):
        lora_file(tmp_path)
    assert lora_file(tmp_path, "two.safetensors").name == "two.safetensors"
    with pytest.raises(ValueError, match=r"has no three\.safetensors"):
        lora_file(tmp_path, "three.safetensors")
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert lora_file(tmp_path).name == "pytorch_lora_weights.safetensors"
    with pytest.raises(ValueError, match="LoRA 'no/where' is neither a file, nor a folder, nor could it be reached"):
        lora_file("no/where")
