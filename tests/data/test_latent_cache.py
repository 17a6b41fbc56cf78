"""The latent cache on disk: what it holds, what makes it stale, what an interruption leaves, and who may write it."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from cached import contexts, means
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_text_encoder, tiny_vae, tokenizer
from torch import nn

import latentdiff
from latentdiff import AutoencoderKL
from latentdiff.config import DataConfig
from latentdiff.data import latent_cache
from latentdiff.data.batches import BatchPlan, Key, StepBatches, loader
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.data.latent_cache import LatentCache, Shards, encode_means
from latentdiff.models.text_encoder import TextEncoder

ROOT = Path(latentdiff.__file__).parents[1]
CAPTIONS = ["red apple", "rocket", "red apple", "", "green frog", "rocket", "blue whale"]
LENGTH = 77


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of `datasets` and a state of Accelerate of this test's own; a warning is an error."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def save_noise(path: Path, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An imagefolder of seven images of noise with CAPTIONS."""
    return write_source(tmp_path / "images", CAPTIONS)


def write_source(folder: Path, captions: Sequence[str]) -> Path:
    folder.mkdir()
    for i in range(len(captions)):
        save_noise(folder / f"{i:03d}.png", i)
    write_captions(folder, captions)
    return folder


def write_captions(folder: Path, captions: Sequence[str | list[str]]) -> None:
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": text}) + "\n" for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(lines))


def open_source(source: Path, **config: object) -> CaptionedImages:
    return open_images(
        DataConfig(**{"holdout": 0, "source": str(source), "size": 16, "missing_captions": "empty"} | config),
        3,
        seed=0,
        progress=False,
    )[0]


def open_cache(
    folder: Path,
    images: CaptionedImages,
    vae: AutoencoderKL | None = None,
    text_encoder: TextEncoder | None = None,
    name: str = "train",
    replace: bool = True,
    shard_items: int | None = 2,
) -> LatentCache:
    return LatentCache.open(
        folder,
        name,
        images,
        vae or tiny_vae(),
        tokenizer(),
        text_encoder,
        batch_size=3,
        accelerator=Accelerator(cpu=True),
        progress=False,
        replace=replace,
        shard_items=shard_items,
    )


def key(index: int, epoch: int = 0) -> Key:
    return Key(index=index, epoch=epoch, step=0, sample_index=0)


def part(folder: Path, kind: str, name: str = "train") -> Path:
    """The one folder of a kind (latents, text)."""
    (found,) = folder.glob(f"{name}-{kind}-*")
    return found


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its inode and time of change: equal only if nothing was written again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def rewritten(before: dict[str, tuple[int, int]], folder: Path) -> set[str]:
    return {name for name, stamp in files(folder).items() if before.get(name) != stamp}


