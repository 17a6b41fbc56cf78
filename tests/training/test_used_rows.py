"""The rows of the token embedding that a training uses."""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from states import equal, weights
from tiny import normal, tiny_text_encoder, tiny_unet

from latentdiff.config import OptimizerConfig
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.training.ema import EMA
from latentdiff.training.optimizer import apply_gradients, build_optimizer, clip_gradients, set_learning_rate
from latentdiff.training.posthoc_ema import PowerEMA
from latentdiff.training.used_rows import UsedRows

START, END = 49406, 49407
CAPTIONS = [[START, word, END, END] for word in (320, 7, 320, 12, 40000, 7)]
USED = [{320, START, END}, {320, 7, START, END}, {320, 7, START, END}, {320, 7, 12, START, END}]


class Training:
    """Stage 2's updates of tiny networks, on one caption in each micro-batch, two of them in a step."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.accelerator = Accelerator(cpu=True)
        network = TextConditionedUNet(tiny_unet(), tiny_text_encoder()).requires_grad_(True)
        self.network, self.optimizer = self.accelerator.prepare(network, build_optimizer(network, config))
        self.ema, self.power_ema = EMA(self.network), PowerEMA(self.network, [0.1])
        averages = [self.ema.average, *self.power_ema.averages.values()]
        self.rows = UsedRows(self.network, self.optimizer, averages, self.accelerator)
        self.table = self.network.text_encoder.token_vectors
        self.max_grad_norm = config.max_grad_norm

    def step(self, step: int, *, shrink: bool, skip: bool = False) -> int:
        """Returns how many rows the optimiser saw."""
        set_learning_rate(self.optimizer, 0.01)
        for caption in (CAPTIONS[step], CAPTIONS[max(0, step - 1)]):
            ids = torch.tensor([caption])
            self.rows.add(ids)
            output = self.network(normal(1, 4, 8, 8, seed=step), torch.tensor([100 * step]), ids)
            self.accelerator.backward(output.square().mean())
        clip_gradients(self.accelerator, self.network, self.max_grad_norm)
        with self.rows.only() if shrink else nullcontext():
            seen = len(self.table)
            apply_gradients(self.accelerator, self.optimizer, torch.tensor(float(skip)))
            self.ema.update(self.network, 0.9)
            self.power_ema.update(self.network, step)
        return seen

    def state(self) -> dict[str, torch.Tensor]:
        moments = {f"moment {key}": t.clone() for key, t in self.optimizer.state[self.table].items()}
        averages = {f"average {name}": t.clone() for name, t in self.ema.average.items()}
        return {**weights(self.network), **moments, **averages, **self.power_ema.state()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_other_rows_need_no_work(kind):
    """All is the same, bit for bit, also where a step is skipped; the first step makes the moments."""
    config = OptimizerConfig(kind=kind, lr=0.01, weight_decay=0.0)
    plain, shrunk = Training(config), Training(config)
    before = shrunk.table.detach().clone()
    for step in range(4):
        assert plain.step(step, shrink=False, skip=step == 2) == 49408
        assert shrunk.step(step, shrink=True, skip=step == 2) == (49408 if step == 0 else len(USED[step]))
        assert equal(plain.state(), shrunk.state())
    changed = (shrunk.table != before).any(dim=1).nonzero().flatten()
    assert set(changed.tolist()) == USED[3]


def test_rows_of_earlier_steps_are_found_again():
    """After a resume rows that the captions no longer have still move, by their moments, and so do their averages."""
    config = OptimizerConfig(lr=0.01, weight_decay=0.0, max_grad_norm=None)
    first = Training(config)
    for step in range(4):
        first.step(step, shrink=True)
    resumed = Training(config)
    resumed.network.load_state_dict(first.network.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    resumed.ema.load(first.ema.average)
    resumed.power_ema.load(first.power_ema.state())
    for step in (4, 5):
        assert resumed.step(step, shrink=True) == first.step(step, shrink=True) == 6
        assert equal(first.state(), resumed.state())


def test_weight_decay_changes_every_row():
    training = Training(OptimizerConfig(lr=0.01, weight_decay=0.1))
    before = training.table.detach().clone()
    assert [training.step(step, shrink=True) for step in range(2)] == [49408, 49408]
    torch.testing.assert_close(training.table[1000], before[1000] * (1 - 0.01 * 0.1) ** 2, rtol=1e-6, atol=0)


def test_an_interrupted_step_leaves_the_table_whole():
    training = Training(OptimizerConfig(lr=0.01, weight_decay=0.0))
    training.step(0, shrink=True)
    before = training.state()
    training.rows.add(torch.tensor([CAPTIONS[1]]))
    training.table.grad = torch.ones_like(training.table)
    with pytest.raises(KeyboardInterrupt), training.rows.only():
        assert len(training.table) == 4
        raise KeyboardInterrupt
    assert equal(training.state(), before) and training.table.shape == (49408, 16)
