"""What both training loops share: randomness, schedules, averages, checkpoints, loss_meter, signals, logs and set-up."""

import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import pytest
import safetensors
import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_text_encoder, tiny_unet, tiny_vae
from torch import Tensor, nn

import latentdiff
from latentdiff import devices
from latentdiff.config import DataConfig, OptimizerConfig, OutputConfig, VAETrainingConfig, load_config
from latentdiff.data.batches import BatchPlan, StepBatches
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.devices import choose_precision
from latentdiff.distributed import fill, gather_whole
from latentdiff.figures.grids import image_grid
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.randomness import Stream, normal, seed_for, spread_timesteps, uniform
from latentdiff.training.accelerator import fit_micro_batch, start
from latentdiff.training.checkpoint import (
    TrainingState,
    checkpoint_folder,
    expected_size,
    list_checkpoints,
    require_disk_space,
    resume,
    save_checkpoint,
)
from latentdiff.training.ema import EMA, ema_decay_at, make_full_copy
from latentdiff.training.logging import MetricsLog, ThroughputMeter
from latentdiff.training.loss_meter import LossMeter, Window
from latentdiff.training.optimizer import (
    apply_gradients,
    backward,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from latentdiff.training.posthoc_ema import SNAPSHOTS, PowerEMA
from latentdiff.training.run import check_skipped, due, record, summary, write_snapshot
from latentdiff.training.stopping import SIGNALS, StopRequest
from latentdiff.training.unet_inputs import caption_dropout_at


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


# --- randomness ---

# BLAKE2b of the numbers as little-endian 64-bit integers, its 8 bytes as a little-endian integer, less the last bit.
SEEDS = {
    (0,): 893442142816765029,
    (0, 5, 0, 0): 8044598539339383266,
    (1, 2, 3): 6520558355739401531,
    (-1,): 1623352975185328750,
    (2**63 - 1, 5, 10**6, 255): 2177241496898798761,
}
PURPOSES = ["INIT", "ORDER", "CROP_FLIP", "POSTERIOR", "TIMESTEPS", "NOISE", "CAPTION_DROPOUT", "HOLDOUT", "TEXT_INIT"]


def test_seeds_are_what_they_always_were():
    """A changed value would change what every run with a given seed does, and break its resume."""
    assert {numbers: seed_for(*numbers) for numbers in SEEDS} == SEEDS
    assert [Stream(number).name for number in range(len(PURPOSES))] == PURPOSES


def test_seeds_do_not_depend_on_the_process():
    code = "from latentdiff.training.randomness import seed_for; print([seed_for(*n) for n in {}])"
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
def test_draws_belong_to_their_slot(name):
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


def test_draws_have_their_distribution():
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
    # Within a batch the gaps are T / 16, whatever the offset, the one around the end of the schedule included.
    for batch in batches:
        places = batch.sort().values
        gaps = torch.cat([places.diff(), places[:1] + 1000 - places[-1:]])
        assert 62 <= gaps.min() and gaps.max() <= 63
    assert len({tuple(batch.tolist()) for batch in batches}) > 40  # an offset is one of 62.5 places
    # A micro-batch gets its sample_indices' own.
    assert torch.equal(spread_timesteps(1000, 0, 7, [3, 12], 16), batches[7][[3, 12]])


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    for draw in DRAWS.values():
        draw(Stream.NOISE, 0, range(4))
    list(StepBatches(9, BatchPlan(4, 4, 1), 0, 0, 0, 3))
    assert torch.equal(torch.get_rng_state(), before)


# --- schedules ---


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
    """Stages are counted from step 0, also under a warm-up; the last one goes on."""
    stages = ((0.8, 3), (0.4, 2), (0.1, 1))
    config = OptimizerConfig(lr_schedule="staged", lr_stages=stages)
    assert [learning_rate_at(step, 9, config) for step in range(9)] == [0.8] * 3 + [0.4] * 2 + [0.1] * 4
    config = OptimizerConfig(lr_schedule="staged", lr_stages=stages, warmup_steps=4)
    rates = [learning_rate_at(step, 9, config) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.4, 0.4, 0.1], rel=1e-12)


def test_caption_dropout_over_the_steps():
    """One share stays, two are joined by a line that reaches the second one at the last step."""
    assert [caption_dropout_at(step, 4, 0.3) for step in range(4)] == [0.3] * 4
    shares = [caption_dropout_at(step, 10, (1.0, 0.1)) for step in range(12)]
    assert shares == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1], rel=1e-12)
    assert caption_dropout_at(0, 1, (1.0, 0.1)) == 1.0


def test_warmup_longer_than_the_run():
    config = OptimizerConfig(lr=1.0, lr_schedule="cosine", warmup_steps=10)
    assert [learning_rate_at(step, 4, config) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_ema_decay():
    assert [ema_decay_at(step, 0.999) for step in (0, 1, 8, 89)] == pytest.approx([2 / 11, 3 / 12, 10 / 19, 91 / 100])
    decays = [ema_decay_at(step, 0.99) for step in range(2000)]
    assert all(a <= b for a, b in zip(decays, decays[1:], strict=False)) and decays[-1] == 0.99
    assert decays.index(0.99) == 889  # (1 + n) / (10 + n) = 0.99 at n = 890
    assert ema_decay_at(5, 0.0) == 0.0


# --- EMA ---


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_ema_into_a_spare_model_leaves_the_trained_one_alone():
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


# --- checkpoints ---

SETTINGS = {"model.block_out_channels": (8, 16), "model.scaling_factor": 0.5, "text.pretrained": None}
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)
LENGTHS = (0.05, 0.1)
FILES = ["ema", "model", "optimizer", "loss_meter"]


def output(keep: int = 9, keep_every: int | None = None) -> OutputConfig:
    return OutputConfig(folder="not used here", checkpoint_every=1, keep=keep, keep_every=keep_every)