def contents(folder: Path) -> dict[str, object]:
    """Every file's tensors and metadata (whose order within a file is not fixed) or text."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                found[name] = {k: file.get_tensor(k).tobytes() for k in file.keys()} | file.metadata()  # noqa: SIM118
        else:
            found[name] = path.read_text()
    return found


# --- what it holds ---


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_the_cache_gives_what_encoding_gives(source, tmp_path, flip):
    images, vae, encoder = open_source(source, flip=flip), tiny_vae(), tiny_text_encoder()
    cache = open_cache(tmp_path / "cache", images, vae, encoder)
    assert len(cache) == 7
    batches = StepBatches(7, BatchPlan(5, 5, 1), 0, seed=0, start_step=0, total_steps=6)
    captions, seen = images.captions, set()
    for cached, online in zip(
        loader(cache, batches, 0, pin_memory=False), loader(images, batches, 0, pin_memory=False), strict=True
    ):
        assert cached["index"] == online["index"] and cached["sample_indices"] == online["sample_indices"]
        input_ids = tokenizer()([captions[i] for i in online["index"]])
        with torch.no_grad():
            moments, context = vae.encode(online["pixels"]), encoder(input_ids)
        assert cached["moments"].dtype == torch.float32 and cached["moments"].shape == (5, 8, 8, 8)
        torch.testing.assert_close(cached["moments"], moments, atol=1e-5, rtol=1e-5)
        assert cached["captions"] == online["captions"] == [captions[i] for i in online["index"]]
        torch.testing.assert_close(cached["context"], context, atol=1e-5, rtol=1e-5)
        seen |= {images.view(i, online["step"] * 5 // 7).flip for i in online["index"]}
    assert seen == {0.0: {False}, 0.5: {False, True}, 1.0: {True}}[flip]
    with torch.no_grad():
        torch.testing.assert_close(cache.unconditional_context, encoder(tokenizer()([""]))[0], atol=1e-5, rtol=1e-5)
    assert contexts(cache, [1, 5, 6]).shape == (3, LENGTH, 16)
    torch.testing.assert_close(means(cache, vae), torch.stack(encode_means(vae, images, 4)), atol=1e-5, rtol=1e-5)


def test_an_epoch_chooses_the_view_and_the_moments_stay(source, tmp_path):
    """No random sample is stored: the same view always has the same moments, and they hold both mean and variance."""
    images = open_source(source, flip=0.5)
    cache = open_cache(tmp_path / "cache", images)
    views = {True: [], False: []}
    for epoch in range(12):
        views[images.view(3, epoch).flip].append(cache[key(3, epoch)]["moments"])
    assert len(views[True]) > 1 and len(views[False]) > 1
    for same in views.values():
        assert all(torch.equal(same[0], other) for other in same)
    assert (views[True][0] - views[False][0]).abs().max() > 0.1


def test_without_a_frozen_encoder_captions_stay_text(source, tmp_path):
    """Also with one, if each epoch has other captions."""
    for encoder, shuffle in [(None, False), (tiny_text_encoder(), True)]:
        cache = open_cache(tmp_path / "cache", open_source(source, shuffle_caption=shuffle), text_encoder=encoder)
        assert cache[key(0)].keys() == {"moments", "caption", "key"} and cache.unconditional_context is None
        assert cache[key(0)]["caption"] == "red apple"
        assert not list((tmp_path / "cache").glob("train-text-*"))


def test_an_epoch_chooses_the_caption(source, tmp_path):
    write_captions(source, [["red apple", "rocket"]] * 7)
    images, encoder = open_source(source), tiny_text_encoder()
    cache = open_cache(tmp_path / "cache", images, text_encoder=encoder)
    seen = set()
    for epoch in range(8):
        item = cache[key(3, epoch)]
        assert item["caption"] == images.caption(3, epoch)
        with torch.no_grad():
            torch.testing.assert_close(item["context"], encoder(tokenizer()([item["caption"]]))[0])
        seen.add(item["caption"])
    assert seen == {"red apple", "rocket"}


def test_equal_captions_are_encoded_once(source, tmp_path):
    encoder = tiny_text_encoder()
    rows = []
    encoder.register_forward_hook(lambda module, inputs, output: rows.extend(inputs[0].tolist()))
    cache = open_cache(tmp_path / "cache", open_source(source), text_encoder=encoder)
    distinct = ["", "red apple", "rocket", "green frog", "blue whale"]
    assert rows == tokenizer()(distinct).tolist()
    assert json.loads((part(tmp_path / "cache", "text") / "manifest.json").read_text())["count"] == 5
    with torch.no_grad():
        torch.testing.assert_close(contexts(cache, range(7)), encoder(tokenizer()(CAPTIONS)))


def test_no_held_out_images_are_an_empty_cache(source, tmp_path):
    config = DataConfig(holdout=0, source=str(source), size=16, missing_captions="empty")
    images = open_images(config, 3, 0, progress=False)[1]
    for _ in range(2):
        cache = open_cache(tmp_path / "cache", images, text_encoder=tiny_text_encoder(), name="held_out")
        assert len(cache) == 0 and means(cache, tiny_vae()).shape == (0, 4, 8, 8)
        assert cache.unconditional_context.shape == (LENGTH, 16)


def test_files_and_manifest_say_what_they_are(source, tmp_path):
    cache = open_cache(tmp_path / "cache", open_source(source, flip=0.5), text_encoder=tiny_text_encoder())
    folder = part(tmp_path / "cache", "latents")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert folder.name == f"train-latents-{manifest['fingerprint'][:16]}" and len(manifest["fingerprint"]) == 32
    assert manifest["count"] == 7 and manifest["tensors"] == {"moments": {"shape": [2, 8, 8, 8], "dtype": "float32"}}
    assert [(s["file"], s["start"], s["stop"]) for s in manifest["shards"]] == [
        (f"{i:05d}.safetensors", 2 * i, min(2 * i + 2, 7)) for i in range(4)
    ]
    for shard in manifest["shards"]:
        assert (folder / shard["file"]).stat().st_size == shard["bytes"]
        assert len(load_file(folder / shard["file"])["moments"]) == shard["stop"] - shard["start"]
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *(s["file"] for s in manifest["shards"])}
    assert cache.latents[0].item_bytes == 2 * 8 * 8 * 8 * 4


def test_shard_sizes():
    def size(count: int, item_bytes: int) -> int:
        shards = Shards(Path("unused"), "0" * 32, count, {"x": ((item_bytes // 4,), torch.float32)})
        assert sum(len(items) for items in shards.ranges) == count
        return shards.shard_items

    assert size(100, 4096) == 64  # few images: still several files, to split over processes
    assert size(16_000, 4096) == 1000
    assert size(10**6, 4096) == 4096
    assert size(10**6, 2**18) == 1024  # 256 MiB a file
    assert size(10**6, 2**29) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists a process's mappings")
def test_a_file_mapped_again_reads_the_same(source, tmp_path, monkeypatch):
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f"{latents}/")

    cache = open_cache(tmp_path / "cache", open_source(source))
    latents = cache.latents[0].folder
    expected = [cache[key(i)]["moments"].clone() for i in range(7)]
    assert mapped() == 4
    del cache
    assert mapped() == 0
    cache = open_cache(tmp_path / "cache", open_source(source))
    monkeypatch.setattr(latent_cache, "FAULT_AROUND", 0)
    monkeypatch.setattr(latent_cache, "MAPPED_BYTES", 3 * 8 * 8 * 8 * 4)
    most = 0
    for i in [0, 6, 3, 1, 5, 2, 4] * 3:
        assert torch.equal(cache[key(i)]["moments"], expected[i])
        most = max(most, mapped())
    assert most == 3  # of 4 files: after three reads all are unmapped


# --- what is kept and what is stale ---


def test_a_complete_cache_is_not_encoded_again(source, tmp_path):
    cache = open_cache(tmp_path / "cache", open_source(source, flip=0.5), text_encoder=tiny_text_encoder())
    before = files(tmp_path / "cache")
    vae, encoder = tiny_vae(), tiny_text_encoder()
    for model in (vae, encoder):
        model.register_forward_hook(lambda *_: pytest.fail("encoded again"))
    vae.encoder.register_forward_hook(lambda *_: pytest.fail("encoded again"))
    # Another fraction of flipped images and another file size do not change the moments.
    again = open_cache(tmp_path / "cache", open_source(source, flip=0.3), vae, encoder, shard_items=3)
    assert files(tmp_path / "cache") == before
    for index in range(7):
        assert torch.equal(again.moments(index), cache.moments(index))
    assert torch.equal(contexts(again, range(7)), contexts(cache, range(7)))


def test_a_moved_folder_of_images_is_recognised(source, tmp_path):
    open_cache(tmp_path / "cache", open_source(source))
    before = files(tmp_path / "cache")
    open_cache(tmp_path / "cache", open_source(source.rename(tmp_path / "moved")))
    assert files(tmp_path / "cache") == before


def change_one_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-3
    return model


def touch(source: Path) -> None:
    os.utime(source / "004.png", ns=(1, 1))


# What changes -> which of the two parts is encoded again: (latents, text).
CHANGES: dict[str, tuple[Callable[[Path], dict], bool, bool]] = {
    "nothing": (lambda source: {}, False, False),
    "a weight of the autoencoder": (lambda source: {"vae": change_one_weight(tiny_vae())}, True, False),
    "the autoencoder's config": (lambda source: {"vae": tiny_vae(scaling_factor=0.5)}, True, False),
    "the size": (lambda source: {"data": {"size": 8}}, True, False),
    "the background": (lambda source: {"data": {"background": (0, 0, 0)}}, True, False),
    "flips": (lambda source: {"data": {"flip": 0.5}}, True, False),
    "an image": (lambda source: save_noise(source / "004.png", 99) or {}, True, False),
    "an image's time": (lambda source: touch(source) or {}, False, False),
    "a caption": (lambda source: write_captions(source, [*CAPTIONS[:-1], "purple whale"]) or {}, False, True),
    "the text encoder": (lambda source: {"encoder": change_one_weight(tiny_text_encoder())}, False, True),
    "its activation": (lambda source: {"encoder": tiny_text_encoder(hidden_act="gelu")}, False, True),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_makes_a_part_stale(source, tmp_path, what):
    change, latents, text = CHANGES[what]
    folder = tmp_path / "cache"
    open_cache(folder, open_source(source), text_encoder=tiny_text_encoder())
    before = {kind: part(folder, kind).name for kind in ("latents", "text")}
    stamps = files(folder)
    changed = change(source)
    images = open_source(source, **changed.get("data", {}))
    vae, encoder = changed.get("vae", tiny_vae()), changed.get("encoder", tiny_text_encoder())
    cache = open_cache(folder, images, vae, encoder)
    expected = {kind for kind, stale in [("latents", latents), ("text", text)] if stale}
    assert {kind for kind in before if part(folder, kind).name != before[kind]} == expected
    assert {name.split("-")[1] for name in rewritten(stamps, folder)} == expected
    with torch.no_grad():
        torch.testing.assert_close(cache.moments(4)[0], vae.encode(images.first(5))[4], atol=1e-5, rtol=1e-5)
        expected = encoder(tokenizer()(images.captions))
    torch.testing.assert_close(contexts(cache, range(7)), expected, atol=1e-5, rtol=1e-5)


def test_images_within_a_table_are_known_by_their_bytes(source, tmp_path):
    def rows(order: Sequence[int]) -> CaptionedImages:
        entries = [{"bytes": (source / f"{i:03d}.png").read_bytes(), "path": f"{i:03d}.png"} for i in order]
        features = datasets.Features({"image": datasets.Image(decode=False)})
        table = datasets.Dataset.from_dict({"image": entries}, features=features)
        return CaptionedImages(table, DataConfig(source="memory", size=16, captions="none"), 3, seed=0)

    open_cache(tmp_path / "cache", rows([0, 1, 2]))
    before = part(tmp_path / "cache", "latents")
    touch(source)
    open_cache(tmp_path / "cache", rows([0, 1, 2]))
    assert part(tmp_path / "cache", "latents") == before
    images = rows([0, 2, 1])
    cache = open_cache(tmp_path / "cache", images)
    assert part(tmp_path / "cache", "latents") != before
    with torch.no_grad():
        torch.testing.assert_close(cache.moments(1)[0], tiny_vae().encode(images.first(2))[1])


def test_replace_removes_only_what_it_replaces(source, tmp_path):
    folder = tmp_path / "cache"
    images = open_source(source)
    open_cache(folder, images, name="held_out")
    open_cache(folder, images, tiny_vae(seed=1), replace=False)
    (folder / "train-latents-notes").mkdir()
    (folder / "train-latents-0123456789abcdef.bak").mkdir()
    kept = {path.name for path in folder.iterdir() if not path.name.startswith("train-latents-") or "n" in path.suffix}
    first = {path.name for path in folder.iterdir()}

    open_cache(folder, images, replace=False)
    second = {path.name for path in folder.iterdir()}
    assert first < second and len(second - first) == 1  # other moments; the text part is the same
    (new,) = second - first
    (folder / new / ".00000.safetensors.123.tmp").touch()  # of a killed process

    open_cache(folder, images, replace=True)
    left = {path.name for path in folder.iterdir()}
    assert left == {new, "train-latents-notes", "train-latents-0123456789abcdef.bak"} | kept
    assert not list((folder / new).glob(".*"))


# --- interruptions and damage ---


def test_a_part_without_its_manifest_is_finished_from_what_is_there(source, tmp_path):
    folder, images = tmp_path / "cache", open_source(source, flip=0.5)
    open_cache(folder, images)
    expected = shutil.copytree(folder, tmp_path / "expected")
    latents = part(folder, "latents")
    (latents / "manifest.json").unlink()
    (latents / "00002.safetensors").unlink()
    before = files(folder)
    encoded = []
    vae = tiny_vae()
    vae.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    open_cache(folder, images, vae)
    assert rewritten(before, folder) == {f"{latents.name}/manifest.json", f"{latents.name}/00002.safetensors"}
    assert encoded == [2, 2]  # two images, as they are and flipped
    assert contents(folder) == contents(expected)

    (latents / "manifest.json").unlink()  # killed after the last shard
    before = files(folder)
    open_cache(folder, images)
    assert rewritten(before, folder) == {f"{latents.name}/manifest.json"}
    assert contents(folder) == contents(expected)


SCRIPT = """
import sys, time
sys.path[:0] = {tests!r}
from test_latent_cache import *

