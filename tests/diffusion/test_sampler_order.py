"""The samplers against exact solutions: their order of convergence, and the distribution of their samples.

The data are a mixture of three Gaussians in the plane, whose ideal denoiser has a closed form. It is in
benchmarks/sampler_order.py, which plots the orders asserted here.
"""

import importlib.util
import sys
from math import log2
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff.diffusion.samplers import SAMPLERS, get_sampler
from latentdiff.diffusion.schedule import CLEAN

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sampler_order.py"
SPEC = importlib.util.spec_from_file_location("sampler_order", SCRIPT)
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)

FIRST_ORDER = ["ddpm", "ddim", "euler", "euler_ancestral"]


# --- the reference itself ---


def test_ideal_denoiser_by_quadrature():
    """E[x0 | x] = integral of x0 p(x0) p(x | x0) over a fine grid, at three levels and four points."""
    grid = np.linspace(-5, 5, 501)
    x0 = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)
    density = 0
    for mean, spread, weight in zip(
        benchmark.MEANS.numpy(), benchmark.SPREADS.tolist(), benchmark.WEIGHTS.tolist(), strict=True
    ):
        density = density + weight / spread**2 * np.exp(-((x0 - mean) ** 2).sum(-1) / (2 * spread**2))
    points = np.array([[0.0, 0.0], [1.0, -0.7], [-1.3, 0.2], [0.4, 1.9]])
    for sigma_karras in (0.3, 1.0, 4.0):
        level = benchmark.SCHEDULE.level_of_sigma_karras(sigma_karras)
        ours = benchmark.denoise(torch.tensor(points).T[None, :, :, None], level)[0, :, :, 0].T
        for point, value in zip(points, ours.numpy(), strict=True):
            joint = density * np.exp(-((point - level.alpha * x0) ** 2).sum(-1) / (2 * level.sigma**2))
            expected = (x0 * joint[..., None]).sum((0, 1)) / joint.sum()
            np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