def new_state(
    accelerator: Accelerator,
    seed: int = 0,
    lengths: tuple[float, ...] = (),
    config: Mapping[str, object] | None = None,
    **settings: object,
) -> TrainingState:
    """Of a small model; with power-function averages if it is given `lengths`."""
    model = small_model(seed).to(memory_format=torch.channels_last)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER))
    power_ema = PowerEMA(model, lengths) if lengths else None
    loss_meter = LossMeter(["loss"], accelerator)
    return TrainingState(model, EMA(model), optimizer, SETTINGS | settings, config or {}, power_ema, loss_meter)


def train(state: TrainingState, stop: int, spoilt: tuple[int, ...] = ()) -> None:
    """Optimiser steps as in the training loops; batch, learning rate and EMA decay are functions of the step.

    The loss is NaN in those of `spoilt`.
    """
    accelerator = state.loss_meter.accelerator
    for step in range(state.step, stop):
        set_learning_rate(state.optimizer, 1e-2 / (1 + step))
        loss = state.model(normal((2, 4, 4), 0, Stream.NOISE, step, range(5))).square().mean()
        loss = loss * float("nan") if step in spoilt else loss
        accelerator.backward(loss)
        state.loss_meter.add([loss], share=1.0)
        grad_norm = clip_gradients(accelerator, state.model, 1.0)
        apply_gradients(accelerator, state.optimizer, skip=state.loss_meter.close(step, grad_norm))
        state.ema.update(state.model, ema_decay_at(step, 0.9))
        if state.power_ema is not None:
            state.power_ema.update(state.model, step)
        state.step = step + 1


def trained(
    run: Path, accelerator: Accelerator, *steps: int, keep: int = 9, keep_every: int | None = None, **options: object
) -> TrainingState:
    """A state that was trained and saved at each of `steps`."""
    state = new_state(accelerator, **options)
    for step in steps:
        train(state, step)
        save_checkpoint(run, state, output(keep, keep_every), accelerator)
    return state


def moments(state: TrainingState) -> dict[str, Tensor]:
    return {
        f"{name}:{key}": value.clone()
        for name, p in state.model.named_parameters()
        for key, value in state.optimizer.state.get(p, {}).items()
    }


def same_state(a: TrainingState, b: TrainingState) -> bool:
    """Bit for bit."""
    parts = [[weights(s.model), s.ema.average, moments(s), s.loss_meter.state()] for s in (a, b)]
    for part, state in zip(parts, (a, b), strict=True):
        part.append({} if state.power_ema is None else state.power_ema.state())
    return a.step == b.step and all(equal(one, other) for one, other in zip(*parts, strict=True))


def steps_in(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in list_checkpoints(run)]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest_of(run: Path, step: int) -> dict[str, object]:
    return json.loads((checkpoint_folder(run, step) / "manifest.json").read_text(encoding="utf-8"))


def test_resumed_training_equals_uninterrupted_training(tmp_path, accelerator):
    straight = new_state(accelerator)
    train(straight, 7)
    saved = trained(tmp_path, accelerator, 4)
    resumed = new_state(accelerator, seed=1)
    parameters = list(resumed.model.parameters())
    assert resume(tmp_path, resumed, "latest", accelerator)
    assert resumed.step == 4 and same_state(resumed, saved)
    assert all(a is b for a, b in zip(resumed.model.parameters(), parameters, strict=True))
    moment = resumed.optimizer.state[resumed.model[0].weight]["exp_avg"]
    assert moment.stride() == resumed.model[0].weight.stride()  # channels last, like the weight
    train(resumed, 7)
    assert same_state(resumed, straight)
    # The optimiser's state matters: without it the same weights go elsewhere.
    other = new_state(accelerator, seed=1)
    resume(tmp_path, other, "latest", accelerator)
    other.optimizer.state.clear()
    train(other, 7)
    assert not equal(weights(other.model), weights(straight.model))


def test_averages_and_tally_go_on_bit_for_bit(tmp_path, accelerator):
    """Saved between two lines of the log, just after a step that was skipped."""
    straight = new_state(accelerator, lengths=LENGTHS)
    train(straight, 7, spoilt=(3, 4))
    saved = new_state(accelerator, lengths=LENGTHS)
    train(saved, 4, spoilt=(3, 4))
    save_checkpoint(tmp_path, saved, output(), accelerator)
    resumed = new_state(accelerator, seed=1, lengths=LENGTHS)
    resume(tmp_path, resumed, "latest", accelerator)
    assert same_state(resumed, saved)
    train(resumed, 7, spoilt=(3, 4))
    assert same_state(resumed, straight)
    reading = resumed.loss_meter.read()
    assert reading == straight.loss_meter.read()
    assert (reading.skipped, reading.longest_skip_streak, reading.last_skipped_step) == (2, 2, 4)


def test_frozen_parameters_are_saved_without_average_and_moments(tmp_path, accelerator):
    def state_of(seed: int) -> TrainingState:
        model = small_model(seed)
        model[0].requires_grad_(False)
        model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER))
        return TrainingState(model, EMA(model), optimizer, {}, loss_meter=LossMeter(["loss"], accelerator))

    saved, loaded = state_of(0), state_of(1)
    train(saved, 2)
    save_checkpoint(tmp_path, saved, output(), accelerator)
    resume(tmp_path, loaded, "latest", accelerator)
    assert same_state(loaded, saved) and not loaded.model[0].weight.requires_grad


def test_folder_holds_safetensors_and_json_only(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2)
    folder = checkpoint_folder(tmp_path, 2)
    assert folder == tmp_path / "checkpoints" / "step_00000002"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder] == []
    assert names_in(folder) == [
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "loss_meter.safetensors",
    ]
    trained(tmp_path, accelerator, 3, lengths=LENGTHS)
    assert "power_ema.safetensors" in names_in(checkpoint_folder(tmp_path, 3))


