"""Ema."""

import pytest
import torch
from states import equal, small_model, weights
from torch import nn

from latentdiff.training.ema import EMA, ema_decay_at, make_full_copy


def test_ema_decay():
    assert [ema_decay_at(step, 0.999) for step in (0, 1, 8, 89)] == pytest.approx([2 / 11, 3 / 12, 10 / 19, 91 / 100])
    decays = [ema_decay_at(step, 0.99) for step in range(2000)]
    assert all(a <= b for a, b in zip(decays, decays[1:], strict=False)) and decays[-1] == 0.99
    assert decays.index(0.99) == 889  # (1 + n) / (10 + n) = 0.99 at n = 890
    assert ema_decay_at(5, 0.0) == 0.0


def test_ema_equals_the_formula():
    model = small_model()
    ema = EMA(model)
    expected = {name: p.double() for name, p in weights(model).items()}
    for decay in (0.0, 0.5, 0.9, 0.25):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        ema.update(model, decay)
        expected = {name: decay * expected[name] + (1 - decay) * p.double() for name, p in weights(model).items()}
    for name in expected:
        torch.testing.assert_close(ema.average[name].double(), expected[name], atol=1e-6, rtol=1e-6)
    model.requires_grad_(True)
    own = weights(model)
    ema.copy_to(model)
    assert equal(weights(model), ema.average) and not equal(own, ema.average)


def test_ema_is_float32_whatever_the_weights_are():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model)
    nn.init.constant_(model.weight, 2.0)
    ema.update(model, 0.999)
    assert ema.average["weight"].dtype == torch.float32
    assert ema.average["weight"].item() == pytest.approx(1.001, abs=1e-6)  # in bf16 it would still be 1


@pytest.mark.parametrize("fail", [False, True])
def test_ema_applied_restores_bit_for_bit(fail):
    model = small_model()
    ema = EMA(model)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    own, average = weights(model), {name: tensor.clone() for name, tensor in ema.average.items()}
    parameters = list(model.parameters())
    try:
        with ema.applied(model) as averaged:
            assert averaged is model and equal(weights(model), average)
            if fail:
                raise RuntimeError("out of memory")
    except RuntimeError:
        assert fail
    assert equal(weights(model), own) and equal(ema.average, average)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))  # the optimiser's


def test_ema_into_a_full_copy_does_not_change_the_trained_model():
    model, full_copy = small_model(), small_model(seed=1)
    ema = EMA(model, full_copy)
    with torch.no_grad():
        model[3].weight.add_(1.0)
    own = weights(model)
    with ema.applied(model) as averaged:
        assert averaged is full_copy and equal(weights(full_copy), ema.average)
        assert equal(weights(model), own) and not equal(own, ema.average)
    assert ema.averaged_model(model) is full_copy and equal(weights(model), own)
    whole = EMA(model)
    assert whole.averaged_model(model) is model and equal(weights(model), whole.average)


def test_ema_has_the_trained_parameters_only_and_refuses_others():
    model = small_model()
    model[0].requires_grad_(False)
    ema = EMA(model)
    assert ema.average.keys() == {"1.weight", "1.bias", "3.weight", "3.bias"}
    frozen = model[0].weight.clone()
    ema.copy_to(model)
    assert torch.equal(model[0].weight, frozen)
    model[0].requires_grad_(True)
    for use in (
        lambda: ema.update(model, 0.5),
        lambda: ema.copy_to(model),
        lambda: ema.load(weights(model)),
        lambda: ema.applied(model).__enter__(),
    ):
        with pytest.raises(AssertionError, match="the EMA is of another model"):
            use()


def test_an_unsharded_model_needs_no_full_copy(accelerator):
    assert make_full_copy(small_model(), accelerator) is None
