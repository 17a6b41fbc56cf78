"""The latent cache on disk: what it holds, what makes it stale, what an interruption leaves, and who may write it."""

import collections
import hashlib
import json
import os
import re
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
from latentdiff.data.latent_cache import LatentCache, Shards, digest_numbers, encode_means, file_name_of
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


def stored(folder: Path, name: str) -> dict[int, bytes]:
    """A part's items by their digests."""
    found = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for digest, values in zip(tensors["digests"].tolist(), tensors[name], strict=True):
            assert digest not in found
            found[digest] = values.numpy().tobytes()
    return found


class Encoded(list):
    """The images that a VAE, or the captions (input_ids) that a text encoder, encodes; those of padding once."""

    def __init__(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        rows = [row.numpy().tobytes() for row in inputs[0]]
        assert len(rows) == 3  # batches are of one size
        self.extend(dict.fromkeys(rows))


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
    encoded = Encoded(encoder)
    cache = open_cache(tmp_path / "cache", open_source(source), text_encoder=encoder)
    distinct = ["", "red apple", "rocket", "green frog", "blue whale"]
    assert encoded == [ids.numpy().tobytes() for ids in tokenizer()(distinct)]
    assert len(stored(part(tmp_path / "cache", "text"), "context")) == 5
    with torch.no_grad():
        torch.testing.assert_close(contexts(cache, range(7)), tiny_text_encoder()(tokenizer()(CAPTIONS)))


def test_no_held_out_images_are_an_empty_cache(source, tmp_path):
    config = DataConfig(holdout=0, source=str(source), size=16, missing_captions="empty")
    images = open_images(config, 3, 0, progress=False)[1]
    for _ in range(2):
        cache = open_cache(tmp_path / "cache", images, text_encoder=tiny_text_encoder(), name="held_out")
        assert len(cache) == 0 and means(cache, tiny_vae()).shape == (0, 4, 8, 8)
        assert cache.unconditional_context.shape == (LENGTH, 16)


def test_files_say_what_they_are(source, tmp_path):
    images = open_source(source, flip=0.5)
    cache = open_cache(tmp_path / "cache", images, text_encoder=tiny_text_encoder())
    folder = part(tmp_path / "cache", "latents")
    held = []
    for path in folder.iterdir():
        with safe_open(path, framework="np") as file:
            assert folder.name == f"train-latents-{file.metadata()['fingerprint'][:16]}"
            assert len(file.metadata()["fingerprint"]) == 32
            digests, moments = file.get_tensor("digests"), file.get_tensor("moments")
        assert digests.dtype == np.int64 and moments.dtype == np.float32
        assert moments.shape == (len(digests), 2, 8, 8, 8)
        held.append([f"{number % 2**64:016x}" for number in digests.tolist()])
        # Named after them.
        assert path.name == hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest() + ".safetensors"
    expected = images.digests
    assert sorted(held) == sorted([expected[0:2], expected[2:4], expected[4:6], expected[6:]])
    assert cache.latents[0].item_bytes == 2 * 8 * 8 * 8 * 4


def test_what_is_said(source, tmp_path, capsys):
    """How many were encoded, of all distinct ones."""
    open_cache(tmp_path / "cache", open_source(source), text_encoder=tiny_text_encoder())
    write_captions(source, [*CAPTIONS[:-1], "purple whale"])
    save_noise(source / "004.png", 99)
    shutil.copy(source / "000.png", source / "001.png")
    open_cache(tmp_path / "cache", open_source(source), text_encoder=tiny_text_encoder())
    open_cache(tmp_path / "cache", open_source(source))
    assert capsys.readouterr().out.splitlines() == [
        "latents: 7 new of 7 encoded; captions: 5 new of 5",
        "latents: 1 new of 6 encoded; captions: 1 new of 5",
        "latents: 0 new of 6 encoded",
    ]


def test_shard_sizes():
    def size(count: int, item_bytes: int) -> int:
        return Shards(Path("unused"), "0" * 32, {"x": ((item_bytes // 4,), torch.float32)}).shard_items(count)

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
    monkeypatch.setattr(latent_cache, "FAULT_AROUND", 0)
    monkeypatch.setattr(latent_cache, "MAPPED_BYTES", 3 * 8 * 8 * 8 * 4)
    cache = open_cache(tmp_path / "cache", open_source(source))
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


# What changes that all items share -> which of the two parts is encoded again: (latents, text).
CHANGES: dict[str, tuple[Callable[[Path], dict], bool, bool]] = {
    "nothing": (lambda source: {}, False, False),
    "a weight of the autoencoder": (lambda source: {"vae": change_one_weight(tiny_vae())}, True, False),
    "the autoencoder's config": (lambda source: {"vae": tiny_vae(scaling_factor=0.5)}, True, False),
    "the size": (lambda source: {"data": {"size": 8}}, True, False),
    "the background": (lambda source: {"data": {"background": (0, 0, 0)}}, True, False),
    "flips": (lambda source: {"data": {"flip": 0.5}}, True, False),
    "an image's time": (lambda source: touch(source) or {}, False, False),
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

    first = open_cache(tmp_path / "cache", rows([0, 1, 2]))
    before = files(tmp_path / "cache")
    touch(source)
    cache = open_cache(tmp_path / "cache", rows([0, 2, 1]))
    assert files(tmp_path / "cache") == before
    assert torch.equal(cache.moments(1), first.moments(2)) and not torch.equal(cache.moments(1), first.moments(1))


# --- new and old items ---


def rename(source: Path, names: Sequence[str]) -> None:
    """Give the images other names, with CAPTIONS, so that they come in another order."""
    for i in range(len(names)):
        (source / f"{i:03d}.png").rename(source / names[i])
    lines = [json.dumps({"file_name": n, "text": text}) + "\n" for n, text in zip(names, CAPTIONS, strict=True)]
    (source / "metadata.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_only_new_items_are_encoded_and_have_the_bits_of_all_at_once(source, tmp_path, flip):
    """Three images of seven, then two more that come first, then all; in other batches each time."""
    folder, whole = tmp_path / "cache", open_source(source, flip=flip)
    expected = open_cache(tmp_path / "expected", whole, text_encoder=tiny_text_encoder(), shard_items=4)
    views, captions = 2 if flip else 1, []
    for rows, new_images, new_captions in [
        ([2, 4, 5], 3, ["", "red apple", "green frog", "rocket"]),
        ([0, 1, 2, 4, 5], 2, []),
        (range(7), 2, ["blue whale"]),
    ]:
        vae, encoder = tiny_vae(), tiny_text_encoder()
        encoded, captions = Encoded(vae.encoder), Encoded(encoder)
        cache = open_cache(folder, whole.select(list(rows)), vae, encoder)
        assert len(encoded) == len(set(encoded)) == views * new_images
        assert (
            captions == [ids.numpy().tobytes() for ids in tokenizer()(new_captions)] if new_captions else not captions
        )
        for own, row in enumerate(rows):
            assert torch.equal(cache.moments(own), expected.moments(row))
            assert torch.equal(cache[key(own)]["context"], expected[key(row)]["context"])
    for kind, name in [("latents", "moments"), ("text", "context")]:
        assert stored(part(folder, kind), name) == stored(part(tmp_path / "expected", kind), name)


def test_order_names_copies_and_removed_images_cost_nothing(source, tmp_path):
    folder = tmp_path / "cache"
    first = open_cache(folder, open_source(source), text_encoder=tiny_text_encoder())
    before = files(folder)
    names = [f"{n}.png" for n in "gcaebdf"]
    rename(source, names)
    shutil.copy(source / "a.png", source / "z.png")
    with (source / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "z.png", "text": "rocket"}) + "\n")
    (source / "g.png").unlink()
    lines = (source / "metadata.jsonl").read_text().splitlines(keepends=True)
    (source / "metadata.jsonl").write_text("".join(line for line in lines if '"g.png"' not in line))
    images = open_source(source)
    old = [names.index({"z.png": "a.png"}.get(Path(images.name(i)).name, Path(images.name(i)).name)) for i in range(7)]
    assert sorted(old) == [1, 2, 2, 3, 4, 5, 6] and old != sorted(old)
    cache = open_cache(folder, images, text_encoder=tiny_text_encoder())
    assert files(folder) == before
    for index, row in enumerate(old):
        assert torch.equal(cache.moments(index), first.moments(row))


def test_unused_items_are_removed_when_they_are_more_than_half(source, tmp_path):
    """Of files of two images: of seven images first four are used, then three, in an order of their own."""
    folder, images = tmp_path / "cache", open_source(source)
    expected = [open_cache(folder, images).moments(i).clone() for i in range(7)]
    before = files(folder)
    open_cache(folder, images.select([0, 2, 3, 5]))
    assert files(folder) == before
    # Images that several runs share are not this run's to remove.
    open_cache(folder, images.select([5]), replace=False)
    assert files(folder) == before

    vae = tiny_vae()
    encoded = Encoded(vae.encoder)
    cache = open_cache(folder, images.select([5, 3, 2]), vae)
    assert not encoded
    # The file of images 2 and 3 stays, the others' one image that is used is in a new one.
    digests = digest_numbers(images.digests)
    (latents,) = folder.iterdir()
    assert {path.stem for path in latents.iterdir()} == {file_name_of(digests[[2, 3]]), file_name_of(digests[[5]])}
    assert set(before) & set(files(folder)) == {f"{latents.name}/{file_name_of(digests[[2, 3]])}.safetensors"}
    assert not rewritten(before, folder) & set(before)
    for own, row in enumerate([5, 3, 2]):
        assert torch.equal(cache.moments(own), expected[row])
    del cache
    open_cache(folder, images.select([]))
    assert not list(latents.iterdir())


def test_many_small_files_are_put_together(source, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "MAX_SMALL_SHARDS", 3)
    folder, images = tmp_path / "cache", open_source(source)
    expected = [open_cache(tmp_path / "expected", images).moments(i).clone() for i in range(7)]
    for count in (1, 2, 3):
        open_cache(folder, images.select(range(count)), shard_items=None)
        assert len(files(folder)) == count
    for count in (4, 7):
        cache = open_cache(folder, images.select(range(count)), shard_items=None)
        assert len(files(folder)) == {4: 1, 7: 2}[count]
        assert all(torch.equal(cache.moments(i), expected[i]) for i in range(count))
        del cache


def test_no_room_to_rewrite_is_no_error(source, tmp_path, monkeypatch):
    folder, images = tmp_path / "cache", open_source(source)
    open_cache(folder, images)
    before = files(folder)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    cache = open_cache(folder, images.select([5]))
    assert files(folder) == before
    assert len(cache) == 1


def test_files_that_another_run_reads_stay(source, tmp_path, monkeypatch):
    """They are mapped late, and again and again: here after another run would have removed them."""
    monkeypatch.setattr(latent_cache, "FAULT_AROUND", 0)
    monkeypatch.setattr(latent_cache, "MAPPED_BYTES", 2 * 8 * 8 * 8 * 4)
    folder, images = tmp_path / "cache", open_source(source)
    expected = [open_cache(tmp_path / "expected", images).moments(i).clone() for i in range(7)]
    reader = open_cache(folder, images)
    stale = open_cache(folder, images, tiny_vae(seed=1), replace=False)  # another run, with another VAE
    open_cache(folder, images.select([5]))  # would rewrite the one and remove the other
    for i in [0, 6, 3, 1, 5, 2, 4] * 2:
        assert torch.equal(reader.moments(i), expected[i])
        stale.moments(i)
    del reader, stale
    open_cache(folder, images.select([5]))
    (latents,) = folder.iterdir()
    assert [path.stem for path in latents.iterdir()] == [file_name_of(digest_numbers([images.digests[5]]))]


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


def test_a_part_of_which_files_are_missing_is_completed(source, tmp_path):
    folder, images = tmp_path / "cache", open_source(source, flip=0.5)
    open_cache(folder, images)
    expected = shutil.copytree(folder, tmp_path / "expected")
    third = part(folder, "latents") / file_name(images, [4, 5])
    third.unlink()
    before = files(folder)
    vae = tiny_vae()
    encoded = Encoded(vae.encoder)
    open_cache(folder, images, vae)
    assert rewritten(before, folder) == {str(third.relative_to(folder))}
    assert len(encoded) == 4  # two images, as they are and flipped
    assert contents(folder) == contents(expected)


def file_name(images: CaptionedImages, rows: Sequence[int]) -> str:
    """Of the file that holds the latents of these images."""
    return file_name_of(digest_numbers(images.digests)[rows]) + ".safetensors"


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
        while len(list(folder.glob("train-latents-*/*.safetensors"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    latents = part(folder, "latents")
    done = sorted(path.name for path in latents.glob("*.safetensors"))
    assert 2 <= len(done) < 4
    before = files(latents)
    cache = open_cache(folder, open_source(source), text_encoder=tiny_text_encoder())
    left = {file_name(cache.images, rows) for rows in ([0, 1], [2, 3], [4, 5], [6])} - set(done)
    assert rewritten(before, latents) == left
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
    save_file(load_file(path), path, metadata={"fingerprint": "0" * 32})


def rename_another(path: Path) -> None:
    other = next(other for other in path.parent.glob("*.safetensors") if other != path)
    shutil.copy(other, path)


@pytest.mark.parametrize("damage", [truncate, lengthen, scramble_header, take_from_elsewhere, rename_another])
def test_a_damaged_file_is_named_and_its_items_encoded_again(source, tmp_path, damage):
    folder, images = tmp_path / "cache", open_source(source)
    open_cache(folder, images)
    expected = shutil.copytree(folder, tmp_path / "expected")
    path = part(folder, "latents") / file_name(images, [2, 3])
    damage(path)
    before = files(folder)
    vae = tiny_vae()
    encoded = Encoded(vae.encoder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_cache(folder, images, vae)
    what = "is truncated or damaged" if damage in (truncate, lengthen, scramble_header) else "belongs to another cache"
    (warning,) = caught
    assert str(warning.message).startswith(f"{path} {what}")
    assert rewritten(before, folder) == {str(path.relative_to(folder))}
    assert len(encoded) == 2
    assert contents(folder) == contents(expected)


def test_a_damaged_file_that_is_not_needed_is_removed(source, tmp_path):
    folder, images = tmp_path / "cache", open_source(source)
    open_cache(folder, images)
    path = part(folder, "latents") / file_name(images, [6])
    truncate(path)
    with pytest.warns(UserWarning, match=re.escape(f"{path} is truncated or damaged")):
        open_cache(folder, images.select(range(6)))
    assert not path.exists()


# --- refusals ---


def test_random_crops_are_refused(source, tmp_path):
    message = "data.crop random cannot be cached; set train.cache_latents=false or data.crop=center"
    with pytest.raises(ValueError, match=f"^{message}$"):
        open_cache(tmp_path / "cache", open_source(source, crop="random"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused_by_name(source, tmp_path, value):
    """The fifth image alone has one number that is not finite: the files before it are kept."""
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
    assert {path.name for path in latents.iterdir()} == {file_name(images, rows) for rows in ([0, 1], [2, 3])}


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
    assert [len(stored(path, "context")) for path in tmp_path.glob("cache/train-text-*")] == [2]
    assert not list(tmp_path.glob("cache/train-latents-*/*"))


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
    assert not files(folder)
    free = needed
    open_cache(folder, images, text_encoder=encoder)
    (part(folder, "latents") / file_name(images, [0, 1])).unlink()
    free = 2 * 8 * 8 * 8 * 4  # what is there needs no room
    open_cache(folder, images, text_encoder=encoder)
    assert len(files(folder)) == 4 + 3


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

def write(self, digests, tensors, real=Shards.write):
    if broken and "latents" in self.folder.name:
        raise OSError("No space left on device")
    if "latents" in self.folder.name:
        own = digest_numbers(images.digests).tolist()
        written.append([own.index(digest) for digest in digests])
    return real(self, digests, tensors)

def report(*words):  # a line in one piece, as two processes write at once
    os.write(1, (" ".join(map(str, ["rank", rank, "start", start, *words])) + "\\n").encode())

Shards.write = write
images = open_source(source)
for start in (1, 2):
    try:
        open_cache(folder, images, vae, tiny_text_encoder())
        report(sorted(written))
    except (OSError, ValueError) as error:
        report(error)
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
        f"rank 0 start 1 {failed}",
        "rank 0 start 2 [[2, 3]]",
        "rank 1 start 1 No space left on device",
        "rank 1 start 2 [[6]]",
    ]
    assert contents(tmp_path / "one") == contents(two)


@pytest.mark.runs
def test_two_runs_that_share_a_folder_encode_an_image_once(source, tmp_path, capsys):
    """One encodes five images, slowly; the other one, of all seven, waits for it and encodes the two that are left.

    A third one, of images that are there already, does not wait.
    """
    folder, images = tmp_path / "cache", open_source(source)
    open_cache(folder, images.select([4]), replace=False)
    code = script(folder, source) + "vae.encoder.register_forward_pre_hook(lambda *_: time.sleep(1.5))\n"
    code += "open_cache(folder, open_source(source).select(range(5)), vae, replace=False)\n"
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    try:
        while len(files(folder)) < 3:  # image 4, the lock, the first two images
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        vae = tiny_vae()
        encoded = Encoded(vae.encoder)
        open_cache(folder, images.select([4]), vae)  # neither does it remove what the others need
        assert not encoded and process.poll() is None
        cache = open_cache(folder, images, vae, replace=False)
        assert len(encoded) == 2
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    (latents,) = folder.iterdir()
    assert out.decode() == "latents: 4 new of 5 encoded\n" and process.returncode == 0
    assert capsys.readouterr().out.splitlines() == [
        "latents: 1 new of 1 encoded",
        "latents: 0 new of 1 encoded",
        f"waiting for another run, which writes to {latents}",
        "latents: 2 new of 7 encoded",
    ]
    expected = open_cache(tmp_path / "expected", images)
    assert all(torch.equal(cache.moments(i), expected.moments(i)) for i in range(7))
    assert not list(latents.glob(".*"))