def test_manifest(tmp_path, accelerator):
    config = {"train": {"steps": 9, "betas": (0.5, 0.75)}, "vae": "größer"}
    trained(tmp_path, accelerator, 2, config=config)
    as_text = '{"train": {"betas": [0.5, 0.75], "steps": 9}, "vae": "gr\\u00f6\\u00dfer"}'
    files = [checkpoint_folder(tmp_path, 2) / f"{name}.safetensors" for name in FILES]
    manifest = manifest_of(tmp_path, 2)
    manifest["versions"]["torch"] = manifest["versions"]["torch"].partition("+")[0]  # of whichever build
    assert manifest == {
        "step": 2,
        "pending": True,
        "settings": SETTINGS | {"model.block_out_channels": [8, 16]},
        "config": {"train": {"steps": 9, "betas": [0.5, 0.75]}, "vae": "größer"},
        "config_sha256": hashlib.sha256(as_text.encode()).hexdigest(),
        "versions": {
            "latentdiff": latentdiff.__version__,
            "python": sys.version.split()[0],
            "accelerate": accelerate.__version__,
            "safetensors": safetensors.__version__,
            "torch": torch.__version__.partition("+")[0],
        },
        "scaler": None,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }


def test_config_digest_tells_configs_apart(tmp_path, accelerator):
    config = {"train": {"steps": 9, "seed": 0}}
    others = [{"train": {"seed": 0, "steps": 9}}, {"train": {"steps": 9, "seed": 1}}]
    digests = []
    for number, each in enumerate([config, *others]):
        trained(tmp_path / str(number), accelerator, 1, config=each)
        digests.append(manifest_of(tmp_path / str(number), 1)["config_sha256"])
    assert digests[0] == digests[1] != digests[2]  # the keys' order says nothing


@pytest.mark.parametrize("pending", [True, False])
def test_pending_is_kept(tmp_path, accelerator, pending):
    """Whether the validation at the checkpoint's step is still to be made."""
    state = new_state(accelerator)
    state.pending = pending
    save_checkpoint(tmp_path, state, output(), accelerator)
    loaded = new_state(accelerator)
    loaded.pending = not pending
    resume(tmp_path, loaded, "latest", accelerator)
    assert loaded.pending is pending


# --- checkpoints: which are kept, and what a kill leaves ---


def test_only_the_newest_are_kept(tmp_path, accelerator):
    trained(tmp_path, accelerator, 1, 2, 3, 10, keep=2)
    assert steps_in(tmp_path) == [3, 10]


def test_every_so_manieth_is_kept_for_good(tmp_path, accelerator):
    state = trained(tmp_path, accelerator, *range(1, 9), keep=2, keep_every=3)
    assert steps_in(tmp_path) == [3, 6, 7, 8]
    train(state, 9)
    save_checkpoint(tmp_path, state, output(1, keep_every=6), accelerator)
    assert steps_in(tmp_path) == [6, 9]
    train(state, 10)
    save_checkpoint(tmp_path, state, output(1), accelerator)
    assert steps_in(tmp_path) == [10]


def test_step_that_is_saved_already_is_left_as_it_is(tmp_path, accelerator):
    state = trained(tmp_path, accelerator, 1, 2)
    folder = checkpoint_folder(tmp_path, 2)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder, *folder.iterdir())}
    save_checkpoint(tmp_path, state, output(1), accelerator)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder, *folder.iterdir())} == before
    assert names_in(tmp_path / "checkpoints") == ["step_00000001", "step_00000002"]


def test_interrupted_save_leaves_the_last_good_one(tmp_path, accelerator):
    state = trained(tmp_path, accelerator, 2)
    # What a save at step 4 leaves that was killed between two files.
    leftover = tmp_path / "checkpoints" / ".step_00000004.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half of it")
    (tmp_path / "checkpoints" / "step_note.txt").write_text("not a checkpoint", encoding="utf-8")
    assert steps_in(tmp_path) == [2]
    again = new_state(accelerator, seed=1)
    assert resume(tmp_path, again, "latest", accelerator) and same_state(again, state)
    train(again, 4)
    save_checkpoint(tmp_path, again, output(2), accelerator)
    assert steps_in(tmp_path) == [2, 4] and not leftover.exists()
    other = new_state(accelerator, seed=1)
    assert resume(tmp_path, other, "latest", accelerator) and same_state(other, again)


def test_leftovers_of_killed_runs_are_removed(tmp_path, accelerator):
    state = trained(tmp_path, accelerator, 2)
    for name in (".step_00000009.tmp", ".step_00000001.old", ".note"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"half of it")
    train(state, 3)
    save_checkpoint(tmp_path, state, output(), accelerator)
    assert names_in(tmp_path / "checkpoints") == [".note", "step_00000002", "step_00000003"]


def test_killed_while_it_removes_an_old_one(tmp_path, accelerator, monkeypatch):
    """Half a checkpoint must not look like one: it is renamed before its files go."""
    state = trained(tmp_path, accelerator, 1, keep=1)

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "ema.safetensors").unlink()
            raise KeyboardInterrupt

    train(state, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        save_checkpoint(tmp_path, state, output(1), accelerator)
    assert names_in(tmp_path / "checkpoints") == [".step_00000001.old", "step_00000002"]
    other = new_state(accelerator, seed=1)
    assert resume(tmp_path, other, "latest", accelerator) and same_state(other, state)
    train(state, 3)
    save_checkpoint(tmp_path, state, output(1), accelerator)
    assert names_in(tmp_path / "checkpoints") == ["step_00000003"]


# --- checkpoints: the disk ---


def disk_with(free: int) -> Callable[[Path], SimpleNamespace]:
    return lambda folder: SimpleNamespace(free=free)


def test_full_disk_is_told_before_anything_is_written(tmp_path, accelerator, monkeypatch):
    state = trained(tmp_path, accelerator, 2)
    saved = new_state(accelerator)
    train(state, 3)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk_with(free=10_000_000))
        with pytest.raises(ValueError, match=r"^a checkpoint needs 0\.00 GB, but .* has only 0\.01 GB free; make room"):
            save_checkpoint(tmp_path, state, output(1), accelerator)
    assert names_in(tmp_path / "checkpoints") == ["step_00000002"]
    resume(tmp_path, saved, "latest", accelerator)
    assert saved.step == 2
    save_checkpoint(tmp_path, state, output(1), accelerator)  # there is room again
    assert steps_in(tmp_path) == [3]