def test_solution_satisfies_the_ode():
    """By an independent adaptive integrator of d(x / alpha) / d(sigma / alpha) = epsilon."""
    from scipy.integrate import solve_ivp

    x = benchmark.draw(8, benchmark.levels_between(1)[0], seed=0)

    def slope(sigma_karras, y):
        level = benchmark.SCHEDULE.level_of_sigma_karras(sigma_karras)
        scaled = torch.tensor(y).view(1, 2, 8, 1)
        return ((scaled - benchmark.denoise(level.alpha * scaled, level)) / sigma_karras).flatten().numpy()

    start, end = benchmark.levels_between(1)
    solved = solve_ivp(slope, benchmark.BOUNDS, (x / start.alpha).flatten().numpy(), "DOP853", rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(benchmark.solution(x).flatten(), end.alpha * solved.y[:, -1], atol=1e-8)


# --- order of convergence ---


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    return benchmark.errors(benchmark.DETERMINISTIC, [20, 40, 80, 160])


@pytest.mark.runs
@pytest.mark.parametrize(
    ("name", "order", "at_160"),
    [
        ("ddim", 1, 7e-3),
        ("euler", 1, 7e-3),
        ("heun", 2, 1e-4),
        ("dpm2", 2, 5e-5),
        ("dpm++2s", 2, 3e-4),
        ("dpm++2m", 2, 6e-5),
        ("deis", 2, 1.5e-4),
        ("pndm", 2, 4e-5),
        ("unipc", 2, 1e-5),
        ("lms", 3, 6e-6),
    ],
)
def test_order(errors, name, order, at_160):
    """Twice the steps, evenly in log(sigma / alpha), divide the error by 2^order.

    unipc's corrector is third order, but its first and its last step are second and first; lms's order of 4 is held
    back by its first steps, of order 1, 2 and 3; pndm's weights are for even steps (see below).
    """
    values = errors[name]
    orders = [log2(a / b) for a, b in zip(values, values[1:], strict=False)]
    if name in ("unipc", "lms"):
        assert min(orders) > order - 0.1
    else:
        assert orders[1:] == pytest.approx([order, order], abs=0.15)
    assert values[-1] < at_160


def test_fourth_order_multistep():
    """lms and pndm, evenly in sigma / alpha, as pndm's weights assume: there they are the same method."""
    values = benchmark.errors(["lms", "pndm"], [40, 80, 160], bounds=(5.0, 0.5), even_in="linear")
    for name in ("lms", "pndm"):
        orders = [log2(a / b) for a, b in zip(values[name], values[name][1:], strict=False)]
        assert min(orders) > 3.2 and values[name][-1] < 1e-5
    assert values["lms"] == pytest.approx(values["pndm"], rel=0.03)  # but for the first step


def test_deis_to_clean_data():
    """A last step to sigma / alpha = 0, where the logarithm is infinite but integrable: by hand, in closed form."""
    levels = [*map(benchmark.SCHEDULE.level_of_sigma_karras, np.geomspace(2, 0.1, 20).tolist()), CLEAN]
    epsilon = {
        level.sigma_karras: 0.3 + 0.2 * np.log(level.sigma_karras) for level in levels[:-1]
    }  # linear, so integrated exactly
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    result = get_sampler("deis")(
        lambda x, level: (x - level.sigma * epsilon[level.sigma_karras]) / level.alpha,
        x,
        benchmark.SCHEDULE,
        levels,
        [torch.Generator()],
    )

    def antiderivative(sigma: float) -> float:
        return 0.3 * sigma + 0.2 * (sigma * np.log(sigma) - sigma) if sigma > 0 else 0.0

    # The first step takes epsilon to be constant.
    first = epsilon[levels[0].sigma_karras] * (levels[1].sigma_karras - levels[0].sigma_karras)
    assert result.item() == pytest.approx(first + antiderivative(0) - antiderivative(levels[1].sigma_karras), abs=1e-6)


# --- the distribution ---


@pytest.mark.runs
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_mean_and_covariance(name):
    """Of 30,000 samples, within 4 standard errors of the mixture's: 0.02 for the means, about 0.03 for the covariances.

    120 steps, or 400 of the first-order samplers, whose covariance comes out small by 0.02 and less.
    """
    sampler = get_sampler(name)
    levels = sampler.levels(benchmark.SCHEDULE, 400 if name in FIRST_ORDER else 120)
    x = benchmark.draw(30_000, levels[0], seed=1).float()
    points = sampler(benchmark.denoise, x, benchmark.SCHEDULE, levels, [torch.Generator().manual_seed(2)])
    points = points[0, :, :, 0].T.double().numpy()
    means, spreads, weights = (
        part.double().numpy() for part in (benchmark.MEANS, benchmark.SPREADS, benchmark.WEIGHTS)
    )
    mean = weights @ means
    covariance = np.einsum("k,ki,kj", weights, means - mean, means - mean) + np.eye(2) * (weights @ spreads**2)
    off = points - mean
    products = np.einsum("ni,nj->nij", off, off)
    for sampled, exact in ((off, 0.0), (products, covariance)):
        error = sampled.mean(0) - exact
        standard_error = sampled.std(0) / np.sqrt(len(points))
        assert standard_error.max() < 0.01
        assert (np.abs(error) < 4 * standard_error).all(), error / standard_error


# --- the benchmark ---


def test_the_benchmark_prints_and_plots(tmp_path, monkeypatch, capsys):
    image = tmp_path / "new" / "plot.png"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--steps", "5", "10", "--out", str(image)])
    benchmark.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == benchmark.DETERMINISTIC
    euler = next(row for row in rows if row[0] == "euler")
    assert float(euler[3]) == pytest.approx(1, abs=0.2) and 0.05 < float(euler[2]) < 0.2
    assert image.read_bytes()[1:4] == b"PNG"
