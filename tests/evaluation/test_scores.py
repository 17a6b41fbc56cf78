"""Rates, and the table of scores."""

from dataclasses import dataclass

import pytest

from latentdiff.evaluation.scores import Rate, Score, markdown_table


def test_intervals_are_wilsons():
    """Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    assert Rate(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Rate(0, 20).interval == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert str(Rate(0, 20)) == "0 / 20 (0% .. 16%)"


def test_table_of_scores():
    @dataclass(frozen=True, kw_only=True)
    class Example(Score):
        whole: Rate
        part: Rate

    one = Example(whole=Rate(0, 20), part=Rate(5, 20), copies=3, psnr=12.34)
    assert markdown_table([("first", one.cells()), ("second", one.cells() | {"part": "any"})], "kind").splitlines() == [
        "| kind | whole | part | copies | PSNR to the truth (dB) |",
        "| --- | --- | --- | --- | --- |",
        "| first | 0 / 20 (0% .. 16%) | 5 | 3 | 12.3 |",
        "| second | 0 / 20 (0% .. 16%) | any | 3 | 12.3 |",
    ]
