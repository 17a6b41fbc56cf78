"""Accelerator."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from scripts import demo_config
from torch import Tensor, nn

from latentdiff.data.batches import BatchPlan
from latentdiff.training.accelerator import fit_micro_batch, start_accelerator


def test_start_prints_device_precision_and_batch(tmp_path, capsys):
    started, plan = start_accelerator(demo_config(tmp_path, "train.batch_size=12", "train.micro_batch_size=4"))
    assert plan == BatchPlan(12, 4, 1) and plan.accumulation == 3
    assert started.mixed_precision == "no" and started.trackers == []
    assert capsys.readouterr().out == (
        f"{started.device}, 1 process(es), precision fp32 (set in the config); "
        "batch 12 = 4 x 1 processes x 3 accumulated\n"
    )
    for whole in ("null", "auto"):
        config = demo_config(tmp_path, "train.batch_size=12", f"train.micro_batch_size={whole}")
        assert start_accelerator(config)[1] == BatchPlan(12, 12, 1)
    with pytest.raises(ValueError, match="^train.batch_size 12 is not divisible by train.micro_batch_size 5"):
        start_accelerator(demo_config(tmp_path, "train.batch_size=12", "train.micro_batch_size=5"))
    assert list(tmp_path.iterdir()) == []


def test_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    with pytest.raises(ValueError) as error:
        start_accelerator(demo_config(tmp_path, "logging.log_with=[wandb]"))
    assert str(error.value) == "logging.log_with has wandb, which is not installed: pip install wandb"


def allocate_too_much() -> None:
    torch.empty(10**15)


def fitting(model: nn.Module, largest: int, tried: list[int]) -> Callable[[int], Tensor]:
    """The loss of a forward pass that fits into memory up to `largest` images."""

    def trial(micro: int) -> Tensor:
        tried.append(micro)
        assert all(p.grad is None for p in model.parameters())
        loss = model(torch.ones(micro, 3)).sum()
        if micro > largest:
            loss.backward()
            allocate_too_much()
        return loss

    return trial


@pytest.mark.runs
@pytest.mark.parametrize(
    ("plan", "largest", "tries", "micro"),
    [
        (BatchPlan(12, 12, 1), 12, [12], 12),
        (BatchPlan(12, 12, 1), 5, [12, 6, 4], 4),
        (BatchPlan(18, 9, 2), 8, [9, 3], 3),  # of two processes nine each
        (BatchPlan(7, 7, 1), 6, [7, 1], 1),
    ],
)
def test_largest_micro_batch_that_fits(accelerator, capsys, plan, largest, tries, micro):
    model, tried = nn.Linear(3, 2), []
    found = fit_micro_batch(accelerator, plan, model, fitting(model, largest, tried))
    assert tried == tries
    assert found == BatchPlan(plan.batch_size, micro, plan.processes)
    assert all(p.grad is None for p in model.parameters())
    assert capsys.readouterr().out == f"largest micro-batch that fits: {found}\n"


@pytest.mark.runs
def test_a_model_too_large_for_one_image_is_refused(accelerator):
    model, tried = nn.Linear(3, 2), []
    with pytest.raises(ValueError, match="^not even one image at a time fits into memory; use a smaller model"):
        fit_micro_batch(accelerator, BatchPlan(4, 4, 1), model, fitting(model, 0, tried))
    assert tried == [4, 2, 1] and all(p.grad is None for p in model.parameters())


def test_other_errors_of_the_trial_are_raised(accelerator):
    model, tried = nn.Linear(3, 2), []

    def broken(micro: int) -> Tensor:
        tried.append(micro)
        model(torch.ones(micro, 3)).sum().backward()
        return model(torch.ones(micro, 4)).sum()

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit_micro_batch(accelerator, BatchPlan(6, 6, 1), model, broken)
    assert tried == [6] and all(p.grad is None for p in model.parameters())
