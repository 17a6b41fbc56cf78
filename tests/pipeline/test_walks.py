"""Interpolation between prompts and seeds, and variations of one image."""

import math

import numpy as np
import pytest
import torch
from samples import PROMPT, array, difference, options
from tiny import normal

from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.start import slerp
from latentdiff.pipeline.walks import interpolate, variations


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for fraction in (0.0, 0.25, 0.5, 1.0):
        angle = fraction * math.pi / 2
        expected = 2 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(slerp(a, b, fraction), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    noise = normal(4, 32, 32, seed=1), normal(4, 32, 32, seed=2)
    assert slerp(*noise, 0.5).std() == pytest.approx(1, abs=0.03)  # a straight line would have 0.71


def test_interpolation_ends_at_the_two_images(pipeline: LatentDiffusionPipeline) -> None:
    common = options(negative_prompt="blue")
    del common["seed"]
    output = interpolate(pipeline, (PROMPT, "green boat at night"), (3, 9), 5, **common)
    assert len(output) == 5
    assert difference(output[0], pipeline(PROMPT, seed=3, **common)[0]) <= 1
    assert difference(output[4], pipeline("green boat at night", seed=9, **common)[0]) <= 1
    steps = [np.abs(array(a) - array(b)).mean() for a, b in zip(output, output[1:], strict=False)]
    assert max(steps) < np.abs(array(output[0]) - array(output[4])).mean()


def test_variations(pipeline: LatentDiffusionPipeline) -> None:
    common = options()
    del common["seed"]
    base = pipeline(PROMPT, seed=3, **common)[0]
    same = variations(pipeline, PROMPT, 3, 2, 0.0, **common)
    assert all(difference(image, base) <= 1 for image in same)
    near, far = (variations(pipeline, PROMPT, 3, 4, amount, **common) for amount in (0.1, 1.0))
    distances = [np.mean([np.abs(array(i) - array(base)).mean() for i in images]) for images in (near, far)]
    assert 0 < distances[0] < 0.6 * distances[1]
    others = pipeline(PROMPT, seed=[4, 5, 6, 7], num_images_per_prompt=4, **common)
    assert all(difference(a, b) <= 1 for a, b in zip(far, others, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: interpolate(p, ("a",), (1, 2)), "prompts is .*, must be two: where to start and"),
        (lambda p: interpolate(p, ("a", "b"), (1, 2, 3)), "is .*, must be two: where to start and where to end"),
        (lambda p: interpolate(p, "ab", (1, 2)), "is .*, must be two: where to start and where to end"),
        (lambda p: interpolate(p, ("a", "b"), (1, 2), 1), "frames is 1, must be at least 2"),
        (lambda p: variations(p, "a", 1, 0), "count is 0, must be at least 1"),
        (lambda p: variations(p, "a", 1, 2, 1.5), r"amount is 1.5, must be in 0 \.\. 1"),
    ],
)
def test_wrong_ways_between_images(pipeline: LatentDiffusionPipeline, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(pipeline)


def test_interpolation_goes_between_negative_prompts_too(pipeline: LatentDiffusionPipeline) -> None:
    common = options()
    del common["seed"]
    output = interpolate(pipeline, (PROMPT, "a boat"), (3, 9), 3, negative_prompt=["blue", "green fox"], **common)
    for frame, prompt, seed, negative in [(0, PROMPT, 3, "blue"), (2, "a boat", 9, "green fox")]:
        assert difference(output[frame], pipeline(prompt, seed=seed, negative_prompt=negative, **common)[0]) <= 1
