"""Randomness."""

import os
import subprocess
import sys

import pytest
import torch

from latentdiff.data.batches import BatchPlan, StepBatches
from latentdiff.randomness import Stream, logit_normal_quantiles, normal, seed_for, spread_timesteps, uniform

# BLAKE2b of the numbers as little-endian 64-bit integers, its 8 bytes as a little-endian integer, less the last bit.
SEEDS = {
    (0,): 893442142816765029,
    (0, 5, 0, 0): 8044598539339383266,
    (1, 2, 3): 6520558355739401531,
    (-1,): 1623352975185328750,
    (2**63 - 1, 5, 10**6, 255): 2177241496898798761,
}


STREAMS = ["INIT", "ORDER", "CROP_FLIP", "POSTERIOR", "TIMESTEPS", "NOISE", "CAPTION_DROPOUT", "HOLDOUT", "TEXT_INIT"]


def test_seeds_equal_recorded_values():
    """A changed value would change what every run with a given seed does, and break its resume."""
    assert {numbers: seed_for(*numbers) for numbers in SEEDS} == SEEDS
    assert [Stream(number).name for number in range(len(STREAMS))] == STREAMS


@pytest.mark.runs
def test_seeds_do_not_depend_on_the_process():
    code = "from latentdiff.randomness import seed_for; print([seed_for(*n) for n in {}])"
    answer = subprocess.run(
        [sys.executable, "-c", code.format(list(SEEDS))],
        env=os.environ | {"PYTHONHASHSEED": "123"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == f"{list(SEEDS.values())}\n"


def test_seeds_differ():
    grid = {seed_for(a, b) for a in range(50) for b in range(50)}
    lengths = {seed_for(*[0] * n) for n in range(10)}
    assert len(grid) == 2500 and len(lengths) == 10
    assert all(0 <= seed < 2**63 for seed in grid)


DRAWS = {
    "normal": lambda stream, step, sample_indices, seed=0: normal((3, 2, 2), seed, stream, step, sample_indices),
    "uniform": lambda stream, step, sample_indices, seed=0: uniform(seed, stream, step, sample_indices),
}


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_depend_on_the_sample_index_alone(name):
    draw = DRAWS[name]
    whole = draw(Stream.NOISE, 7, range(4))
    assert whole.shape[0] == 4
    for parts in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]):
        assert torch.equal(torch.cat([draw(Stream.NOISE, 7, part) for part in parts]), whole)
    assert torch.equal(draw(Stream.NOISE, 7, [3, 1]), whole[[3, 1]])
    others = [
        draw(Stream.POSTERIOR, 7, range(4)),
        draw(Stream.NOISE, 8, range(4)),
        draw(Stream.NOISE, 7, range(4), seed=1),
        draw(Stream.NOISE, 7, range(4, 8)),
    ]
    rows = torch.cat([whole, *others]).flatten(1) if whole.ndim > 1 else torch.cat([whole, *others])[:, None]
    assert len({tuple(row.tolist()) for row in rows}) == 20


def test_numbers_have_their_distribution():
    noise = normal((4, 8, 8), 0, Stream.NOISE, 3, range(100)).double()
    assert noise.shape == (100, 4, 8, 8)  # 25,600 numbers: standard errors 0.006 and 0.004
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.2)
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.4  # sample_indices are independent
    draws = torch.cat([uniform(0, Stream.CAPTION_DROPOUT, step, range(50)) for step in range(40)])
    assert 0 <= draws.min() and draws.max() < 1
    assert (draws < 0.1).double().mean().item() == pytest.approx(0.1, abs=0.025)
    assert draws.double().mean().item() == pytest.approx(0.5, abs=0.025)


def test_timesteps_cover_the_schedule_and_spread_over_a_batch():
    batches = [spread_timesteps(1000, 0, step, range(16), 16) for step in range(500)]
    assert all(batch.dtype == torch.int64 and batch.shape == (16,) for batch in batches)
    # Each sample_index is uniform over the schedule: 500 draws in ten bins, five standard deviations.
    for sample_index in range(16):
        counts = torch.bincount(torch.stack([batch[sample_index] for batch in batches]) // 100, minlength=10)
        assert len(counts) == 10 and (counts - 50).abs().max() < 34
    # Within a batch the gaps are T / 16 for any offset, including the gap around the end of the schedule.
    for batch in batches:
        places = batch.sort().values
        gaps = torch.cat([places.diff(), places[:1] + 1000 - places[-1:]])
        assert 62 <= gaps.min() and gaps.max() <= 63
    assert len({tuple(batch.tolist()) for batch in batches}) > 40  # an offset is one of 62.5 places
    # A micro-batch gets its sample_indices' own.
    assert torch.equal(spread_timesteps(1000, 0, 7, [3, 12], 16), batches[7][[3, 12]])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.6)])
def test_logit_normal_timesteps(mean: float, std: float):
    """Their logits have this mean and standard deviation, and each batch has its share of every quantile."""
    total, size = 100_000, 64
    quantiles = logit_normal_quantiles(mean, std)
    batches = [spread_timesteps(total, 3, step, range(size), size, quantiles) for step in range(100)]
    logits = torch.logit((torch.cat(batches).double() + 0.5) / total)
    assert logits.mean().item() == pytest.approx(mean, abs=0.02) and logits.std().item() == pytest.approx(std, rel=0.02)
    normal_distribution = torch.distributions.Normal(mean, std)
    for batch in batches:
        places = normal_distribution.cdf(torch.logit((batch.double() + 0.5) / total)).sort().values
        assert (places.diff() - 1 / size).abs().max() < 2e-3
    # The same draws as the uniform ones, elsewhere; a micro-batch gets its sample_indices' own.
    assert torch.equal(spread_timesteps(total, 3, 7, [5, 40], size, quantiles), batches[7][[5, 40]])
    uniform_ones = spread_timesteps(total, 3, 7, range(size), size)
    assert torch.equal(uniform_ones.argsort(), batches[7].argsort())
    # However wide the density, the last timestep is the last.
    wide = spread_timesteps(10, 0, 0, range(4096), 4096, logit_normal_quantiles(0.0, 1e9))
    assert sorted(set(wide.tolist())) == [0, 9]


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    for draw in DRAWS.values():
        draw(Stream.NOISE, 0, range(4))
    list(StepBatches(9, BatchPlan(4, 4, 1), 0, 0, 0, 3))
    assert torch.equal(torch.get_rng_state(), before)
