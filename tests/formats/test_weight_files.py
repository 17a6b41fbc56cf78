"""Which files hold a model's weights, where there are several, and what is said of those that are none."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_text_encoder, tiny_unet, tiny_vae
from torch import Tensor

from latentdiff.formats import files
from latentdiff.formats.files import read_json, read_safetensors
from latentdiff.formats.headers import read_tensor_file
from latentdiff.formats.weight_files import find_weights, read_weights_headers, variants
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARDS = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]


def write_shards(tensors: dict[str, Tensor], folder: Path, shards: list[str], index: str) -> None:
    keys, weight_map = sorted(tensors), {}
    for name, part in zip(shards, (keys[::2], keys[1::2]), strict=True):
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A VAE of seed 0 in one file, and one of seed 1 in two shards."""
    tiny_vae(seed=0).save_pretrained(tmp_path)
    write_shards(tiny_vae(seed=1).state_dict(), tmp_path, SHARDS, INDEX)
    return tmp_path


def seed_of(model: AutoencoderKL) -> int:
    weight = model.encoder.conv_in.weight
    return next(seed for seed in range(3) if torch.equal(weight, tiny_vae(seed=seed).encoder.conv_in.weight))


def test_an_index_goes_before_a_single_file(both: Path) -> None:
    """As in diffusers, which writes shards beside a model of ours. Our next save leaves one model."""
    expected = (
        rf"holds the weights of two models: {SHARDS[0]} and its 1 other shards is read, {WEIGHTS} is not; "
        "remove what is stale"
    )
    with pytest.warns(UserWarning, match=expected) as caught:
        opened = AutoencoderKL.from_pretrained(both)
    assert seed_of(opened) == 1 and len(caught) == 1 and caught[0].filename == __file__
    tiny_vae(seed=2).save_pretrained(both)
    assert sorted(os.listdir(both)) == ["config.json", WEIGHTS]
    assert seed_of(AutoencoderKL.from_pretrained(both)) == 2


def test_an_index_without_its_files_is_stale(both: Path) -> None:
    """diffusers removes old shards where it writes a single file, and leaves their index."""
    (both / SHARDS[1]).unlink()
    with pytest.warns(UserWarning, match=rf"{WEIGHTS} is read, {INDEX}, {SHARDS[0]} is not"):
        assert seed_of(AutoencoderKL.from_pretrained(both)) == 0
    (both / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} does not exist, which {INDEX} names"):
        AutoencoderKL.from_pretrained(both)
    (both / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"has {SHARDS[0]}, but not their index {INDEX}: copy that too$"):
        AutoencoderKL.from_pretrained(both)


def test_of_two_indexes_the_newer_one_counts(tmp_path: Path) -> None:
    """The two namings of a variant's shards, side by side."""
    tiny_vae().save_pretrained(tmp_path)
    today = [f"{STEM}.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    older = [f"{STEM}-0000{number}-of-00002.fp16.safetensors" for number in (1, 2)]
    indexes = [f"{WEIGHTS}.index.fp16.json", f"{WEIGHTS}.fp16.index.json"]
    write_shards(tiny_vae(seed=1).state_dict(), tmp_path, today, indexes[0])
    write_shards(tiny_vae(seed=2).state_dict(), tmp_path, older, indexes[1])
    for newest, seed, unread in ((0, 1, [indexes[1], *older]), (1, 2, [indexes[0], *today])):
        os.utime(tmp_path / indexes[newest], (2e9 + newest, 2e9 + newest))
        with pytest.warns(UserWarning, match="the weights of two models") as caught:
            assert seed_of(AutoencoderKL.from_pretrained(tmp_path, variant="fp16")) == seed
        assert sorted(unread) == sorted(
            str(caught[0].message).partition("is read, ")[2].partition(" is not")[0].split(", ")
        )
    assert variants(tmp_path, STEM) == [None, "fp16"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoencoderKL.from_pretrained(tmp_path)  # files of another variant are no rest of another model


def test_info_counts_one_model(both: Path) -> None:
    parameters = sum(tensor.numel() for tensor in tiny_vae().state_dict().values())
    assert read_weights_headers(both, STEM).parameters == parameters
    (both / WEIGHTS).unlink()
    for name in SHARDS:
        (both / name).rename(both / name.replace(".safetensors", ".fp16.safetensors"))
    text = (both / INDEX).read_text().replace(".safetensors", ".fp16.safetensors")
    (both / f"{WEIGHTS}.fp16.index.json").write_text(text)
    (both / INDEX).unlink()
    assert variants(both, STEM) == ["fp16"] and read_weights_headers(both, STEM).parameters == parameters


def test_a_tensor_in_two_shards(both: Path) -> None:
    tensors = load_file(both / SHARDS[1])
    save_file(tensors | {"encoder.conv_in.bias": torch.zeros(8)}, both / SHARDS[1], {"format": "pt"})
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=rf"{SHARDS[1]} has encoder.conv_in.bias, which another file of the model has"),
    ):
        AutoencoderKL.from_pretrained(both)


