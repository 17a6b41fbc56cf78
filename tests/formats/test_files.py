"""Files: strict loading, and writes that fail without harming the old file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from saved_models import assert_same_weights, without
from tiny import tiny_vae

from latentdiff.formats.files import (
    check_fit,
    load_strictly,
    read_safetensors,
    sync_folder,
    write_json,
    write_png,
    write_safetensors,
    write_text,
)


def test_strict_loading_checks_before_it_changes() -> None:
    vae, other = tiny_vae(seed=0), tiny_vae(seed=1)
    weights = other.state_dict()
    with pytest.raises(ValueError, match="somewhere does not fit the model: missing post_quant_conv.weight"):
        load_strictly(vae, without(weights, "post_quant_conv.weight"), "somewhere")
    assert_same_weights(vae, tiny_vae(seed=0))
    load_strictly(vae, weights, "somewhere")
    assert_same_weights(vae, other)
    # The tensors themselves, without a copy, so that a model on the meta device can take them.
    assert all(p.data_ptr() == weights[name].data_ptr() for name, p in vae.named_parameters())


def test_fit_of_weights_is_checked_by_key_and_shape() -> None:
    """Not by dtype, which may be another."""
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(4)}
    check_fit(expected, {"c": torch.ones(4), "b": torch.tensor(7), "a": torch.zeros(2, 3, dtype=torch.float16)}, "x")
    with pytest.raises(ValueError) as error:
        check_fit(expected, {"a": torch.zeros(3, 2), "b": torch.zeros(1), "d": torch.zeros(4)}, "folder/file")
    assert str(error.value) == (
        "folder/file does not fit the model: missing c; unexpected d; a is [3, 2], the config says [2, 3], "
        "b is [1], the config says []"
    )
    many = {f"w{i}": torch.zeros(1) for i in range(8)}
    with pytest.raises(ValueError, match="^x does not fit the model: missing w0, w1, w2, w3, w4 and 3 more$"):
        check_fit(many, {}, "x")


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Files may not grow beyond `bytes_left`: what a full disk does to a write."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: write_safetensors({"a": torch.zeros(9000)}, path), id="safetensors"),
        pytest.param(lambda path: write_json({"a": list(range(9000))}, path), id="json"),
        pytest.param(lambda path: write_text("a" * 9000, path), id="text"),
        pytest.param(lambda path: write_png(Image.effect_noise((100, 100), 100), path), id="png"),
    ],
)
def test_a_failed_write_keeps_the_old_file(write, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with full_disk(bytes_left=4096), pytest.raises(OSError):
        write(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write(path)
    assert path.stat().st_size > 4096 and os.listdir(tmp_path) == ["file"]


def test_a_failed_conversion_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    tied = torch.zeros(3)
    with pytest.raises(RuntimeError, match="share memory"):
        write_safetensors({"a": tied, "b": tied}, path)
    with pytest.raises(NotImplementedError):
        write_safetensors({"a": torch.zeros(3, device="meta")}, path)
    with pytest.raises(TypeError):
        write_json({"a": torch.zeros(3)}, path)
    with pytest.raises(UnicodeEncodeError):
        write_text("a lone surrogate: \ud800", path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "precious").write_text("old")
    with pytest.raises(OSError):
        write_text("new", tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file" / "precious").read_text() == "old"


def test_a_reader_keeps_the_old_file_while_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text("old", path)
    with path.open() as reader:
        write_text("new", path)
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_views_dtypes_and_metadata_survive_a_round_trip(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        "first": whole[:2],
        "rest": whole[2:],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "half": torch.tensor([0.1], dtype=torch.bfloat16),
        "steps": torch.tensor(7),
        "nothing": torch.zeros(0, 3),
    }
    write_safetensors(tensors, tmp_path / "file", {"step": "7"})
    read = read_safetensors(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], value) and read[key].dtype == value.dtype for key, value in tensors.items())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}


@pytest.mark.skipif(os.name != "posix", reason="other systems cannot open a folder")
def test_a_folder_is_synced_and_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, descriptor))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    sync_folder(tmp_path)
    ((inode, descriptor),) = synced
    assert inode == tmp_path.stat().st_ino
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")
