"""Unet inputs."""

import pytest

from latentdiff.training.unet_inputs import caption_dropout_at


def test_caption_dropout_over_the_steps():
    """A single fraction is constant, a pair is linear and reaches its second value at the last step."""
    assert [caption_dropout_at(step, 4, 0.3) for step in range(4)] == [0.3] * 4
    fractions = [caption_dropout_at(step, 10, (1.0, 0.1)) for step in range(12)]
    assert fractions == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1], rel=1e-12)
    assert caption_dropout_at(0, 1, (1.0, 0.1)) == 1.0