def test_disk_space_that_is_required(tmp_path, monkeypatch):
    """Five percent and 16 MiB more than the tensors; on the disk where the folder will be."""
    run, needed = tmp_path / "not" / "yet", 3_500_000_000
    enough = 3_675_000_000 + 2**24
    for free in (enough, 2 * enough):
        monkeypatch.setattr(shutil, "disk_usage", disk_with(free))
        require_disk_space(run, needed)
    for free, told in ((enough - 1, "3.69"), (1_250_000_000, "1.25"), (0, "0.00")):
        monkeypatch.setattr(shutil, "disk_usage", disk_with(free))
        with pytest.raises(ValueError) as error:
            require_disk_space(run, needed)
        assert str(error.value) == (
            f"a checkpoint needs 3.50 GB, but {run} has only {told} GB free; make room, lower output.keep, or choose "
            "another output.folder (the checkpoints that are there stay good)"
        )
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=enough))
    require_disk_space(run, needed)
    assert asked == [tmp_path.resolve()] and not run.exists()


@pytest.mark.parametrize("lengths", [(), LENGTHS], ids=["no snapshots", "snapshots"])
def test_expected_size_is_that_of_the_files(tmp_path, accelerator, lengths):
    """With a frozen part and with buffers, in bf16, which have no moments and no averages."""
    model = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.Linear(256, 512).to(torch.bfloat16))
    model[2].requires_grad_(False)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER))
    power_ema = PowerEMA(model, lengths) if lengths else None
    state = TrainingState(model, EMA(model), optimizer, {}, {}, power_ema, LossMeter(["loss"], accelerator), step=1)
    model[:2](torch.ones(3, 256)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, state, output(), accelerator)
    written = sum(path.stat().st_size for path in checkpoint_folder(tmp_path, 1).iterdir())
    assert written == pytest.approx(expected_size(model, averages=1 + len(lengths)), rel=0.01)


# --- checkpoints: where a run goes on ---


def test_no_checkpoint_yet(tmp_path, accelerator):
    state = new_state(accelerator)
    before = weights(state.model)
    assert not resume(tmp_path, state, "latest", accelerator)
    assert not resume(tmp_path, state, "never", accelerator)
    assert state.step == 0 and equal(weights(state.model), before)
    assert list(tmp_path.iterdir()) == []


def test_never_sets_the_old_checkpoints_aside(tmp_path, accelerator):
    for number in (1, 2):
        trained(tmp_path, accelerator, 2, 3)
        files = {path.name for path in (tmp_path / "checkpoints").rglob("*.safetensors")}
        assert not resume(tmp_path, new_state(accelerator), "never", accelerator)
        assert steps_in(tmp_path) == []
        aside = tmp_path / f"checkpoints.{number}"
        assert {path.name for path in aside.rglob("*.safetensors")} == files
        assert sorted(path.name for path in aside.iterdir()) == ["step_00000002", "step_00000003"]
    # They can still be continued from.
    state = new_state(accelerator)
    assert resume(tmp_path, state, str(tmp_path / "checkpoints.1" / "step_00000002"), accelerator)
    assert state.step == 2


def test_going_back_to_an_earlier_checkpoint(tmp_path, accelerator):
    """The later ones belong to what is now given up: they must neither be found nor crowd out the new ones."""
    trained(tmp_path, accelerator, 2, 4, 6, keep=3)
    state = new_state(accelerator)
    assert resume(tmp_path, state, str(checkpoint_folder(tmp_path, 2)), accelerator)
    assert steps_in(tmp_path) == [2]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.endswith(".1")) == [
        "step_00000004.1",
        "step_00000006.1",
    ]
    train(state, 3)
    save_checkpoint(tmp_path, state, output(1), accelerator)
    assert steps_in(tmp_path) == [3]
    other = new_state(accelerator)
    assert resume(tmp_path, other, "latest", accelerator) and same_state(other, state)


def test_a_copied_checkpoint_folder_can_be_continued(tmp_path, accelerator):
    """A folder from elsewhere, such as another run of the same model, is a start too."""
    state = trained(tmp_path / "a", accelerator, 2)
    shutil.copytree(checkpoint_folder(tmp_path / "a", 2), tmp_path / "start")
    other = new_state(accelerator, seed=1)
    assert resume(tmp_path / "b", other, str(tmp_path / "start"), accelerator)
    assert same_state(other, state) and steps_in(tmp_path / "b") == []


def write_snapshots(run: Path, *steps: int) -> None:
    (run / SNAPSHOTS).mkdir(parents=True)
    for step in steps:
        (run / SNAPSHOTS / f"step_{step:08d}.safetensors").write_bytes(b"a snapshot")


def test_later_snapshots_are_dropped_or_set_aside(tmp_path, accelerator):
    """From the latest checkpoint on they are written again; from an earlier one on they are of what is given up."""
    state = trained(tmp_path, accelerator, 2, 4)
    write_snapshots(tmp_path, 2, 4, 5, 6)
    resume(tmp_path, state, "latest", accelerator)
    assert names_in(tmp_path / SNAPSHOTS) == ["step_00000002.safetensors", "step_00000004.safetensors"]
    resume(tmp_path, state, str(checkpoint_folder(tmp_path, 2)), accelerator)
    assert names_in(tmp_path / SNAPSHOTS) == ["step_00000002.safetensors", "step_00000004.safetensors.1"]


def test_a_run_without_checkpoints_is_set_aside(tmp_path, accelerator):
    """It may be a finished one whose checkpoints were removed to save room: nothing of it is deleted."""
    write_snapshots(tmp_path, 2, 4)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "lr": 0.1}\n', encoding="utf-8")
    assert not resume(tmp_path, new_state(accelerator), "latest", accelerator)
    assert names_in(tmp_path) == ["ema_snapshots.1", "metrics.jsonl.1"]
    # One that got no further than its first validation has nothing to keep.
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "validation/loss": 1.0}\n', encoding="utf-8")
    assert not resume(tmp_path, new_state(accelerator), "latest", accelerator)
    assert names_in(tmp_path) == ["ema_snapshots.1", "metrics.jsonl", "metrics.jsonl.1"]


