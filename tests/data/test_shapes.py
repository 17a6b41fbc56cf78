"""Aspect-ratio buckets: which shapes there are, which image goes where, in which order, and what is reported."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_sets import mixed_folder
from PIL import Image, ImageOps
from safetensors.torch import load_file
from tiny import tiny_vae, tokenizer

from latentdiff.config import DataConfig
from latentdiff.data.batches import BatchPlan, Key, StepBatches, loader
from latentdiff.data.captioned_images import CaptionedImages, describe_images, open_images
from latentdiff.data.latent_cache import LatentCache, encode_means
from latentdiff.data.shapes import Layout, bucket_shapes, choose_layout, cut_away, nearest_shape
from latentdiff.images import View, to_pixels
from latentdiff.randomness import Stream, generator


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def config(**keys: object) -> DataConfig:
    return DataConfig(**{"source": "memory", "size": 16, "holdout": 0} | keys)


def opened(folder: Path, multiple: int = 4, batch_size: int = 4, **keys: object) -> list[CaptionedImages]:
    data = config(source=str(folder), **keys)
    return [*open_images(data, 3, 0, False, multiple=multiple, batch_size=batch_size)]


# --- shapes ---


def test_bucket_shapes():
    """By hand: sides in steps of 64 (512 / 8), of 16 (a network's) and of 8 (the largest divisor that is no more)."""
    wide = [(384, 640), (384, 704), (448, 576)]  # 6 x 11, 6 x 10 and 7 x 9 of 8 x 8 steps
    assert bucket_shapes(512, 64) == (*wide, (512, 512), (576, 448), (640, 384), (704, 384))
    assert bucket_shapes(64, 16) == ((48, 80), (48, 96), (64, 64), (80, 48), (96, 48))
    assert bucket_shapes(64, 4)[:3] == ((48, 80), (48, 88), (56, 72))
    assert bucket_shapes(16, 16) == ((16, 16),)
    for size, multiple in [(16, 2), (24, 2), (72, 8), (104, 8), (256, 32), (1024, 64)]:
        shapes = bucket_shapes(size, multiple)
        assert (size, size) in shapes and {(w, h) for h, w in shapes} == set(shapes)
        for h, w in shapes:
            assert h % multiple == 0 and w % multiple == 0
            assert max(h, w) <= 2 * min(h, w) and h * w == pytest.approx(size**2, rel=0.15)


def test_an_image_goes_to_the_bucket_that_keeps_most_of_it():
    """The nearest by the logarithm of the aspect ratio, which is also what loses fewest pixels."""
    shapes = bucket_shapes(64, 4)
    draw = np.random.default_rng(0)
    for h, w in draw.integers(1, 4000, (300, 2)).tolist():
        distances = [abs(math.log(h / w) - math.log(a / b)) for a, b in shapes]
        nearest = nearest_shape((h, w), shapes)
        assert distances[shapes.index(nearest)] == pytest.approx(min(distances), abs=1e-12)
        assert cut_away((h, w), nearest) == pytest.approx(1 - math.exp(-min(distances)))
    assert cut_away((100, 50), (64, 64)) == 0.5 and cut_away((50, 100), (48, 96)) == 0
    assert cut_away((300, 400), (64, 64)) == pytest.approx(0.25)


def test_pixels_are_of_the_images_own_bucket(tmp_path):
    """An image that EXIF turns by 90 degrees is of the bucket of what is seen."""
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = mixed_folder(tmp_path / "set", {"square": (20, 20, 4), "wide": (24, 40, 4), "tall": (40, 24, 3)})
    turned.save(folder / "turned.png", exif=exif)
    (folder / "metadata.jsonl").unlink()
    images, _ = opened(folder, captions="none")
    names = {Path(images.name(i)).stem: i for i in range(len(images))}
    shapes = {name: images.shape(i) for name, i in names.items()}
    assert shapes["square_0"] == (16, 16) and shapes["wide_0"] == (12, 20) and shapes["tall_0"] == (20, 12)
    assert shapes["turned"] == (20, 12)
    for name, i in names.items():
        assert images.pixels(i).shape == (3, *shapes[name])
    upright = turned.rotate(-90, expand=True)
    crop = ImageOps.fit(upright, (12, 20), Image.Resampling.LANCZOS, centering=(0.2, 0.9))
    assert torch.equal(images.pixels(names["turned"], View((0.2, 0.9), flip=True)), to_pixels(ImageOps.mirror(crop)))
    assert [len(group) for group in images.by_shape()] == [4, 4, 4]
    for indices, pixels in images.batches(3):
        assert pixels.shape[2:] == images.shape(indices[0]) and len({images.shape(i) for i in indices}) == 1
    batches = [indices for indices, _ in images.batches(3)]
    assert sorted(sum(batches, [])) == list(range(12)) and [len(indices) for indices in batches] == [3, 1] * 3
    assert [indices for indices, _ in images.batches(3, 1, 2)] == batches[1::2]
    assert images.first(12).shape == (12, 3, 16, 16)
    assert images.some(5).layout == images.layout


# --- which layout ---

SQUARE, WIDE, TALL = (60, 60), (60, 100), (100, 60)


@pytest.mark.parametrize(
    ("originals", "keys", "shapes"),
    [
        ([SQUARE] * 9, {}, [(64, 64)]),
        ([SQUARE] * 9, {"buckets": True}, [(64, 64)]),
        ([SQUARE] * 10 + [WIDE], {}, [(64, 64)]),  # squares lose 40 % of one image in eleven: 3.6 %
        ([SQUARE] * 5 + [WIDE], {}, [(48, 80), (64, 64)]),  # 6.7 %
        ([SQUARE] * 5 + [WIDE], {"buckets": False}, [(64, 64)]),
        ([SQUARE] * 5 + [WIDE], {"size": (48, 80)}, [(48, 80)]),
        ([WIDE] * 9, {}, [(64, 64)]),  # of one shape: what is generated by default stays what was trained
        ([WIDE] * 9, {"buckets": True}, [(48, 80)]),
        ([TALL, WIDE, SQUARE], {}, [(48, 80), (64, 64), (80, 48)]),
    ],
)
def test_when_there_are_buckets(originals, keys, shapes):
    assert choose_layout(config(**{"size": 64} | keys), originals, 16, 1) == Layout(tuple(shapes))


def test_buckets_too_small_for_a_batch():
    """The smallest goes first, and its images to the nearest of the others."""
    very_wide = (50, 100)
    originals = [very_wide] * 2 + [WIDE] * 3 + [SQUARE] * 6 + [TALL] * 5
    layout = choose_layout(config(size=64), originals, 16, 5)
    assert layout == Layout(((48, 80), (64, 64), (80, 48)), (((48, 96), 2),))  # 2 + 3 wide ones are enough
    layout = choose_layout(config(size=64, buckets=True), originals, 16, 6)
    assert layout == Layout(((64, 64),), (((48, 96), 2), ((48, 80), 5), ((80, 48), 5)))
    assert len(choose_layout(config(size=64, repeat=3), originals, 16, 6).shapes) == 4
    assert choose_layout(config(size=64), originals, 16, 17).shapes == ((64, 64),)


# --- order ---

BUCKETS = [[0, 3, 5, 6, 9], [1, 2, 4, 7, 8, 10, 11, 12], [*range(13, 24)]]


def simulated(batch_size: int, epochs: int, seed: int) -> list[list[Key]]:
    """Batches of whole epochs, one after another, with a queue of images for each bucket."""
    queues: list[list[tuple[int, int]]] = [[] for _ in BUCKETS]  # (epoch of the bucket, image)
    filled, owed, steps = [0] * len(BUCKETS), [0] * len(BUCKETS), []
    for epoch in range(epochs):
        turns = []
        for b, images in enumerate(BUCKETS):
            order = torch.randperm(len(images), generator=generator(seed, Stream.ORDER, epoch, b)).tolist()
            queues[b] += [(epoch, images[place]) for place in order]
            owed[b] += len(images)
            while owed[b] >= batch_size:
                owed[b] -= batch_size
                turns.append(b)
        order = torch.randperm(len(turns), generator=generator(seed, Stream.BUCKETS, epoch)).tolist()
        for b in [turns[place] for place in order]:
            batch, queues[b] = queues[b][:batch_size], queues[b][batch_size:]
            filled[b] += 1
            step = len(steps)
            steps.append([Key(index=i, epoch=e, step=step, sample_index=s) for s, (e, i) in enumerate(batch)])
    return steps


def keys_of(plan: BatchPlan, start: int, stop: int, seed: int = 5) -> list[list[Key]]:
    """The global batches of the steps, put together from all processes."""
    steps: dict[int, list[Key]] = {step: [] for step in range(start, stop)}
    for rank in range(plan.processes):
        for keys in StepBatches(24, plan, rank, seed, start, stop, buckets=BUCKETS):
            steps[keys[0]["step"]] += keys
    return [sorted(keys, key=lambda key: key["sample_index"]) for keys in steps.values()]


def test_order_is_that_of_a_simulation():
    expected = simulated(4, 12, seed=5)
    assert len(expected) == 12 * 5 // 4 + 12 * 2 + 12 * 11 // 4
    assert keys_of(BatchPlan(4, 4, 1), 0, len(expected)) == expected
    for plan in (BatchPlan(4, 2, 2), BatchPlan(4, 1, 2), BatchPlan(4, 1, 4)):
        for start in (0, 1, 17, 40):
            assert keys_of(plan, start, 60) == expected[start:60]
    batches = StepBatches(24, BatchPlan(4, 1, 2), 1, 5, 0, 1, buckets=BUCKETS)
    for step in (59, 3, 30, 0):
        assert batches.global_batch(step) == [key["index"] for key in expected[step]]
    for b, images in enumerate(BUCKETS):
        seen = [key for keys in expected for key in keys if key["index"] in images]
        whole = len(seen) // len(images)
        assert Counter((key["epoch"], key["index"]) for key in seen[: whole * len(images)]) == Counter(
            (epoch, index) for epoch in range(whole) for index in images
        ), b


def test_epochs_without_a_batch_are_skipped():
    """Three images and batches of four, with repeat: a bucket has no batch in some epochs."""
    plan = BatchPlan(4, 4, 1)
    batches = StepBatches(6, plan, 0, 0, 0, 9, repeat=2, buckets=[[0, 1, 2], [3, 4, 5]])
    turns = [batches.turn(step) for step in range(6)]  # epochs 0 to 3: no batch, and then both buckets one
    assert [sorted(turns[i : i + 2]) for i in (0, 2, 4)] == [[(0, n), (1, n)] for n in range(3)]
    keys = [key for step in batches for key in step if key["index"] < 3][:12]
    assert Counter((key["epoch"], key["index"]) for key in keys) == Counter((e, i) for e in range(4) for i in range(3))


def test_one_bucket_is_the_order_without():
    plan = BatchPlan(8, 2, 2)
    plain, one = (list(StepBatches(13, plan, 1, 3, 2, 9, buckets=b)) for b in (None, [range(13)]))
    assert plain == one


# --- cache ---


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_the_cache_of_buckets_gives_what_encoding_gives(tmp_path, flip):
    folder = mixed_folder(tmp_path / "set", {"square": (20, 20, 5), "wide": (24, 40, 6), "tall": (40, 24, 4)})
    images, _ = opened(folder, flip=flip)
    vae = tiny_vae()

    def cached(images: CaptionedImages) -> LatentCache:
        options = {"batch_size": 3, "accelerator": Accelerator(cpu=True), "progress": False, "replace": True}
        return LatentCache.open(tmp_path / "cache", "train", images, vae, tokenizer(), None, shard_items=2, **options)

    cache = cached(images)
    latents = sorted((tmp_path / "cache").glob("train-latents-*"))
    shapes = [list(load_file(next(part.iterdir()))["moments"].shape[1:]) for part in latents]
    views = 2 if flip else 1
    assert sorted(shapes) == [[views, 8, 6, 10], [views, 8, 8, 8], [views, 8, 10, 6]]
    batches = StepBatches(15, BatchPlan(4, 2, 1), 0, 0, 0, 8, buckets=images.by_shape())
    seen = set()
    for own, online in zip(loader(cache, batches, 0, False), loader(images, batches, 0, False), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(own["moments"], vae.encode(online["pixels"]), atol=1e-5, rtol=1e-5)
        assert own["captions"] == [images.captions[i] for i in online["index"]]
        seen.add(own["moments"].shape[2:])
    assert seen == {(6, 10), (8, 8), (10, 6)}
    # One image more of one shape, which comes first there: that alone is encoded.
    extra = Image.fromarray(np.full((24, 40, 3), 128, np.uint8))
    extra.save(folder / "wide.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "wide.png", "text": "grey"}) + "\n")
    encoded = []
    hook = vae.encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(inputs[0]))
    before = {path for part in latents for path in part.iterdir()}
    images, _ = opened(folder, flip=flip)
    more = cached(images)
    hook.remove()
    assert len(more) == 16 and sorted((tmp_path / "cache").glob("train-latents-*")) == latents
    (new,) = {path for part in latents for path in part.iterdir()} - before
    assert len(load_file(new)["moments"]) == 1
    assert len(encoded) == views and all(torch.equal(batch, batch[:1].expand_as(batch)) for batch in encoded)
    for index in range(16):
        with torch.no_grad():
            expected = vae.encode(images.pixels(index)[None])[0]
        torch.testing.assert_close(more.moments(index)[0], expected, atol=1e-5, rtol=1e-5)


def test_means_are_in_the_order_of_the_images(tmp_path):
    images, _ = opened(mixed_folder(tmp_path / "set", {"square": (20, 20, 4), "wide": (24, 40, 5)}))
    vae = tiny_vae()
    with torch.no_grad():
        for i, mean in enumerate(encode_means(vae, images, 2)):
            expected = vae.sample(vae.encode(images.pixels(i)[None]))[0]
            torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)


# --- what is reported and left out ---


def lines(folder: Path, batch_size: int = 3, **keys: object) -> list[str]:
    """Without what is said of files and captions."""
    images, held_out = opened(folder, batch_size=batch_size, **keys)
    said = describe_images(images, held_out, batch_size).replace(f"{folder}/", "").splitlines()
    assert len(images.notes) == 2
    return said[2:]


def test_what_is_said_at_the_start(tmp_path):
    """Of 4 squares and 4 images of 3 : 5, squares lose 40 % of the latter; two squares are enlarged."""
    folder = mixed_folder(tmp_path / "set", {"square": (20, 20, 2), "wide": (24, 40, 4), "small": (8, 8, 2)})
    enlarged = "2 images of less than the training size, enlarged by 2 at most (small_0.png, 8 x 8 px); "
    enlarged += "data.min_size leaves such images out"
    assert lines(folder, batch_size=4) == [
        "8 training images, 0 held out, 2 buckets",
        "buckets (height x width: images): 12 x 20: 4, 16 x 16: 4; data.buckets is null, and 20 % of the pixels would "
        "be lost by squares",
        enlarged,
    ]
    assert lines(folder, batch_size=9, buckets=False)[1] == (
        "train.batch_size is 9, more than there are: a step sees some images several times; 8 would take less time"
    )
    assert lines(folder, buckets=False) == [
        "8 training images, 0 held out, 16 px",
        "crops cut away 20 % of the pixels on average, at most 40 % (wide_0.png); data.buckets=true keeps more",
        enlarged,
    ]
    assert lines(folder, size=(12, 20))[:2] == [
        "8 training images, 0 held out, 12 x 20 px (height x width)",
        "crops cut away 20 % of the pixels on average, at most 40 % (square_0.png)",
    ]
    assert lines(folder, batch_size=5)[0] == "8 training images, 0 held out, 16 px"
    for buckets in (True, None):
        assert lines(folder, batch_size=5, buckets=buckets)[1:3] == [
            "buckets with fewer images than a batch, whose images went to others: 12 x 20: 4",
            "crops cut away 20 % of the pixels on average, at most 40 % (wide_0.png)",
        ]
    wide = mixed_folder(tmp_path / "wide", {"wide": (24, 40, 4)})
    assert lines(wide)[1].endswith("(wide_0.png); data.size=[12, 20] is nearer to their shape")
    squares = mixed_folder(tmp_path / "squares", {"square": (20, 20, 3)})
    assert lines(squares) == ["3 training images, 0 held out, 16 px"]


def test_small_images_are_left_out_with_a_warning(tmp_path):
    folder = mixed_folder(tmp_path / "set", {"large": (20, 30, 3), "low": (12, 40, 6), "tiny": (15, 15, 1)})
    images, _ = opened(folder, min_size=12)
    assert len(images) == 10
    with pytest.warns(UserWarning) as warnings:
        images, held_out = opened(folder, min_size=16, holdout=1)
    (warning,) = warnings
    names = ", ".join(str(folder / f"low_{i}.png") for i in range(5))
    start = f"7 of 10 images of {str(folder)!r} have a side of less than 16 px (data.min_size): "
    assert str(warning.message) == f"{start}{names}, ...; skipped"
    left = sorted(Path(part.name(i)).stem for part in (images, held_out) for i in range(len(part)))
    assert left == ["large_0", "large_1", "large_2"]
    assert sorted(images.captions + held_out.captions) == left
    with pytest.raises(ValueError) as error:
        opened(folder, min_size=21)
    assert str(error.value) == (
        f"10 of 10 images of {str(folder)!r} have a side of less than 21 px; data.min_size must be at most 20, the "
        "longest of their shorter sides"
    )
