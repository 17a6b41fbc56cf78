"""Post-hoc EMA: profiles, tracking, snapshots, synthesis."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentdiff.formats.files import read_safetensors
from latentdiff.training.posthoc_ema import (
    PowerEMA,
    drop_snapshots_after,
    exponent_of_length,
    fit_profile,
    list_snapshots,
    power_decay,
    profile_products,
    save_snapshot,
    synthesise,
)

LENGTHS = (0.01, 0.03, 0.05, 0.1, 0.2, 0.28)
TRACKED = (0.05, 0.10)


def density(time: float, gamma: float, taus: np.ndarray) -> np.ndarray:
    """The profile by its definition, tau^gamma over its numerical integral, with logarithms."""
    grid = (np.arange(200_000) + 0.5) / 200_000 * time
    log_norm = gamma * np.log(time) + np.log(np.exp(gamma * np.log(grid / time)).mean() * time)
    return np.where(taus <= time, np.exp(gamma * np.log(taus) - log_norm), 0.0)


def length_of_exponent(exponent: float) -> float:
    """The standard deviation of p(tau) ~ tau^gamma on [0, 1], gamma >= 0 (appendix C)."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def midpoints(time: float, count: int = 200_000) -> tuple[np.ndarray, float]:
    return (np.arange(count) + 0.5) / count * time, time / count


# --- profiles ---


@pytest.mark.parametrize("length", LENGTHS)
def test_length_is_the_standard_deviation_of_the_profile(length):
    gamma = exponent_of_length(length)
    taus, width = midpoints(1.0)
    p = density(1.0, gamma, taus) * width
    mean = (p * taus).sum()
    assert np.sqrt((p * (taus - mean) ** 2).sum()) == pytest.approx(length, rel=1e-4)
    assert length_of_exponent(gamma) == pytest.approx(length, rel=1e-10)


def test_exponents_of_the_paper():
    """Karras et al. 2024, section 3.1: the two that EDM2 tracks."""
    assert exponent_of_length(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent_of_length(0.10) == pytest.approx(6.94, abs=0.005)
    assert length_of_exponent(0.0) == pytest.approx(12**-0.5)  # uniform


@pytest.mark.parametrize("length", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_length_out_of_range(length):
    with pytest.raises(ValueError, match=r"EMA length .* must be greater than 0 and less than 0\.2887"):
        exponent_of_length(length)


@pytest.mark.parametrize(
    ("ta", "la", "tb", "lb"),
    [(500, 0.05, 500, 0.1), (300, 0.1, 800, 0.05), (800, 0.28, 700, 0.03), (640, 0.01, 650, 0.2)],
)
def test_products_are_the_integrals(ta, la, tb, lb):
    ga, gb = exponent_of_length(la), exponent_of_length(lb)
    taus, width = midpoints(min(ta, tb))
    expected = (density(ta, ga, taus) * density(tb, gb, taus)).sum() * width
    found = profile_products(*(np.float64(v) for v in (ta, ga, tb, gb)))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == profile_products(*(np.float64(v) for v in (tb, gb, ta, ga)))


def test_short_lengths_and_long_trainings_do_not_overflow():
    """gamma is 97.5, so that (10^7)^(2 gamma + 1) is 1e1372."""
    with np.errstate(all="raise", under="ignore"):
        gamma = exponent_of_length(0.01)
        steps = [n * 10**6 for n in range(1, 11) for _ in range(2)]
        fit = fit_profile(steps, [gamma, exponent_of_length(0.05)] * 10, 10**7, gamma)
    assert fit.weights == pytest.approx([0.0] * 18 + [1.0, 0.0], abs=1e-9)
    assert fit.error < 1e-6


def test_fitted_weights_add_up_to_one_and_are_the_best():
    """Any other weights of sum 1 make a profile that is further away, measured by quadrature."""
    steps, gammas = [400, 400, 800, 800], [exponent_of_length(length) for length in TRACKED * 2]
    target = exponent_of_length(0.13)
    fit = fit_profile(steps, gammas, 800, target)
    assert sum(fit.weights) == pytest.approx(1.0, abs=1e-12)

    taus, width = midpoints(800.0)
    parts = np.stack([density(t, g, taus) for t, g in zip(steps, gammas, strict=True)])
    wanted = density(800, target, taus)

    def distance(weights: np.ndarray) -> float:
        return float(np.sqrt(((weights @ parts - wanted) ** 2).sum() * width / ((wanted**2).sum() * width)))

    best = distance(np.array(fit.weights))
    assert fit.error == pytest.approx(best, rel=1e-3)
    assert 0.01 < best < 0.2
    for i in range(4):
        for j in range(4):
            step = 1e-2 * (np.eye(4)[i] - np.eye(4)[j])
            assert i == j or distance(np.array(fit.weights) + step) > best


# --- tracking ---


def tiny_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4))