torch.set_num_threads(1)
folder, source = Path({folder!r}), Path({source!r})
vae = tiny_vae()
"""


def script(folder: Path, source: Path) -> str:
    """The start of a script that uses what is in this file."""
    return SCRIPT.format(
        tests=[str(ROOT / "tests" / "data"), str(ROOT / "tests")], folder=str(folder), source=str(source)
    )


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.mark.runs
def test_an_interrupted_pass_continues_where_it_stopped(source, tmp_path):
    folder = tmp_path / "cache"
    code = script(folder, source) + "vae.encoder.register_forward_hook(lambda *_: time.sleep(0.4))\n"
    code += "open_cache(folder, open_source(source), vae, tiny_text_encoder())\n"
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, cwd=tmp_path)
    deadline = time.monotonic() + 60
    try:
        while not list(folder.glob("train-latents-*/00001.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    latents = part(folder, "latents")
    done = sorted(path.name for path in latents.glob("*.safetensors"))
    assert "00001.safetensors" in done and len(done) < 4 and not (latents / "manifest.json").exists()
    before = files(latents)
    cache = open_cache(folder, open_source(source), text_encoder=tiny_text_encoder())
    left = {f"{i:05d}.safetensors" for i in range(4)} - set(done)
    assert rewritten(before, latents) == left | {"manifest.json"}
    with torch.no_grad():
        expected = tiny_vae().encode(cache.images.first(7))
    for index in range(7):
        torch.testing.assert_close(cache.moments(index)[0], expected[index], atol=1e-5, rtol=1e-5)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(100))


def scramble_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def take_from_elsewhere(path: Path) -> None:
    save_file(load_file(path), path, metadata={"fingerprint": "0" * 32, "start": "2", "stop": "4"})


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", [truncate, lengthen, scramble_header, take_from_elsewhere, Path.unlink])
def test_a_damaged_file_is_encoded_again(source, tmp_path, damage, finished):
    folder, images = tmp_path / "cache", open_source(source)
    open_cache(folder, images)
    expected = shutil.copytree(folder, tmp_path / "expected")
    latents = part(folder, "latents")
    damage(latents / "00001.safetensors")
    if not finished:
        (latents / "manifest.json").unlink()
    before = files(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_cache(folder, images)
    expected_warnings = 0 if damage is Path.unlink and not finished else 1
    assert len(caught) == expected_warnings
    assert all(str(latents / "00001.safetensors") in str(warning.message) for warning in caught)
    assert rewritten(before, folder) == {f"{latents.name}/{name}" for name in ("manifest.json", "00001.safetensors")}
    assert contents(folder) == contents(expected)


def test_files_of_another_shard_size_are_not_reused(source, tmp_path):
    """An interrupted pass with other shard sizes leaves files of the same names."""
    folder, images = tmp_path / "cache", open_source(source)
    open_cache(folder, images, shard_items=1)
    (part(folder, "latents") / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="belongs to another cache"):
        open_cache(folder, images, shard_items=3)
    open_cache(tmp_path / "expected", images, shard_items=3)
    assert contents(part(folder, "latents")) == contents(part(tmp_path / "expected", "latents"))


# --- refusals ---


def test_random_crops_are_refused(source, tmp_path):
    message = "data.crop random cannot be cached; set train.cache_latents=false or data.crop=center"
    with pytest.raises(ValueError, match=f"^{message}$"):
        open_cache(tmp_path / "cache", open_source(source, crop="random"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused_by_name(source, tmp_path, value):
    """The fifth image alone has one number that is not finite: the shards before it are kept, nothing is finished."""
    vae, images = tiny_vae(), open_source(source)
    fifth = images.pixels(4)

    def spoil(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        for row in range(len(output)):
            if torch.equal(inputs[0][row], fifth):
                output[row, 5, 2, 3] = value
        return output

    vae.encoder.register_forward_hook(spoil)
    with pytest.raises(ValueError) as error:
        open_cache(tmp_path / "cache", images, vae)
    assert str(error.value).startswith(
        f"the autoencoder gives values that are not finite for {source / '004.png'}; if that is so for all images"
    )
    latents = part(tmp_path / "cache", "latents")
    assert sorted(path.name for path in latents.iterdir()) == ["00000.safetensors", "00001.safetensors"]


def test_text_that_is_not_finite_is_refused_by_name(source, tmp_path):
    encoder = tiny_text_encoder()
    frog = int(tokenizer()(["frog"])[0, 1])
    with torch.no_grad():
        encoder.token_vectors[frog] = float("nan")
    with pytest.raises(ValueError) as error:
        open_cache(tmp_path / "cache", open_source(source), text_encoder=encoder)
    assert str(error.value).startswith(
        f"the text encoder gives values that are not finite for the caption of {source / '004.png'}; if"
    )
    assert not list(tmp_path.glob("cache/*/manifest.json"))


def test_a_full_disk_is_reported_before_anything_is_encoded(source, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    usage = collections.namedtuple("usage", "total used free")
    needed = 7 * 8 * 8 * 8 * 4 + 5 * LENGTH * 16 * 4  # moments, then the context of 5 distinct captions
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    images, encoder = open_source(source), tiny_text_encoder()
    with pytest.raises(ValueError) as error:
        open_cache(folder, images, text_encoder=encoder)
    assert str(error.value) == (
        f"the latent cache needs 3.9e-05 GB in {folder}, where 3.9e-05 GB are free; make room, set "
        "train.cache_folder to a larger disk, or train.cache_latents=false"
    )
    assert not list(folder.iterdir())
    free = needed
    open_cache(folder, images, text_encoder=encoder)
    (part(folder, "latents") / "00000.safetensors").unlink()
    free = 2 * 8 * 8 * 8 * 4  # what is there needs no room
    with pytest.warns(UserWarning, match="is missing"):
        open_cache(folder, images, text_encoder=encoder)


# --- several processes ---


def launch(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code as two gloo processes."""
    (folder / "script.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


TWO_STARTS = """
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
written, broken = [], rank == 1

def write(self, shard, tensors, real=Shards.write):
    if broken and "latents" in self.folder.name:
        raise OSError("No space left on device")
    real(self, shard, tensors)
    written.append(self.folder.name.split("-")[1] + " " + str(shard))

def report(*words):  # a line in one piece, as two processes write at once
    os.write(1, (" ".join(map(str, ["rank", rank, "start", start, *words])) + "\\n").encode())

Shards.write = write
images = open_source(source)
for start in (1, 2):
    try:
        open_cache(folder, images, vae, tiny_text_encoder())
        report(sorted(written))
    except (OSError, ValueError) as error:
        report(error, [path.parent.name[:7] for path in folder.glob("*/manifest.json")])
    written, broken = [], False
accelerator.end_training()  # closes the process group before the process exits
"""


@pytest.mark.runs
def test_two_processes_fail_together_and_write_the_same_cache_as_one(source, tmp_path):
    """At the first start the second process can write no latents; the second start does what was not done."""
    open_cache(tmp_path / "one", open_source(source), text_encoder=tiny_text_encoder())
    two = tmp_path / "two"
    result = launch(script(two, source) + TWO_STARTS, tmp_path)
    assert result.returncode == 0, result.stderr
    failed = "another process failed; its message says why"
    assert [line for line in sorted(result.stdout.splitlines()) if line.startswith("rank")] == [
        f"rank 0 start 1 {failed} ['train-t']",
        "rank 0 start 2 ['latents 1']",
        "rank 1 start 1 No space left on device ['train-t']",
        "rank 1 start 2 ['latents 3']",
    ]
    assert contents(tmp_path / "one") == contents(two)
