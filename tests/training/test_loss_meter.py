"""The loss meter: means between log lines, skipped steps, its state in a checkpoint."""

import math

import pytest
import torch
from states import OPTIMIZER, equal, weights
from torch import nn

from latentdiff.training.loss_meter import LossMeter, Window
from latentdiff.training.optimizer import (
    apply_gradients,
    backward,
    build_optimizer,
    clip_gradients,
)


def close(loss_meter: LossMeter, step: int, loss: float, grad_norm: float = 1.0) -> float:
    """A step of one micro-batch; `backward` passes a loss that is not finite on to the gradient."""
    loss_meter.add({"loss": torch.tensor(loss)}, weight=1.0)
    return loss_meter.close(step, torch.tensor(grad_norm if math.isfinite(loss) else math.nan)).item()


def count(loss_meter: LossMeter, first_step: int, steps: str) -> None:
    """A step a letter: `.` finite, `x` not."""
    for step, letter in enumerate(steps, first_step):
        assert close(loss_meter, step, float("nan") if letter == "x" else 1.0) == float(letter == "x")


def test_means_over_micro_batches_and_steps(accelerator):
    """Over micro-batches by their weight and over steps; the gradient's norm is the last step's."""
    loss_meter = LossMeter(["loss", "kl"], accelerator)
    for step, pairs in enumerate([[(1.0, 10.0), (3.0, 30.0)], [(5.0, 50.0), (9.0, 130.0)]]):
        for loss, kl in pairs:
            losses = {"loss": torch.tensor(loss, requires_grad=True), "kl": torch.tensor(kl, dtype=torch.bfloat16)}
            loss_meter.add(losses, weight=0.5)
        assert loss_meter.close(step, torch.tensor(0.5 + step)).item() == 0.0
    assert loss_meter.read() == Window({"loss": 4.5, "kl": 55.0, "grad_norm": 1.5}, 0, 0, 0)
    assert loss_meter.read().means == {}  # nothing since
    loss_meter.add({"loss": torch.tensor(8.0), "kl": torch.tensor(2.0)}, weight=1.0)
    loss_meter.close(2, torch.tensor(0.25))
    assert loss_meter.read() == Window({"loss": 8.0, "kl": 2.0, "grad_norm": 0.25}, 0, 0, 0)


def test_skipped_steps_do_not_count(accelerator):
    loss_meter = LossMeter(["loss"], accelerator)
    nan, inf = float("nan"), float("inf")
    steps = [(1.0, 0.5), (nan, 0.5), (2.0, inf), (3.0, 0.75), (2.0, nan), (-inf, 9.0)]
    skips = [close(loss_meter, step, loss, grad_norm) for step, (loss, grad_norm) in enumerate(steps)]
    assert skips == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert loss_meter.read() == Window({"loss": 2.0, "grad_norm": 0.75}, 4, 2, 5)
    assert close(loss_meter, 6, nan) == 1.0
    assert loss_meter.read().means == {}  # no finite step in this line


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_skips_the_step(accelerator, bad):
    """Also where its gradient is finite, as that of |x| is at infinity."""
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER))
    loss_meter = LossMeter(["loss", "kl"], accelerator)
    own = weights(model)
    for added, kl in [(0.0, 1.0), (bad, 1.0), (0.0, 1.0)]:
        loss = model(torch.ones(1, 1)).sum() + added
        backward(accelerator, loss, weight=1 / 3)
        loss_meter.add({"loss": loss, "kl": torch.tensor(kl)}, weight=1 / 3)
    skip = loss_meter.close(0, clip_gradients(accelerator, model, 1.0))
    apply_gradients(accelerator, optimizer, skip)
    assert skip.item() == 1.0 and equal(weights(model), own)
    loss_meter.add({"loss": torch.tensor(4.0), "kl": torch.tensor(2.0)}, weight=1.0)
    assert loss_meter.close(1, torch.tensor(1.0)).item() == 0.0  # and none after it
    assert loss_meter.read() == Window({"loss": 4.0, "kl": 2.0, "grad_norm": 1.0}, 1, 1, 0)


@pytest.mark.parametrize(
    ("lines", "expected"),  # skipped steps, the longest row of them, its last step
    [
        (["..xx.x"], [(3, 2, 3)]),
        (["xx.xxx."], [(5, 3, 5)]),
        (["xx.xx"], [(4, 2, 4)]),  # of two rows of the same length the last
        (["xx", "x."], [(2, 2, 1), (1, 3, 2)]),  # a row counts whole where it ends
        ([".x", "xx", "xx"], [(1, 1, 1), (2, 3, 3), (2, 5, 5)]),
        (["xxx.x", "x.x"], [(4, 3, 2), (2, 2, 5)]),
        (["xxx.x", ".xx"], [(4, 3, 2), (2, 2, 7)]),
        (["xx", ".x."], [(2, 2, 1), (1, 1, 3)]),
    ],
)
def test_longest_skip_streak_is_found(accelerator, lines, expected):
    loss_meter, step = LossMeter(["loss"], accelerator), 0
    for line, values in zip(lines, expected, strict=True):
        count(loss_meter, step, line)
        step += len(line)
        reading = loss_meter.read()
        assert (reading.skipped, reading.longest_skip_streak, reading.last_skipped_step) == values
    count(loss_meter, step, "..")
    reading = loss_meter.read()
    assert (reading.skipped, reading.longest_skip_streak) == (0, 0)


@pytest.mark.parametrize("before", ["..x.", "x.xx", "xx"])
def test_saved_meter_continues(accelerator, before):
    loss_meter, other = LossMeter(["loss"], accelerator), LossMeter(["loss"], accelerator)
    close(loss_meter, 0, 3.0, grad_norm=0.25)
    count(loss_meter, 1, before)
    saved = {name: tensor.clone() for name, tensor in loss_meter.state().items()}
    other.load(saved)
    for each in (loss_meter, other):
        count(each, 1 + len(before), "x.x")
    assert equal(loss_meter.state(), other.state())
    assert other.read() == loss_meter.read()
