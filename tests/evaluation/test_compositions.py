"""Scores on the compositional set: images whose scores are known."""

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from latentdiff.config import COMPOSITIONS, DataConfig
from latentdiff.data.compositions import Composition, CompositionSet, Figure, compositions, render
from latentdiff.evaluation.compositions import (
    best_copy,
    evaluate_compositions,
    nearest_compositions,
    nearest_training_images,
    score,
    some_of,
)
from latentdiff.evaluation.metrics import psnr
from latentdiff.images import to_pixels

FAMILY = CompositionSet(("apple", "cat", "rocket"), pairs=80)
SIZE = 32


def held_out(figures: int, count: int) -> list[Composition]:
    return some_of([one for one in compositions(FAMILY, "held_out") if len(one.figures) == figures], count)


@pytest.mark.parametrize("figures", [1, 2])
def test_true_images_are_exact_and_copies_are_not(figures):
    wanted = held_out(figures, 8)
    truth = score(FAMILY, wanted, [render(one, SIZE) for one in wanted])
    assert [rate.hits for rate in (truth.exact, truth.style, truth.object, truth.colour, truth.background)] == [8] * 5
    assert (truth.copies, truth.psnr) == (0, 100.0)
    copies = score(FAMILY, wanted, [best_copy(one, SIZE) for one in wanted])
    assert (copies.exact.hits, copies.colour.hits) == (0, 0)
    assert [rate.hits for rate in (copies.style, copies.object, copies.background)] == [8] * 3
    assert copies.psnr < 40
    if figures == 1:  # all trained ones of one figure are there; of two, a random choice
        assert copies.copies == 8


def test_each_property_is_scored_by_itself():
    wanted = Composition("noto", (Figure("apple", "blue"),), "yellow")
    others = [
        Composition("fluent flat", (Figure("apple", "blue"),), "yellow"),
        Composition("noto", (Figure("cat", "blue"),), "yellow"),
        Composition("noto", (Figure("apple", "green"),), "yellow"),
        Composition("noto", (Figure("apple", "blue"),), "grey"),
    ]
    result = score(FAMILY, [wanted] * 4, [render(one, SIZE) for one in others])
    assert result.exact.hits == 0
    assert [rate.hits for rate in (result.style, result.object, result.colour, result.background)] == [3] * 4
    assert result.copies == 2  # a blue cat and a green apple were trained on
    free = score(FAMILY, [wanted] * 4, [render(one, SIZE) for one in others], any_style=True)
    assert free.exact.hits == 1


def test_figures_in_each_others_places_are_wrong():
    wanted = Composition("noto", (Figure("apple", "blue"), Figure("cat", "green")), "white")
    swapped = Composition("noto", wanted.figures[::-1], "white")
    result = score(FAMILY, [wanted], [render(swapped, SIZE)])
    assert (result.exact.hits, result.object.hits, result.colour.hits, result.background.hits) == (0, 0, 0, 1)


def test_the_nearest_is_found_through_noise():
    wanted = held_out(2, 6)
    noise = np.random.default_rng(0).normal(0, 25, (6, SIZE, SIZE, 3))
    noisy = [
        (np.asarray(render(one, SIZE)) + n).clip(0, 255).astype(np.uint8) for one, n in zip(wanted, noise, strict=True)
    ]
    pixels = np.stack(noisy).transpose(0, 3, 1, 2) / 127.5 - 1
    assert nearest_compositions(FAMILY, torch.tensor(pixels, dtype=torch.float32), 2) == wanted


def test_nearest_training_image_and_the_floor():
    """By hand, over all training images."""
    (wanted,) = held_out(1, 1)
    truth = to_pixels(render(wanted, SIZE))
    everything = [render(one, SIZE) for one in compositions(FAMILY, "train")]
    distances = [(to_pixels(image) - truth).square().sum().item() for image in everything]
    expected = everything[int(np.argmin(distances))]
    assert nearest_training_images(FAMILY, [render(wanted, SIZE)])[0].tobytes() == expected.tobytes()
    floor = psnr(truth[None], to_pixels(best_copy(wanted, SIZE))[None]).item()
    assert 10 < floor <= psnr(truth[None], to_pixels(expected)[None]).item() + 1e-4


@pytest.mark.runs
def test_report_of_a_pipeline():
    data = DataConfig(holdout=0, source=COMPOSITIONS, size=16, objects=FAMILY.objects, pairs=16)
    pipeline = tiny_pipeline()
    report = evaluate_compositions(pipeline, data, count=2, seed=7, batch_size=2, progress=False)
    names = ["held-out prompts", "the same without a style", "trained prompts", "ceiling: reconstructions"]
    names.append("floor: best copies")
    assert [row.name for row in report.rows] == names + [f"two objects, {name}" for name in names]
    assert {row.score.exact.total for row in report.rows} == {2}
    (composition, image), *_ = report.first(4)
    alone = pipeline(composition.prompt, seed=7, height=16, width=16, progress=False).images[0]
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(image)).max() <= 1
    assert [len(one.figures) for one, _ in report.first(4)] == [1, 1, 2, 2]
    assert (
        report.table().count("\n") == 11
        and "| floor: best copies | 0 / 2 (0% .. 66%) | 2 | 2 | 0 | 2 |" in report.table()
    )
    with pytest.raises(ValueError, match="^0 prompts asked for, must be at least 1$"):
        evaluate_compositions(pipeline, data, 0, 0, 2, progress=False)
