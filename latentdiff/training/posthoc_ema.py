"""Post-hoc EMA: averages of the weights whose length is chosen after training (Karras et al. 2024, section 3, app. C).

A power-function average at time t weights the past time tau by the profile p(tau) ~ tau^gamma on [0, t], so its length
grows with the training. Snapshots of two such averages span many other profiles: an average of another length is a
weighted sum of snapshots. A length is the profile's standard deviation as a fraction of t (the paper's sigma_rel), a
time is the number of finished optimiser steps.
"""

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentdiff.distributed import fill
from latentdiff.formats.files import write_safetensors
from latentdiff.training.ema import lerp, trainable

SNAPSHOTS = "ema_snapshots"
MAX_LENGTH = 1 / math.sqrt(12)  # of the uniform average, exponent 0
MAX_PROFILE_ERROR = 0.05  # a larger one gives a warning
Values = np.ndarray | np.float64


# ----------------------------------------------------------------------------------------------------------------------
# Tracking


class PowerEMA:
    """Power-function averages of every trainable parameter, in float32, one for each length (sigma_rel)."""

    def __init__(self, model: nn.Module, lengths: Sequence[float]) -> None:
        """Raises ValueError for a length outside (0, 0.2887)."""
        self.exponents = {length: exponent_of_length(length) for length in lengths}
        self.averages = {
            length: {name: p.detach().clone().float() for name, p in trainable(model).items()} for length in lengths
        }

    def update(self, model: nn.Module, step: int) -> None:
        """Update the averages after optimiser step `step` (0-based)."""
        weights = trainable(model)
        for length, average in self.averages.items():
            assert weights.keys() == average.keys(), "the averages are of another model"
            lerp(average, weights, 1.0 - power_decay(step, self.exponents[length]))

    def state(self) -> dict[str, Tensor]:
        """The averages themselves (no copies) as `<length>:<parameter>`, for a checkpoint or a snapshot."""
        return {_key(length, name): tensor for length, a in self.averages.items() for name, tensor in a.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved, unsharded `state`. Raises ValueError if it has other lengths, parameters or shapes."""
        own = self.state()
        saved = _lengths(state)
        if saved != sorted(self.averages):
            raise ValueError(
                f"the checkpoint has power-function averages of lengths {saved}, but ema.snapshot_lengths is "
                f"{sorted(self.averages)}; restore the config, or start over with --resume never"
            )
        wrong = sorted(own.keys() ^ state.keys()) or [k for k, t in own.items() if t.shape != state[k].shape]
        if wrong:
            raise ValueError(f"the checkpoint's power-function averages are of another model: {', '.join(wrong[:3])}")
        for key, tensor in own.items():
            fill(tensor, state[key])


def _key(length: float, name: str) -> str:
    return f"{length}:{name}"


def _lengths(keys: Iterable[str]) -> list[float]:
    return sorted({float(key.partition(":")[0]) for key in keys})


def power_decay(step: int, exponent: float) -> float:
    """The average's decay after optimiser step `step` (0-based): (1 - 1 / n)^(gamma + 1) for n = step + 1.

    After the first step it is 0, so that the initial weights do not count. Step k <= n then has the weight that the
    profile has between k - 1 and k.
    """
    return (1.0 - 1.0 / (step + 1)) ** (exponent + 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Profiles


def exponent_of_length(length: float) -> float:
    """The exponent gamma >= 0 of the profile of a length (sigma_rel) (Algorithm 2).

    It solves length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the variance of p(tau) ~ tau^gamma on [0, 1].
    Raises ValueError for a length outside (0, 0.2887): the uniform average is the longest.
    """
    if not 0.0 < length < MAX_LENGTH:
        raise ValueError(f"EMA length {length} must be greater than 0 and less than {MAX_LENGTH:.4f}")
    t = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def profile_products(times_a: Values, gammas_a: Values, times_b: Values, gammas_b: Values) -> Values:
    """The integral over time of p_a p_b, where both profiles have the integral 1; the inputs broadcast.

    With m the smaller of the two times: (ga + 1) (gb + 1) / (ga + gb + 1) m^(ga + gb + 1) / (ta^(ga + 1) tb^(gb + 1)).
    """
    smaller, greater = np.minimum(times_a, times_b), np.maximum(times_a, times_b)
    # Powers of ratios up to 1: powers of the times themselves overflow for short lengths.
    ratios = (smaller / times_a) ** gammas_a * (smaller / times_b) ** gammas_b
    return (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1) * ratios / greater


@dataclass(frozen=True)
class Fit:
    """A weighted sum of snapshots' profiles that approximates a target profile."""

    weights: list[float]  # add up to 1
    error: float  # L2 norm of the difference, relative to that of the target profile


def fit_profile(
    snapshot_steps: Sequence[int], snapshot_gammas: Sequence[float], target_step: int, target_gamma: float
) -> Fit:
    """The weights of sum 1 whose sum of the snapshots' profiles is nearest to the target profile in L2 (Algorithm 3).

    The constraint on the sum is not in the paper. It keeps exactly what the averages have in common, which is most of
    their values; without it the error of a synthesised average is tens of times as large.
    """
    times, gammas = np.array(snapshot_steps, dtype=np.float64), np.array(snapshot_gammas, dtype=np.float64)
    target = np.float64(target_step), np.float64(target_gamma)
    gram = profile_products(times[:, None], gammas[:, None], times, gammas)
    # In terms of profiles of norm 1: those of early snapshots have far larger norms.
    scale = 1.0 / np.sqrt(np.diag(gram))
    gram *= scale[:, None] * scale
    right = profile_products(times, gammas, *target) * scale
    free, along = np.linalg.solve(gram, np.stack([right, scale], axis=1)).T
    weights = free + along * (1.0 - scale @ free) / (scale @ along)  # the constraint's Lagrange multiplier
    norm2 = float(profile_products(*target, *target))
    error2 = norm2 - 2.0 * weights @ right + weights @ gram @ weights
    return Fit((weights * scale).tolist(), math.sqrt(max(error2, 0.0) / norm2))


# ----------------------------------------------------------------------------------------------------------------------
# Snapshots


def snapshot_path(run: Path, step: int) -> Path:
    """saved/<run>/ema_snapshots/step_00000500.safetensors: the averages after 500 optimiser steps."""
    return run / SNAPSHOTS / f"step_{step:08d}.safetensors"


def save_snapshot(run: Path, step: int, tensors: Mapping[str, Tensor]) -> Path:
    """Write `PowerEMA.state()` after `step` finished optimiser steps, atomically.

    In float32: averages of neighbouring lengths differ by less than a percent of the weights. The rounding error of
    float16 or bfloat16, amplified by the sum of snapshots, would be about as large as that.
    """
    path = snapshot_path(run, step)
    metadata = {"step": str(step), "lengths": json.dumps(_lengths(tensors))}
    write_safetensors({key: tensor.float() for key, tensor in tensors.items()}, path, metadata)
    return path


def list_snapshots(run: Path) -> dict[int, Path]:
    """The run's snapshots by step, oldest first."""
    found = {path: re.fullmatch(r"step_(\d+)", path.stem) for path in (run / SNAPSHOTS).glob("*.safetensors")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def drop_snapshots_after(run: Path, step: int) -> None:
    """When a run resumes at `step`, delete the snapshots of later steps, which it will write again."""
    for at, path in list_snapshots(run).items():
        if at > step:
            path.unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Synthesis


@dataclass(frozen=True)
class Synthesis:
    """A run's average of a length at a step, as a weighted sum of the averages in its snapshots."""

    length: float
    step: int
    sources: list[tuple[Path, float]]  # a snapshot file and a tracked length in it
    weights: list[float]  # of the sources
    error: float  # of the profile, relative (`Fit`)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged parameters, float32, summed in float64; one tensor at a time, in the memory of one model.

        Raises ValueError if the snapshots are of different models.
        """
        with ExitStack() as stack:
            files = {path: stack.enter_context(_opened(path)) for path in dict(self.sources)}
            names = {path: _parameters(file.keys()) for path, file in files.items()}
            first = next(iter(files))
            for path in files:
                if names[path] != names[first]:
                    raise ValueError(f"{path} and {first} are of different models; remove those of the older training")
            return {name: self._sum(files, name) for name in sorted(names[first])}

    def _sum(self, files: "Mapping[Path, safe_open]", name: str) -> Tensor:
        terms = (
            files[path].get_tensor(_key(length, name)).double() * weight
            for (path, length), weight in zip(self.sources, self.weights, strict=True)
        )
        total = next(terms)
        for term in terms:
            total += term
        return total.float()


def plan_synthesis(run: Path, length: float, step: int | None = None) -> Synthesis:
    """How to make a length's average at `step` (None: that of the newest snapshot) from the snapshots up to it.

    Raises ValueError for a length outside (0, 0.2887), a run without snapshots, and a step without one.
    """
    gamma = exponent_of_length(length)
    snapshots = list_snapshots(run)
    if not snapshots:
        raise ValueError(f"{run} has no {SNAPSHOTS}/; set ema.snapshot_every and train again")
    if step is None:
        step = max(snapshots)
    if step not in snapshots:
        raise ValueError(f"{run} has no snapshot of step {step}; there are {', '.join(map(str, snapshots))}")
    columns = [
        (at, tracked, path) for at, path in snapshots.items() if at <= step for tracked in _tracked_lengths(path)
    ]
    gammas = [exponent_of_length(tracked) for _, tracked, _ in columns]
    fit = fit_profile([at for at, _, _ in columns], gammas, step, gamma)
    return Synthesis(length, step, [(path, tracked) for _, tracked, path in columns], fit.weights, fit.error)


def synthesise(run: Path, length: float, step: int | None = None) -> dict[str, Tensor]:
    """The averaged parameters, float32, by name, of a length at `step`; arguments and errors as of `plan_synthesis`.

    Warns if the synthesised profile has an error of more than 5 %.
    """
    plan = plan_synthesis(run, length, step)
    if plan.error > MAX_PROFILE_ERROR:
        warnings.warn(
            f"{run} has too few snapshots up to step {plan.step} for EMA length {length}: the synthesised profile is "
            f"{plan.error:.1%} off; lower ema.snapshot_every, or ask for a length nearer to ema.snapshot_lengths",
            stacklevel=2,
        )
    return plan.tensors()


def _opened(path: Path) -> "safe_open":
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None


def _tracked_lengths(path: Path) -> list[float]:
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if "lengths" not in metadata:
        raise ValueError(f"{path} is not a snapshot of power-function averages: its header has no lengths")
    return json.loads(metadata["lengths"])


def _parameters(keys: Iterable[str]) -> set[str]:
    return {key.partition(":")[2] for key in keys}