def test_a_checkpoint_from_elsewhere_sets_the_run_aside(tmp_path, accelerator):
    """Of the same step too: it would be found instead of the new one."""
    trained(tmp_path / "other", accelerator, 2)
    trained(tmp_path / "run", accelerator, 1, 2, 3)
    state = new_state(accelerator, seed=1)
    assert resume(tmp_path / "run", state, str(checkpoint_folder(tmp_path / "other", 2)), accelerator)
    assert names_in(tmp_path / "run") == ["checkpoints.1"]
    save_checkpoint(tmp_path / "run", state, output(), accelerator)
    assert steps_in(tmp_path / "run") == [2]


def test_a_manifest_without_its_keys_is_refused(tmp_path, accelerator):
    trained(tmp_path, accelerator, 1)
    (checkpoint_folder(tmp_path, 1) / "manifest.json").write_text('{"step": 1, "scaler": null}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest.json is not a checkpoint's: it has no config, pending, settings"):
        resume(tmp_path, new_state(accelerator), "latest", accelerator)


def test_never_sets_all_traces_of_the_old_run_aside(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2)
    write_snapshots(tmp_path, 2)
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    (tmp_path / "config.yaml").write_text("written anew at each start", encoding="utf-8")
    resume(tmp_path, new_state(accelerator), "never", accelerator)
    assert names_in(tmp_path) == [
        "checkpoints.1",
        "config.yaml",
        "ema_snapshots.1",
        "metrics.jsonl.1",
        "samples.1",
    ]


def test_changed_config_is_told(tmp_path, accelerator, capsys):
    saved = {
        "vae": "saved/a",
        "data": {"size": 8, "background": (1, 2, 3)},
        "optimizer": {"lr": 1e-3, "lr_stages": None, "eps": 1e-8},
        "train": {"steps": 10, "micro_batch_size": None},
        "logging": {"every": 10},
    }
    changed = {
        "vae": "saved/b",
        "data": {"size": 8, "background": (1, 2, 3), "flip": 0.5},  # no key of its own at that time
        "optimizer": {"lr": None, "lr_stages": ((2e-3, 5),), "eps": 1e-8},
        "train": {"steps": 20, "micro_batch_size": "auto"},
        "logging": {"every": 1},  # no part in the training
        "ema": {"decay": 0.9},
    }
    trained(tmp_path, accelerator, 1, config=saved)
    capsys.readouterr()
    resume(tmp_path, new_state(accelerator, config=saved), "latest", accelerator)
    resumed = f"resumed from {checkpoint_folder(tmp_path, 1)}, step 1\n"
    assert capsys.readouterr().out == resumed
    resume(tmp_path, new_state(accelerator, config=changed), "latest", accelerator)
    assert capsys.readouterr().out == resumed + (
        "  changed since: optimizer.lr 0.001 -> None\n"
        "  changed since: optimizer.lr_stages None -> [[0.002, 5]]\n"
        "  changed since: train.micro_batch_size None -> 'auto'\n"
        "  changed since: train.steps 10 -> 20\n"
        "  changed since: vae 'saved/a' -> 'saved/b'\n"
    )


# --- checkpoints: what is refused ---


def test_changed_settings_are_named(tmp_path, accelerator):
    trained(tmp_path, accelerator, 1)
    changed = new_state(accelerator, **{"model.block_out_channels": (8, 32), "text.pretrained": "clip"})
    before = weights(changed.model)
    with pytest.raises(ValueError) as error:
        resume(tmp_path, changed, "latest", accelerator)
    assert str(error.value) == (
        f"cannot resume from {checkpoint_folder(tmp_path, 1)}: model.block_out_channels was [8, 16], now [8, 32]; "
        "text.pretrained was None, now 'clip'. Restore the config, choose another output.folder, or start anew with "
        "--resume never"
    )
    assert changed.step == 0 and equal(weights(changed.model), before)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "loss_meter.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped byte", "missing"])
def test_damaged_file_is_named(tmp_path, accelerator, name, damage):
    trained(tmp_path, accelerator, 1)
    path = checkpoint_folder(tmp_path, 1) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    else:
        content[-10] ^= 1
        path.write_bytes(content)
    state = new_state(accelerator, seed=1)
    before = weights(state.model)
    with pytest.raises(ValueError) as error:
        resume(tmp_path, state, "latest", accelerator)
    assert str(error.value).startswith(f"{path} is missing or damaged; ")
    assert state.step == 0 and equal(weights(state.model), before) and not state.optimizer.state


