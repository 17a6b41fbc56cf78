"""benchmarks/learning/memorisation.py: what counts as a copy, and when copying begins."""

import pytest
import torch

from benchmarks.learning.memorisation import copies, onset, table


def test_a_copy_is_three_times_nearer_than_the_second_image() -> None:
    training = torch.tensor([[0.0], [4.0], [9.0]])
    assert copies(torch.tensor([[0.9]]), training) == 1  # 0.9 away from one, 3.1 from the other
    assert copies(torch.tensor([[1.1]]), training) == 0  # 1.1 and 2.9
    assert copies(torch.tensor([[4.0], [8.9], [6.5]]), training) == 2


def test_onset_lies_between_two_measurements() -> None:
    rows = [
        {"images": 8, "step": step, "epochs": 8.0 * step, "held_out_loss": loss, "copies": count, "samples": 40}
        for step, loss, count in [(100, 0.5, 0), (200, 0.3, 2), (300, 0.4, 10)]
    ]
    # From 5 % at 200 to 25 % at 300: 10 % are reached a quarter of the way.
    assert onset(rows) == pytest.approx(225)
    assert onset(rows[:2]) is None
    lines = table(rows).splitlines()
    assert lines[2] == "| 8 | 200 | 225 | 1800 | 10 / 40 at 300 |"
    assert table(rows[:2]).splitlines()[2] == "| 8 | 200 | never |  | 2 / 40 at 200 |"
