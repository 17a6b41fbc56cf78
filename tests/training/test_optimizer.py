"""Optimizer."""

import pytest
import torch
from states import equal, moments, new_state, train, weights
from tiny import tiny_text_encoder, tiny_unet, tiny_vae
from torch import nn

from latentdiff.config import OptimizerConfig
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.training.optimizer import (
    apply_gradients,
    backward,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)


def test_learning_rate_warms_up_then_stays():
    config = OptimizerConfig(lr=0.8, warmup_steps=4)
    rates = [learning_rate_at(step, 100, config) for step in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8], rel=1e-12)
    assert learning_rate_at(99, 100, config) == 0.8
    assert learning_rate_at(0, 100, OptimizerConfig(lr=0.8)) == 0.8  # no warm-up by default


@pytest.mark.parametrize("warmup", [0, 20])
def test_cosine_learning_rate(warmup):
    config = OptimizerConfig(lr=1.0, lr_schedule="cosine", warmup_steps=warmup, min_lr=0.2)
    total = 100 + warmup
    assert learning_rate_at(warmup, total, config) == pytest.approx(1.0, rel=1e-12)
    assert learning_rate_at(warmup + 25, total, config) == pytest.approx(0.6 + 0.4 * 0.5**0.5, rel=1e-12)
    assert learning_rate_at(warmup + 50, total, config) == pytest.approx(0.6, rel=1e-12)
    assert learning_rate_at(total, total, config) == pytest.approx(0.2, rel=1e-12)
    assert learning_rate_at(total + 5, total, config) == pytest.approx(0.2, rel=1e-12)
    rates = [learning_rate_at(step, total, config) for step in range(warmup, total + 1)]
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


def test_linear_learning_rate():
    config = OptimizerConfig(lr=1.0, lr_schedule="linear", warmup_steps=2, min_lr=0.2)
    rates = [learning_rate_at(step, 10, config) for step in range(12)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2], rel=1e-12)
    assert learning_rate_at(5, 10, OptimizerConfig(lr=1.0, lr_schedule="linear")) == 0.5  # to 0 by default


def test_staged_learning_rate():
    """Stages are counted from step 0, also under a warm-up; the last one lasts until the end."""
    stages = ((0.8, 3), (0.4, 2), (0.1, 1))
    config = OptimizerConfig(lr_schedule="staged", lr_stages=stages)
    assert [learning_rate_at(step, 9, config) for step in range(9)] == [0.8] * 3 + [0.4] * 2 + [0.1] * 4
    config = OptimizerConfig(lr_schedule="staged", lr_stages=stages, warmup_steps=4)
    rates = [learning_rate_at(step, 9, config) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.4, 0.4, 0.1], rel=1e-12)


def test_warmup_longer_than_the_run():
    config = OptimizerConfig(lr=1.0, lr_schedule="cosine", warmup_steps=10)
    assert [learning_rate_at(step, 4, config) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_backward_weighs_a_micro_batch(accelerator):
    model = nn.Linear(2, 1, bias=False)
    for weight in (0.25, 0.75):
        backward(accelerator, model(torch.tensor([[4.0, 8.0]])).sum(), weight)
    assert torch.equal(model.weight.grad, torch.tensor([[4.0, 8.0]]))


@pytest.mark.parametrize(
    "build",
    [
        tiny_vae,
        lambda: TextConditionedUNet(tiny_unet(), tiny_text_encoder()),
        lambda: TextConditionedUNet(tiny_unet(), None),
    ],
    ids=["vae", "unet and text encoder", "unet"],
)
def test_optimizer_has_every_trained_parameter_once(build):
    model = build()
    config = OptimizerConfig(lr=1e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    frozen = next(model.parameters()).requires_grad_(False)
    optimizer = build_optimizer(model, config)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(held) == len(set(held)) == len(trained) and set(held) == set(trained) and frozen not in set(held)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p in decay:
                norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)
                assert decay[p] == (0.0 if norm or name == "bias" else 0.3), (type(module), name)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.0, (0.8, 0.9), 1e-6)  # the loop sets the rate
    assert set_learning_rate(optimizer, 0.5) == 0.5
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_clip_gradients(accelerator):
    model = nn.Linear(3, 1, bias=False)
    for limit, expected in [(None, 5.0), (10.0, 5.0), (1.0, 1.0)]:
        model.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
        assert float(clip_gradients(accelerator, model, limit)) == pytest.approx(5.0)
        assert model.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spoilt", [(0,), (2,), (1, 2)])
def test_skipped_step_changes_nothing(accelerator, spoilt):
    """Weights, moments and Adam's step counter are as they were, and the steps after are those of a run without it."""
    state, without = new_state(accelerator), new_state(accelerator)
    first, after = spoilt[0], spoilt[-1] + 1
    train(state, first)
    before, moments_before = weights(state.model), moments(state)
    train(state, after, spoilt)
    assert state.step == after and equal(weights(state.model), before)
    if first > 0:
        assert equal(moments(state), moments_before)
    else:
        assert all(not value.any() for value in moments(state).values())
    assert all(p.grad is None for p in state.model.parameters())
    train(without, first)
    without.step = after
    for each in (state, without):
        train(each, after + 2)
    assert equal(weights(state.model), weights(without.model)) and equal(moments(state), moments(without))
    assert not equal(weights(state.model), before)


@pytest.mark.parametrize("fused", [True, False])
def test_apply_gradients(accelerator, fused):
    """Also without a fused kernel, as on devices that have none."""
    model = nn.Linear(3, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.25, fused=fused))
    nn.init.ones_(model.weight)
    for skip, expected in [(1.0, 1.0), (0.0, 0.7475), (1.0, 0.7475)]:  # lr 0.25, and 0.25 * 0.01 of weight decay
        model.weight.grad = torch.full((1, 3), float("nan") if skip else 2.0)
        apply_gradients(accelerator, optimizer, torch.tensor(skip))
        assert model.weight.grad is None
        assert model.weight.tolist() == [pytest.approx([expected] * 3, rel=1e-6)]
    assert optimizer.state[model.weight]["step"].item() == 1.0