def test_folder_that_is_no_checkpoint(tmp_path, accelerator):
    state = trained(tmp_path, accelerator, 1)
    with pytest.raises(ValueError, match=r"nowhere/manifest\.json does not exist$"):
        resume(tmp_path, state, str(tmp_path / "nowhere"), accelerator)
    (checkpoint_folder(tmp_path, 1) / "manifest.json").write_text('{"step": 1', encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        resume(tmp_path, state, "latest", accelerator)


def test_checkpoint_of_other_weights_is_refused(tmp_path, accelerator):
    trained(tmp_path, accelerator, 1)
    model = nn.Sequential(nn.Conv2d(2, 8, 3))
    other = TrainingState(model, EMA(model), build_optimizer(model, OPTIMIZER), SETTINGS)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model: .*0\.weight is \[4, 2, 3, 3\]"):
        resume(tmp_path, other, "latest", accelerator)


def assert_refused(run: Path, state: TrainingState, message: str) -> None:
    """And `state` is as it was."""
    before = [weights(state.model), state.ema.average, state.power_ema.state()]
    before = [{name: tensor.clone() for name, tensor in part.items()} for part in before]
    with pytest.raises(ValueError) as error:
        resume(run, state, "latest", state.loss_meter.accelerator)
    assert str(error.value) == message
    after = [weights(state.model), state.ema.average, state.power_ema.state()]
    assert all(equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.step == 0 and not state.optimizer.state


def test_checkpoint_without_averages_for_snapshots_is_refused(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2)
    assert_refused(
        tmp_path,
        new_state(accelerator, seed=1, lengths=LENGTHS),
        f"{checkpoint_folder(tmp_path, 2)} has no averages for snapshots: it was written with ema.snapshot_every null; "
        "set it to null again, or start anew with --resume never",
    )


def test_checkpoint_with_averages_of_other_lengths_is_refused(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2, lengths=LENGTHS)
    assert_refused(
        tmp_path,
        new_state(accelerator, seed=1, lengths=(0.05, 0.2)),
        "the checkpoint has power-function averages of lengths [0.05, 0.1], but ema.snapshot_lengths is [0.05, 0.2]; "
        "restore the config, or start anew with --resume never",
    )
    without = new_state(accelerator, seed=1)
    assert resume(tmp_path, without, "latest", accelerator)  # snapshots may be given up
    assert without.step == 2


# --- whole tensors ---


def test_gathering_and_filling_of_whole_tensors():
    tensors = {"a": nn.Parameter(torch.arange(6.0).view(2, 3)), "b": torch.tensor(7)}
    held = gather_whole(tensors, keep=True)
    assert equal(held, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}) and not held["a"].requires_grad
    assert gather_whole(tensors, keep=False) == {}
    place = tensors["a"].data_ptr()
    fill(tensors["a"], torch.full((2, 3), 2.0, dtype=torch.float64))
    assert tensors["a"].tolist() == [[2.0] * 3] * 2 and tensors["a"].data_ptr() == place and tensors["a"].requires_grad


# --- the loss_meter ---


def close(loss_meter: LossMeter, step: int, loss: float, grad_norm: float = 1.0) -> float:
    """A step of one micro-batch; `backward` passes a loss that is not finite on to the gradient."""
    loss_meter.add([torch.tensor(loss)], share=1.0)
    return loss_meter.close(step, torch.tensor(grad_norm if math.isfinite(loss) else math.nan)).item()


def count(loss_meter: LossMeter, first_step: int, steps: str) -> None:
    """A step a letter: `.` finite, `x` not."""
    for step, letter in enumerate(steps, first_step):
        assert close(loss_meter, step, float("nan") if letter == "x" else 1.0) == float(letter == "x")


def test_tally_means(accelerator):
    """Over micro-batches by their share and over steps; the gradient's norm is the last step's."""
    loss_meter = LossMeter(["loss", "kl"], accelerator)
    for step, losses in enumerate([[(1.0, 10.0), (3.0, 30.0)], [(5.0, 50.0), (9.0, 130.0)]]):
        for loss, kl in losses:
            loss_meter.add([torch.tensor(loss, requires_grad=True), torch.tensor(kl, dtype=torch.bfloat16)], share=0.5)
        assert loss_meter.close(step, torch.tensor(0.5 + step)).item() == 0.0
    assert loss_meter.read() == Window({"loss": 4.5, "kl": 55.0, "grad_norm": 1.5}, 0, 0, 0)
    assert loss_meter.read().means == {}  # nothing since
    loss_meter.add([torch.tensor(8.0), torch.tensor(2.0)], share=1.0)
    loss_meter.close(2, torch.tensor(0.25))
    assert loss_meter.read() == Window({"loss": 8.0, "kl": 2.0, "grad_norm": 0.25}, 0, 0, 0)


def test_tally_leaves_skipped_steps_out(accelerator):
    loss_meter = LossMeter(["loss"], accelerator)
    nan, inf = float("nan"), float("inf")
    steps = [(1.0, 0.5), (nan, 0.5), (2.0, inf), (3.0, 0.75), (2.0, nan), (-inf, 9.0)]
    skips = [close(loss_meter, step, loss, grad_norm) for step, (loss, grad_norm) in enumerate(steps)]
    assert skips == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert loss_meter.read() == Window({"loss": 2.0, "grad_norm": 0.75}, 4, 2, 5)
    assert close(loss_meter, 6, nan) == 1.0
    assert loss_meter.read().means == {}  # no finite step in this line


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_loss_that_is_not_finite_spoils_the_step(accelerator, bad):
    """Also where its gradient is finite, as that of |x| is at infinity."""
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER))
    loss_meter = LossMeter(["loss", "kl"], accelerator)
    own = weights(model)
    for added, kl in [(0.0, 1.0), (bad, 1.0), (0.0, 1.0)]:
        loss = model(torch.ones(1, 1)).sum() + added
        backward(accelerator, loss, share=1 / 3)
        loss_meter.add([loss, torch.tensor(kl)], share=1 / 3)
    skip = loss_meter.close(0, clip_gradients(accelerator, model, 1.0))
    apply_gradients(accelerator, optimizer, skip)
    assert skip.item() == 1.0 and equal(weights(model), own)
    loss_meter.add([torch.tensor(4.0), torch.tensor(2.0)], share=1.0)
    assert loss_meter.close(1, torch.tensor(1.0)).item() == 0.0  # and none after it
    assert loss_meter.read() == Window({"loss": 4.0, "kl": 2.0, "grad_norm": 1.0}, 1, 1, 0)


def test_backward_weighs_a_micro_batch(accelerator):
    model = nn.Linear(2, 1, bias=False)
    for share in (0.25, 0.75):
        backward(accelerator, model(torch.tensor([[4.0, 8.0]])).sum(), share)
    assert torch.equal(model.weight.grad, torch.tensor([[4.0, 8.0]]))


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
def test_rows_of_skipped_steps(accelerator, lines, expected):
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
def test_saved_tally_goes_on(accelerator, before):
    loss_meter, other = LossMeter(["loss"], accelerator), LossMeter(["loss"], accelerator)
    close(loss_meter, 0, 3.0, grad_norm=0.25)
    count(loss_meter, 1, before)
    saved = {name: tensor.clone() for name, tensor in loss_meter.state().items()}
    other.load(saved)
    for each in (loss_meter, other):
        count(each, 1 + len(before), "x.x")
    assert equal(loss_meter.state(), other.state())
    assert other.read() == loss_meter.read()


# --- signals ---


def handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in SIGNALS}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_asks_the_run_to_stop(accelerator, name):
    before, number = handlers(), getattr(signal, name)
    with StopRequest(accelerator) as stop:
        assert stop.agreed() is None
        assert signal.getsignal(number) != before[number]  # else it would end the tests
        os.kill(os.getpid(), number)
        assert stop.agreed() == name
        assert stop.agreed() == name
    assert handlers() == before