def rename(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {change(key): value for key, value in tensors.items()}


LORA = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (
            rename(lambda key: f"_orig_mod.{key}"),
            r"_orig_mod\..*: _orig_mod. is from torch.compile; save model._orig_mod",
        ),
        (rename(lambda key: key.replace("mid_block.", "mid_block._orig_mod.")), "_orig_mod. is from torch.compile"),
        (rename(lambda key: f"module.{key}"), "module. is from DataParallel; save model.module"),
        (lambda tensors: tensors | {LORA: torch.zeros(4, 8)}, rf"{LORA}: that is of a LoRA; fuse it into the model"),
        (rename(lambda key: key.replace("to_q.", "to_q.base_layer.")), "that is of a LoRA"),
    ],
    ids=["compiled", "compiled-part", "parallel", "lora", "lora-base"],
)
def test_keys_of_other_tools_come_with_the_remedy(change: Callable, remedy: str, tmp_path: Path) -> None:
    for model, folder, stem in (
        (tiny_unet(), tmp_path / "unet", STEM),
        (tiny_text_encoder(), tmp_path / "text", "model"),
    ):
        model.save_pretrained(folder)
        path = folder / f"{stem}.safetensors"
        before = load_file(path)
        after = change(before)
        if after.keys() == before.keys():
            continue  # a text encoder has no such key
        save_file(after, path, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{stem}.safetensors does not fit the model: unexpected .*{remedy}"):
            UNet.from_pretrained(folder) if stem == STEM else TextEncoder.from_pretrained(folder, frozen=True)


def test_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    """Of weights, configs and text."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    tiny_vae().save_pretrained(tmp_path)
    for name in (WEIGHTS, "config.json"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
            AutoencoderKL.from_pretrained(tmp_path)


def test_pickled_weights_alone(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / f"{STEM}.bin")
    with pytest.raises(
        ValueError, match=rf"no safetensors file, only {STEM}.bin, a pickle that could run code: convert"
    ):
        AutoencoderKL.from_pretrained(tmp_path)


def test_float8_names_the_type_to_pass(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path)
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    expected = "float8_e4m3fn; give a dtype to load them in: torch.float32, torch.bfloat16 or torch.float16$"
    with pytest.raises(ValueError, match=expected):
        AutoencoderKL.from_pretrained(tmp_path)
    opened = AutoencoderKL.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(opened.encoder.conv_in.bias, tensors["encoder.conv_in.bias"].bfloat16())


def test_weights_are_converted_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order; those of the wanted type are kept as they are mapped."""
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)}
    tensors |= {"half": torch.ones(10, dtype=torch.float16), "last": torch.zeros(0)}
    save_file(tensors, tmp_path / "file", {"format": "pt"})
    monkeypatch.setattr(files, "CONVERTED_AT_ONCE", 20)
    opened = []
    safe_open = files.safe_open
    monkeypatch.setattr(files, "safe_open", lambda *args, **kwargs: opened.append(1) or safe_open(*args, **kwargs))
    half = read_safetensors(tmp_path / "file", torch.float16)
    assert {key: (value.dtype, value.tolist()) for key, value in half.items()} == {
        key: (torch.float16, value.tolist()) for key, value in tensors.items()
    }
    assert len(opened) == 4
    assert list(half) == list(read_safetensors(tmp_path / "file"))


def test_json_is_bounded_and_each_key_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(" " * 100 + "{}")
    assert read_json(path) == {} and read_json(path, at_most=102) == {}
    with pytest.raises(ValueError, match="file.json has 102 bytes, must have at most 101"):
        read_json(path, at_most=101)
    path.write_text('{"a": {"b": 1, "c": 2, "b": 3}}')
    with pytest.raises(ValueError, match="file.json is not valid JSON: the key 'b' is there twice"):
        read_json(path)


def test_a_header_with_a_tensor_twice(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for read in (read_safetensors, read_tensor_file):
        with pytest.raises(ValueError, match="not a safetensors file .header: the key 'a' is there twice"):
            read(path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_weights(tmp_path / "nowhere", STEM)
