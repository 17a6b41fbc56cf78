"""Scores on a set of styles and objects: by hand on flat images, and a pipeline's report."""

import datasets
import numpy as np
import pytest
import torch
from image_sets import png_rows
from PIL import Image
from tiny import tiny_pipeline

from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.styles import TrueImages, evaluate_styles, held_out_pairs
from latentdiff.images import to_images

# (style, object): the grey level of its image
TRAINED = {
    ("flat", "apple"): 0,
    ("round", "apple"): 60,
    ("flat", "bus"): 200,
    ("sharp", "bus"): 240,
    ("sharp", "cat"): 255,
}
HELD_OUT = {("sharp", "apple"): 40, ("round", "bus"): 190}


def grey(level: int) -> np.ndarray:
    return np.full((16, 16, 3), level, np.uint8)


def styled(levels: dict[tuple[str, str], int], **config: object) -> CaptionedImages:
    columns = {
        "image": png_rows([grey(level) for level in levels.values()]),
        "text": [f"{style} style, {label}" for style, label in levels],
        "style": [style for style, _ in levels],
        "label": [label for _, label in levels],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    return CaptionedImages(table, DataConfig(**{"source": "memory", "size": 16} | config), 3, seed=0)


@pytest.fixture
def true() -> TrueImages:
    return TrueImages.of(styled(TRAINED), styled(HELD_OUT), batch_size=2)


def images(*levels: int) -> list[Image.Image]:
    return [Image.fromarray(grey(level)) for level in levels]


APPLE, BUS = 5, 6  # the held-out ones, after the five trained ones


def test_scores_by_hand(true):
    assert true.prompts[APPLE:] == ["sharp style, apple", "round style, bus"]
    truth = true.score([APPLE, BUS], images(40, 190))
    assert (truth.pair.hits, truth.style.hits, truth.object.hits, truth.copies, truth.psnr) == (2, 2, 2, 0, 100.0)
    # 45: the truth is nearest; 53: the apple of another style; 244: its style, but the bus; 5: a flat apple.
    other = true.score([APPLE] * 4, images(45, 53, 244, 5))
    assert (other.pair.hits, other.style.hits, other.object.hits, other.copies) == (1, 2, 3, 3)
    decibels = [20 * np.log10(255 / abs(level - 40)) for level in (45, 53, 244, 5)]
    assert other.psnr == pytest.approx(np.mean(decibels), abs=1e-3)
    assert other.pair.total == other.style.total == 4
    # The nearest true image may be another held-out one, which is wrong but no copy.
    wrong = true.score([APPLE], images(189))
    assert (wrong.pair.hits, wrong.style.hits, wrong.object.hits, wrong.copies) == (0, 0, 0, 0)


def test_floors_by_hand(true):
    assert true.in_other_styles(APPLE) == [0, 1] and true.in_other_styles(BUS) == [2, 3]
    assert true.best_copy(APPLE) == 1 and true.best_copy(BUS) == 2
    mean = true.mean_of_other_styles(APPLE)
    torch.testing.assert_close(mean, torch.full((3, 16, 16), 30 / 127.5 - 1))
    floor = true.score([APPLE, BUS], to_images(torch.stack([true.mean_of_other_styles(i) for i in (APPLE, BUS)])))
    assert (floor.pair.hits, floor.style.hits, floor.object.hits, floor.copies) == (1, 1, 2, 1)  # 30 and 220


def test_nearest_training_image_is_never_a_held_out_one(true):
    assert true.nearest_trained(images(40, 190, 254)) == [1, 2, 4]


def test_what_is_a_held_out_pair():
    """The pair was not trained on, its object was."""
    training = styled(TRAINED)
    assert held_out_pairs(training, styled(HELD_OUT)) == [0, 1]
    assert held_out_pairs(training, styled({("flat", "bus"): 0, ("sharp", "apple"): 1, ("flat", "dog"): 2})) == [1]
    without_captions = styled(TRAINED)
    without_captions.captioned = False
    assert held_out_pairs(without_captions, styled(HELD_OUT)) == []
    held_out = styled(HELD_OUT)
    held_out.table = held_out.table.remove_columns("style")
    assert held_out_pairs(training, held_out) == []


@pytest.mark.runs
def test_report_of_a_pipeline():
    pipeline = tiny_pipeline()
    report = evaluate_styles(pipeline, styled(TRAINED), styled(HELD_OUT), 9, seed=7, batch_size=1, progress=False)
    names = ["held-out prompts", "trained prompts", "ceiling: reconstructions"]
    names += ["floor: means of the object's other styles", "floor: best copies"]
    assert [name for name, _ in report.rows] == names == list(report.to_json())
    assert {score.pair.total for _, score in report.rows} == {2}
    assert report.table().splitlines()[-1].startswith("| floor: best copies | 0 / 2 (0% .. 66%) | 0 | 2 | 2 | ")
    assert list(report.curve()) == ["pair", "style", "object", "copies", "PSNR to the truth (dB)", "trained pairs"]
    (example,) = report.some(1)
    assert example.prompt == "sharp style, apple" and example.truth.getpixel((0, 0)) == (40, 40, 40)
    alone = pipeline(example.prompt, seed=7, height=16, width=16, progress=False).images[0]
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(example.generated)).max() <= 1
    with pytest.raises(ValueError, match="^0 prompts asked for, must be at least 1$"):
        evaluate_styles(pipeline, styled(TRAINED), styled(HELD_OUT), 0, 0, 2, progress=False)