def test_second_interrupt_kills(accelerator):
    before = handlers()
    stop = StopRequest(accelerator)
    with pytest.raises(KeyboardInterrupt), stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_signal_handlers_are_restored_after_an_error(accelerator):
    before = handlers()
    with pytest.raises(RuntimeError, match="out of memory"), StopRequest(accelerator):
        raise RuntimeError("out of memory")
    assert handlers() == before


def test_stop_request_in_another_thread_does_nothing(accelerator):
    before, seen = handlers(), []

    def run() -> None:
        with StopRequest(accelerator) as stop:
            seen.append((stop.agreed(), handlers()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)] and handlers() == before


# --- the log ---


def read_log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("pending", [True, False])
def test_metrics_log_over_a_resume(tmp_path, accelerator, pending):
    """Lines of later steps go, and the validation at the checkpoint's step if it will be made again."""
    log = MetricsLog(tmp_path, 0, True, accelerator)
    lines = [
        {"step": 0, "validation/loss": 1.0},
        {"step": 10, "loss": 0.5},
        {"step": 20, "loss": 0.25},
        {"step": 20, "validation/loss": 0.75, "validation/psnr": 20.0},
        {"step": 30, "loss": 0.125},
    ]
    for line in lines:
        log.write(line["step"], {key: value for key, value in line.items() if key != "step"})
    assert read_log(tmp_path) == lines
    resumed = MetricsLog(tmp_path, 20, pending, accelerator)
    kept = lines[: 3 if pending else 4]
    assert read_log(tmp_path) == kept
    resumed.write(30, {"loss": 0.0625})
    assert read_log(tmp_path) == [*kept, {"step": 30, "loss": 0.0625}]
    MetricsLog(tmp_path, 0, True, accelerator)
    assert read_log(tmp_path) == []


def test_metrics_log_drops_a_line_that_was_cut_off(tmp_path, accelerator):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    MetricsLog(tmp_path, 2, True, accelerator).write(3, {"loss": 1.0})
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}]


def test_log_of_another_process_writes_nothing(tmp_path, accelerator):
    PartialState().process_index = 1
    assert not accelerator.is_main_process
    log = MetricsLog(tmp_path, 0, True, accelerator)
    log.write(1, {"loss": 1.0})
    log.write_image(1, Image.new("RGB", (1, 1)))
    assert list(tmp_path.iterdir()) == []


def test_meter():
    meter = ThroughputMeter(now=100.0)
    meter.add(32)
    meter.add(16)
    assert meter.read(now=104.0) == 12.0
    meter.add(10)
    assert meter.read(now=104.5) == 20.0  # since the last reading
    assert meter.read(now=105.0) == 0.0