def train(steps: int, every: int, run: Path) -> tuple[PowerEMA, list[dict[str, Tensor]]]:
    """Noisy SGD on a random task with snapshots; returns the tracked averages and the weights after each step."""
    torch.manual_seed(0)
    model, teacher = tiny_model(), tiny_model().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tracked, history = PowerEMA(model, TRACKED), []
    for step in range(steps):
        x = torch.randn(16, 8)
        loss = (model(x) - teacher(x) - 0.3 * torch.randn(16, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tracked.update(model, step)
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if (step + 1) % every == 0:
            save_snapshot(run, step + 1, tracked.state())
    return tracked, history


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def directly(history: Sequence[Mapping[str, Tensor]], length: float) -> Tensor:
    """The average of the weights after steps 1 .. n, each with the integral of the profile over its step: float64."""
    gamma, n = exponent_of_length(length), len(history)
    edges = (np.arange(n + 1) / n) ** (gamma + 1)
    weights = torch.from_numpy(np.diff(edges))
    return weights @ torch.stack([flat(tensors) for tensors in history])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PowerEMA, list[dict[str, Tensor]]]:
    run = tmp_path_factory.mktemp("run")
    return run, *train(800, 100, run)


def test_after_the_first_step_the_average_is_the_weights():
    model = tiny_model()
    tracked = PowerEMA(model, TRACKED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    tracked.update(model, 0)
    for average in tracked.averages.values():
        assert all(torch.equal(average[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("length", [0.01, 0.05, 0.25])
def test_decays_make_the_profile(length):
    """The product form: step k has the weight (1 - beta_k) beta_(k+1) ... beta_n."""
    gamma, n = exponent_of_length(length), 40
    decays = [power_decay(step, gamma) for step in range(n)]
    weights = [(1 - decays[k]) * np.prod(decays[k + 1 :]) for k in range(n)]
    taus, width = midpoints(n)
    expected = (density(n, gamma, taus) * width).reshape(n, -1).sum(axis=1)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)


def test_tracked_averages_are_the_sums(trained):
    _, tracked, history = trained
    for length, average in tracked.averages.items():
        torch.testing.assert_close(flat(average), directly(history, length), rtol=0, atol=1e-6)


def test_averages_are_float32_without_frozen_parameters():
    model = tiny_model().to(torch.bfloat16)
    model[0].requires_grad_(False)
    tracked = PowerEMA(model, TRACKED)
    tracked.update(model, 0)
    tracked.update(model, 1)
    assert tracked.state().keys() == {f"{length}:2.{name}" for length in TRACKED for name in ("weight", "bias")}
    assert {tensor.dtype for tensor in tracked.state().values()} == {torch.float32}


def test_state_is_restored(trained):
    _, tracked, history = trained
    other = PowerEMA(tiny_model(), TRACKED)
    held = other.averages[0.05]["0.weight"]
    other.load({key: tensor.clone() for key, tensor in tracked.state().items()})
    assert all(torch.equal(tensor, tracked.state()[key]) for key, tensor in other.state().items())
    assert other.averages[0.05]["0.weight"] is held


def test_load_refuses_another_state(trained):
    _, tracked, _ = trained
    state = tracked.state()
    with pytest.raises(ValueError, match=r"lengths \[0\.05, 0\.1\], but ema\.snapshot_lengths is \[0\.05, 0\.12\]"):
        PowerEMA(tiny_model(), (0.05, 0.12)).load(state)
    fewer = {key: tensor for key, tensor in state.items() if key != "0.05:0.bias"}
    with pytest.raises(ValueError, match=r"of another model: 0\.05:0\.bias"):
        PowerEMA(tiny_model(), TRACKED).load(fewer)
    with pytest.raises(ValueError, match=r"of another model: 0\.1:2\.bias"):
        PowerEMA(tiny_model(), TRACKED).load(state | {"0.1:2.bias": torch.zeros(5)})


# --- snapshots and synthesis ---


def test_snapshots_are_plain_files_of_the_averages(trained, tmp_path):
    run, tracked, _ = trained
    snapshots = list_snapshots(run)
    assert list(snapshots) == [100, 200, 300, 400, 500, 600, 700, 800]
    assert snapshots[800] == run / "ema_snapshots" / "step_00000800.safetensors"
    saved = read_safetensors(snapshots[800])
    assert all(torch.equal(tensor, saved[key]) for key, tensor in tracked.state().items())
    assert list_snapshots(tmp_path) == {}


def test_snapshots_after_a_resume_are_dropped(trained, tmp_path):
    _, tracked, _ = trained
    for step in (100, 200, 300):
        save_snapshot(tmp_path, step, tracked.state())
    drop_snapshots_after(tmp_path, 200)
    assert list(list_snapshots(tmp_path)) == [100, 200]


@pytest.mark.parametrize(
    ("length", "tolerance"), [(0.07, 0.01), (0.12, 0.01), (0.2, 0.05), (0.03, 0.15)], ids=lambda value: str(value)
)
@pytest.mark.filterwarnings("ignore:.*too few snapshots")
def test_synthesised_average_is_the_direct_one(trained, length, tolerance):
    """To a fraction of the distance between that average and the last weights, which is 0.3 to 1.5 % of the weights."""
    run, _, history = trained
    expected = directly(history, length)
    distance = (flat(history[-1]) - expected).norm()
    error = (flat(synthesise(run, length)) - expected).norm() / distance
    assert error < tolerance


@pytest.mark.parametrize("length", TRACKED)
def test_synthesis_of_a_tracked_length_is_the_tracked_average(trained, length):
    run, tracked, _ = trained
    torch.testing.assert_close(flat(synthesise(run, length)), flat(tracked.averages[length]), rtol=0, atol=1e-7)


def test_synthesis_at_an_earlier_step(trained):
    """Later snapshots do not contribute."""
    run, _, history = trained
    expected = directly(history[:400], 0.08)
    distance = (flat(history[399]) - expected).norm()
    assert (flat(synthesise(run, 0.08, 400)) - expected).norm() < 0.05 * distance


def test_misfit_gives_a_warning(trained):
    run, *_ = trained
    with pytest.warns(UserWarning, match=r"too few snapshots up to step 800 for EMA length 0\.02: .* 24\.5% off"):
        synthesise(run, 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synthesise(run, 0.12)


def test_synthesis_refuses(trained, tmp_path):
    run, tracked, _ = trained
    with pytest.raises(ValueError, match="has no ema_snapshots/; set ema.snapshot_every and train again"):
        synthesise(tmp_path, 0.1)
    with pytest.raises(ValueError, match="no snapshot of step 350; there are 100, 200, 300"):
        synthesise(run, 0.1, 350)
    with pytest.raises(ValueError, match="EMA length 0.3"):
        synthesise(run, 0.3)

    save_snapshot(tmp_path, 100, tracked.state())
    second = save_snapshot(tmp_path, 200, PowerEMA(nn.Linear(2, 2), TRACKED).state())
    with pytest.raises(ValueError, match="are of different models"):
        synthesise(tmp_path, 0.1)
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step_00000200\.safetensors is truncated"):
        synthesise(tmp_path, 0.1)
