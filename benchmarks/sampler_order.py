"""Order of convergence of the deterministic samplers, on data whose ideal denoiser is known in closed form.

python benchmarks/sampler_order.py [--out docs/images/sampler_order.png] [--steps 10 20 40 80 160 320]

The data are a mixture of three Gaussians in the plane. The error is the root mean square distance, over 64 starting
points, to the exact solution of the probability-flow ODE, in float64. All runs go from sigma / alpha = 10 to 0.1, with
steps of equal length in its logarithm. They do not end at 0, as the last step to 0 is first order in most samplers and
would dominate the error.
"""

import argparse
from math import log2
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from latentdiff.diffusion.samplers import SAMPLERS, get_sampler
from latentdiff.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentdiff.figures.charts import rendered

MEANS = torch.tensor([[-1.2, 0.4], [0.9, 1.1], [0.5, -1.3]])
SPREADS = torch.tensor([0.3, 0.45, 0.6])
WEIGHTS = torch.tensor([0.3, 0.5, 0.2])
STOCHASTIC = ("ddpm", "euler_ancestral", "dpm2_ancestral", "dpm++2m_sde", "dpm++3m_sde")  # these add fresh noise
DETERMINISTIC = [name for name in SAMPLERS if name not in STOCHASTIC]
BOUNDS = (10.0, 0.1)  # sigma / alpha of the first and of the last level
SCHEDULE = NoiseSchedule()


def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
    """E[x0 | x] for the mixture; x is [1, 2, points, 1], with the two coordinates of a point as channels."""
    means, spreads, weights = (part.to(x)[..., None, None] for part in (MEANS, SPREADS, WEIGHTS))
    spreads, weights = spreads[:, None], weights[:, None]
    offset = x - level.alpha * means  # [component, coordinate, point, 1]
    variance = (level.alpha * spreads) ** 2 + level.sigma**2
    logits = weights.log() - variance.log() - offset.square().sum(dim=1, keepdim=True) / (2 * variance)
    component_mean = means + level.alpha * spreads**2 / variance * offset  # E[x0 | x, component]
    return (logits.softmax(dim=0) * component_mean).sum(dim=0, keepdim=True)


def draw(points: int, level: NoiseLevel, seed: int) -> Tensor:
    """Noisy points x of the mixture at a noise level: [1, 2, points, 1] float64."""
    generator = torch.Generator().manual_seed(seed)
    component = torch.multinomial(WEIGHTS, points, replacement=True, generator=generator)
    data, noise = torch.randn(2, points, 2, generator=generator, dtype=torch.float64)
    data = MEANS[component] + SPREADS[component, None] * data
    return (level.alpha * data + level.sigma * noise).T[None, :, :, None]


def levels_between(num_steps: int, bounds: tuple[float, float] = BOUNDS, even_in: str = "log") -> list[NoiseLevel]:
    """Levels with sigma / alpha between the bounds, evenly spaced in its logarithm ("log") or in itself ("linear")."""
    place = np.geomspace if even_in == "log" else np.linspace
    return [SCHEDULE.level_of_sigma_karras(float(sigma)) for sigma in place(*bounds, num_steps + 1)]


def solve(name: str, x: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """The result of a sampler that starts from x at levels[0]."""
    return get_sampler(name)(denoise, x, SCHEDULE, levels, [torch.Generator()])


def solution(x: Tensor, bounds: tuple[float, float] = BOUNDS) -> Tensor:
    """The exact end of the trajectories from x, to about 1e-8: Heun's method with Richardson extrapolation."""
    coarse, fine = (solve("heun", x, levels_between(steps, bounds)) for steps in (1000, 2000))
    return fine + (fine - coarse) / 3


def errors(
    names: list[str], steps: list[int], bounds: tuple[float, float] = BOUNDS, even_in: str = "log"
) -> dict[str, list[float]]:
    """The root mean square error of each sampler for each number of steps."""
    x = draw(64, levels_between(1, bounds)[0], seed=0)
    exact = solution(x, bounds)
    return {
        name: [
            (solve(name, x, levels_between(n, bounds, even_in)) - exact).square().mean().sqrt().item() for n in steps
        ]
        for name in names
    }


def plot(measured: dict[str, list[float]], steps: list[int], path: Path) -> None:
    """Save a plot of the errors over the number of steps as a PNG file."""
    figure = Figure(figsize=(7, 5), dpi=100)
    axes = figure.subplots()
    styles = ["-", "--", "-."]
    for i, (name, values) in enumerate(measured.items()):
        label = {"euler": "ddim, euler", "heun": "heun (2 evaluations)", "dpm2": "dpm2 (2 evaluations)"}.get(name, name)
        if name != "ddim":  # its line is the same as euler's
            axes.loglog(steps, values, styles[i % 3], marker="o", markersize=3, label=label)
    for order in (1, 2, 3):
        guide = [0.12 * (steps[0] / n) ** order for n in steps]
        axes.loglog(steps, guide, color="0.8", linewidth=0.8, zorder=0)
        axes.annotate(f"order {order}", (steps[-1], guide[-1]), (3, 0), textcoords="offset points", color="0.5", size=8)
    axes.set(xlabel="steps", ylabel="RMS error", title="Gaussian mixture, sigma / alpha from 10 to 0.1")
    axes.set_xlim(right=steps[-1] * 1.6)
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    axes.grid(True, color="0.93")
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    rendered(figure).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="PNG file for the plot")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40, 80, 160, 320], help="numbers of steps")
    arguments = parser.parse_args()
    measured = errors(DETERMINISTIC, arguments.steps)
    print("| sampler |", " | ".join(f"{n} steps" for n in arguments.steps), "| order at the end |")
    print("|---" * (len(arguments.steps) + 2) + "|")
    for name, values in measured.items():
        order = log2(values[-2] / values[-1]) / log2(arguments.steps[-1] / arguments.steps[-2])
        print(f"| {name} |", " | ".join(f"{value:.1e}" for value in values), f"| {order:.2f} |")
    if arguments.out:
        plot(measured, arguments.steps, arguments.out)


if __name__ == "__main__":
    main()