def test_image_grid():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (1, 2, 3)]
    grid = image_grid([Image.new("RGB", (4, 3), colour) for colour in colours], columns=3)
    assert grid.size == (3 * 4 + 2 * 2, 2 * 3 + 2)
    pixels = grid.load()
    for i, colour in enumerate(colours):
        left, top = (i % 3) * 6, (i // 3) * 5
        assert {pixels[x, y] for x in range(left, left + 4) for y in range(top, top + 3)} == {colour}
    white = [(x, y) for x in range(16) for y in range(8) if pixels[x, y] == (255, 255, 255)]
    assert len(white) == 16 * 8 - 5 * 4 * 3  # gaps and the free place
    grey = image_grid([Image.new("L", (2, 2), 7)], columns=1)
    assert grey.mode == "RGB" and grey.getpixel((1, 1)) == (7, 7, 7)


def test_grid_columns():
    dots = {n: image_grid([Image.new("RGB", (1, 1))] * n) for n in (1, 2, 4, 8, 9, 16, 100)}
    assert [(dot.width + 2) // 3 for dot in dots.values()] == [1, 2, 2, 3, 3, 4, 8]


# --- setup ---


def test_precision():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="^train.precision fp16 needs a GPU"):
        choose_precision("fp16", cpu)
    assert choose_precision("fp32", cpu).mixed_precision == "no"
    assert choose_precision("bf16", cpu).mixed_precision == "bf16"
    assert choose_precision("fp16", torch.device("cuda")).mixed_precision == "fp16"


@pytest.mark.parametrize(
    ("processor", "amx", "instructions", "expected"),
    [
        ("AMD EPYC 9554", False, True, "bf16"),
        ("Intel(R) Xeon(R) Processor", True, True, "bf16"),
        ("Intel(R) Xeon(R) Processor", False, True, "no"),  # bf16 took 1.6 times as long as float32 there
        ("AMD EPYC 7763", False, False, "no"),
    ],
)
def test_automatic_precision_is_the_faster_one(
    processor: str, amx: bool, instructions: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "processor_name", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    automatic = choose_precision("auto", torch.device("cpu"))
    assert automatic.mixed_precision == expected
    assert automatic.reason == ("this cpu computes in bf16" if expected == "bf16" else "this cpu has no fast bf16")


ROOT = Path(__file__).parent.parent


def demo_config(run: Path, *overrides: str) -> VAETrainingConfig:
    fixed = [f"output.folder={run}", "train.precision=fp32"]
    return load_config(VAETrainingConfig, ROOT / "configs" / "demo" / "vae.yaml", [*fixed, *overrides])


def test_start_says_what_it_does(tmp_path, capsys):
    started, plan = start(demo_config(tmp_path, "train.batch_size=12", "train.micro_batch_size=4"))
    assert plan == BatchPlan(12, 4, 1) and plan.accumulation == 3
    assert started.mixed_precision == "no" and started.trackers == []
    assert capsys.readouterr().out == (
        f"{started.device}, 1 process(es), precision fp32 (as the config says); "
        "batch 12 = 4 x 1 processes x 3 accumulated\n"
    )
    for whole in ("null", "auto"):
        config = demo_config(tmp_path, "train.batch_size=12", f"train.micro_batch_size={whole}")
        assert start(config)[1] == BatchPlan(12, 12, 1)
    with pytest.raises(ValueError, match="^train.batch_size 12 is not divisible by train.micro_batch_size 5"):
        start(demo_config(tmp_path, "train.batch_size=12", "train.micro_batch_size=5"))
    assert list(tmp_path.iterdir()) == []


def test_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    with pytest.raises(ValueError) as error:
        start(demo_config(tmp_path, "logging.log_with=[wandb]"))
    assert str(error.value) == "logging.log_with has wandb, which is not installed: pip install wandb"


def test_record_repeats_the_run(tmp_path, accelerator):
    config = demo_config(tmp_path, "train.steps=7", "optimizer.betas=[0.1, 0.3]")
    (tmp_path / "samples").mkdir()
    for leftover in (".config.yaml.1.tmp", "samples/.step_00000001.png.1.tmp"):
        (tmp_path / leftover).write_text("of a killed run", encoding="utf-8")
    record(config, tmp_path, accelerator)
    assert load_config(VAETrainingConfig, tmp_path / "config.yaml") == config
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.yaml", "samples"]


def test_one_process_needs_no_spare_model(accelerator):
    assert make_full_copy(small_model(), accelerator) is None


# --- the largest micro-batch ---


def allocate_too_much() -> None:
    torch.empty(10**15)


def fitting(model: nn.Module, largest: int, tried: list[int]) -> Callable[[int], None]:
    """A forward and backward pass, for which there is room up to `largest` images."""

    def trial(micro: int) -> None:
        tried.append(micro)
        assert all(p.grad is None for p in model.parameters())
        model(torch.ones(micro, 3)).sum().backward()
        if micro > largest:
            allocate_too_much()

    return trial


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


def test_nothing_fits(accelerator):
    model, tried = nn.Linear(3, 2), []
    with pytest.raises(ValueError, match="^not even one image at a time fits into memory; use a smaller model"):
        fit_micro_batch(accelerator, BatchPlan(4, 4, 1), model, fitting(model, 0, tried))
    assert tried == [4, 2, 1] and all(p.grad is None for p in model.parameters())


def test_other_errors_of_the_trial_pass_through(accelerator):
    model, tried = nn.Linear(3, 2), []

    def broken(micro: int) -> None:
        tried.append(micro)
        model(torch.ones(micro, 3)).sum().backward()
        model(torch.ones(micro, 4))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit_micro_batch(accelerator, BatchPlan(6, 6, 1), model, broken)
    assert tried == [6] and all(p.grad is None for p in model.parameters())


# --- the optimiser ---


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


# --- the loop's steps ---


def test_due():
    assert [step for step in range(12) if due(step, 5, 11)] == [0, 5, 10, 11]
    assert [step for step in range(5) if due(step, 1, 4)] == [0, 1, 2, 3, 4]
    assert [step for step in range(4) if due(step, 100, 3)] == [0, 3]


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


def named_images(count: int) -> CaptionedImages:
    rows = [{"bytes": b"", "path": f"{index:02d}.png"} for index in range(count)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": rows}, features=features)
    return CaptionedImages(table, DataConfig(source="memory", size=8, caption_column=None), 3, 0)


def test_too_many_skipped_steps_stop_the_run(tmp_path, accelerator):
    """With the names of the images of the last one, those of all processes."""
    images = named_images(12)
    batches = StepBatches(12, BatchPlan(8, 2, 2), rank=1, seed=3, start_step=0, total_steps=9)
    first, second = batches.order(0), batches.order(1)
    in_step_1 = sorted({*first[8:], *second[:4]})  # images 8 to 15 of the sequence of epochs
    reading = Window({}, skipped=5, longest_skip_streak=4, last_skipped_step=1)
    for limit in (4, 5):
        check_skipped(reading, limit, batches, images, tmp_path)
    message = (
        "the loss or its gradient was not finite in 4 steps in a row (train.max_skipped_steps is {}), the last time "
        f"at step 1 with the images {', '.join(f'{index:02d}.png' for index in in_step_1)}. The weights are still "
        "those of the last finite step. Look at these images, lower optimizer.lr or use another train.precision; {}"
    )
    with pytest.raises(ValueError) as error:
        check_skipped(reading, 3, batches, images, tmp_path)
    assert str(error.value) == message.format(3, "there is no checkpoint yet")
    trained(tmp_path, accelerator, 1, 2)
    with pytest.raises(ValueError) as error:
        check_skipped(reading, 0, batches, images, tmp_path)
    assert str(error.value) == message.format(0, f"the newest checkpoint is {checkpoint_folder(tmp_path, 2)}")


def test_a_large_batch_is_not_named_whole(tmp_path):
    batches = StepBatches(30, BatchPlan(20, 20, 1), rank=0, seed=0, start_step=0, total_steps=1)
    shown = [f"{index:02d}.png" for index in sorted(batches.order(0)[:20])][:16]
    with pytest.raises(ValueError, match=f"with the images {', '.join(shown)} and 4 more. The weights"):
        check_skipped(Window({}, 1, 1, last_skipped_step=0), 0, batches, named_images(30), tmp_path)


def test_summary():
    assert summary(Window({"loss": 0.12346, "kl": 9.0}, 0, 0, 0), 12.34) == "loss 0.1235, 12.3 images/s"
    assert summary(Window({"loss": 2.0}, 3, 2, 7), 100.0) == "loss 2.0000, 3 skipped, 100.0 images/s"
    assert summary(Window({}, 10, 10, 9), 1.0) == "no finite loss, 10 skipped, 1.0 images/s"


def test_snapshot_holds_the_averages(tmp_path, accelerator):
    state = new_state(accelerator, lengths=LENGTHS)
    train(state, 3)
    write_snapshot(tmp_path, 3, state.power_ema, accelerator)
    path = tmp_path / SNAPSHOTS / "step_00000003.safetensors"
    assert equal(load_file(path), state.power_ema.state())
    PartialState().process_index = 1
    write_snapshot(tmp_path, 4, state.power_ema, accelerator)
    assert names_in(tmp_path / SNAPSHOTS) == ["step_00000003.safetensors"]
