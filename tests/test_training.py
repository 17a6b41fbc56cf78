"""What both training loops share: randomness, schedules, EMA, checkpoints, logs, precision and optimiser."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import tiny_text_encoder, tiny_unet, tiny_vae
from torch import Tensor, nn

from latentdiff.config import OptimizerConfig, TrainConfig
from latentdiff.data import BatchPlan, StepBatches
from latentdiff.models.denoiser import Denoiser
from latentdiff.training import loop, setup
from latentdiff.training.checkpoint import (
    TrainingState,
    checkpoint_folder,
    list_checkpoints,
    resume,
    save_checkpoint,
)
from latentdiff.training.ema import EMA
from latentdiff.training.logging import Meter, MetricsLog, picture_grid
from latentdiff.training.randomness import Purpose, normal, seed_for, spread_timesteps, uniform
from latentdiff.training.schedules import ema_decay_at, learning_rate_at

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
    assert [Purpose(number).name for number in range(len(PURPOSES))] == PURPOSES


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
    "normal": lambda purpose, step, slots, seed=0: normal((3, 2, 2), seed, purpose, step, slots),
    "uniform": lambda purpose, step, slots, seed=0: uniform(seed, purpose, step, slots),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_belong_to_their_slot(name):
    draw = DRAWS[name]
    whole = draw(Purpose.NOISE, 7, range(4))
    assert whole.shape[0] == 4
    for parts in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]):
        assert torch.equal(torch.cat([draw(Purpose.NOISE, 7, part) for part in parts]), whole)
    assert torch.equal(draw(Purpose.NOISE, 7, [3, 1]), whole[[3, 1]])
    others = [
        draw(Purpose.POSTERIOR, 7, range(4)),
        draw(Purpose.NOISE, 8, range(4)),
        draw(Purpose.NOISE, 7, range(4), seed=1),
        draw(Purpose.NOISE, 7, range(4, 8)),
    ]
    rows = torch.cat([whole, *others]).flatten(1) if whole.ndim > 1 else torch.cat([whole, *others])[:, None]
    assert len({tuple(row.tolist()) for row in rows}) == 20


def test_draws_have_their_distribution():
    noise = normal((4, 8, 8), 0, Purpose.NOISE, 3, range(100)).double()
    assert noise.shape == (100, 4, 8, 8)  # 25,600 numbers: standard errors 0.006 and 0.004
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.2)
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.4  # slots are independent
    draws = torch.cat([uniform(0, Purpose.CAPTION_DROPOUT, step, range(50)) for step in range(40)])
    assert 0 <= draws.min() and draws.max() < 1
    assert (draws < 0.1).double().mean().item() == pytest.approx(0.1, abs=0.025)
    assert draws.double().mean().item() == pytest.approx(0.5, abs=0.025)


def test_timesteps_cover_the_schedule_and_spread_over_a_batch():
    batches = [spread_timesteps(1000, 0, step, range(16), 16) for step in range(500)]
    assert all(batch.dtype == torch.int64 and batch.shape == (16,) for batch in batches)
    # Each slot is uniform over the schedule: 500 draws in ten bins, five standard deviations.
    for slot in range(16):
        counts = torch.bincount(torch.stack([batch[slot] for batch in batches]) // 100, minlength=10)
        assert len(counts) == 10 and (counts - 50).abs().max() < 34
    # Within a batch the gaps are T / 16, whatever the offset, the one around the end of the schedule included.
    for batch in batches:
        places = batch.sort().values
        gaps = torch.cat([places.diff(), places[:1] + 1000 - places[-1:]])
        assert 62 <= gaps.min() and gaps.max() <= 63
    assert len({tuple(batch.tolist()) for batch in batches}) > 40  # an offset is one of 62.5 places
    # A micro-batch gets its slots' own.
    assert torch.equal(spread_timesteps(1000, 0, 7, [3, 12], 16), batches[7][[3, 12]])


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    for draw in DRAWS.values():
        draw(Purpose.NOISE, 0, range(4))
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
    config = OptimizerConfig(lr=1.0, lr_schedule="cosine", warmup_steps=warmup, final_lr=0.2)
    total = 100 + warmup
    assert learning_rate_at(warmup, total, config) == pytest.approx(1.0, rel=1e-12)
    assert learning_rate_at(warmup + 25, total, config) == pytest.approx(0.6 + 0.4 * 0.5**0.5, rel=1e-12)
    assert learning_rate_at(warmup + 50, total, config) == pytest.approx(0.6, rel=1e-12)
    assert learning_rate_at(total, total, config) == pytest.approx(0.2, rel=1e-12)
    assert learning_rate_at(total + 5, total, config) == pytest.approx(0.2, rel=1e-12)
    rates = [learning_rate_at(step, total, config) for step in range(warmup, total + 1)]
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


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
    own = weights(model)
    parameters = list(model.parameters())
    try:
        with ema.applied(model):
            assert equal(weights(model), ema.average)
            if fail:
                raise RuntimeError("out of memory")
    except RuntimeError:
        assert fail
    assert equal(weights(model), own)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))  # the optimiser's


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


@pytest.fixture
def accelerator():
    """Accelerate keeps its state in class attributes: they are cleared before and after."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


SETTINGS = {"model.block_out_channels": (8, 16), "model.scaling_factor": 0.5, "text.pretrained": None}
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def new_state(accelerator: Accelerator, seed: int = 0, **settings: object) -> TrainingState:
    model = small_model(seed).to(memory_format=torch.channels_last)
    model, optimizer = accelerator.prepare(model, setup.build_optimizer(model, OPTIMIZER))
    return TrainingState(model, EMA(model), optimizer, SETTINGS | settings)


def train(state: TrainingState, stop: int) -> None:
    """Optimiser steps whose batch, learning rate and EMA decay are functions of the step."""
    for step in range(state.step, stop):
        loop.set_learning_rate(state.optimizer, 1e-2 / (1 + step))
        batch = normal((2, 4, 4), 0, Purpose.NOISE, step, range(5))
        state.model(batch).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.model, ema_decay_at(step, 0.9))
        state.step = step + 1


def trained(run: Path, accelerator: Accelerator, *steps: int, keep: int = 9) -> TrainingState:
    """A state that was trained and saved at each of `steps`."""
    state = new_state(accelerator)
    for step in steps:
        train(state, step)
        save_checkpoint(run, state, keep, accelerator)
    return state


def moments(state: TrainingState) -> dict[str, Tensor]:
    return {
        f"{name}:{key}": value.clone()
        for name, p in state.model.named_parameters()
        for key, value in state.optimizer.state[p].items()
    }


def same_state(a: TrainingState, b: TrainingState) -> bool:
    return (
        a.step == b.step
        and equal(weights(a.model), weights(b.model))
        and equal(a.ema.average, b.ema.average)
        and equal(moments(a), moments(b))
    )


def steps_in(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in list_checkpoints(run)]


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


def test_frozen_parameters_are_saved_without_average_and_moments(tmp_path, accelerator):
    def state_of(seed: int) -> TrainingState:
        model = small_model(seed)
        model[0].requires_grad_(False)
        model, optimizer = accelerator.prepare(model, setup.build_optimizer(model, OPTIMIZER))
        return TrainingState(model, EMA(model), optimizer, {})

    saved, loaded = state_of(0), state_of(1)
    train(saved, 2)
    save_checkpoint(tmp_path, saved, 1, accelerator)
    resume(tmp_path, loaded, "latest", accelerator)
    assert same_state(loaded, saved) and not loaded.model[0].weight.requires_grad


def test_folder_holds_safetensors_and_json_only(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2)
    folder = checkpoint_folder(tmp_path, 2)
    assert folder == tmp_path / "checkpoints" / "step_00000002"
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        f"checkpoints/step_00000002/{name}"
        for name in ("ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors")
    ]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["step"] == 2 and manifest["scaler"] is None and len(manifest["sha256"]) == 3


def test_only_the_newest_are_kept(tmp_path, accelerator):
    state = trained(tmp_path, accelerator, 1, 2, 3, 10, keep=2)
    assert steps_in(tmp_path) == [3, 10]
    save_checkpoint(tmp_path, state, 2, accelerator)  # the same step again
    assert steps_in(tmp_path) == [3, 10]
    save_checkpoint(tmp_path, state, 1, accelerator)
    assert steps_in(tmp_path) == [10]


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
    save_checkpoint(tmp_path, again, 2, accelerator)
    assert steps_in(tmp_path) == [2, 4] and not leftover.exists()
    other = new_state(accelerator, seed=1)
    assert resume(tmp_path, other, "latest", accelerator) and same_state(other, again)


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
    save_checkpoint(tmp_path, state, 1, accelerator)
    assert steps_in(tmp_path) == [3]
    other = new_state(accelerator)
    assert resume(tmp_path, other, "latest", accelerator) and same_state(other, state)


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


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors"])
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
    other = TrainingState(model, EMA(model), setup.build_optimizer(model, OPTIMIZER), SETTINGS)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model: .*0\.weight is \[4, 2, 3, 3\]"):
        resume(tmp_path, other, "latest", accelerator)


# --- the log ---


def read_log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_metrics_log_over_a_resume(tmp_path):
    log = MetricsLog(tmp_path, 0, enabled=True)
    for step in (0, 10, 20, 30):
        log.write(step, loss=1.0 / (1 + step))
    log.write(20, **{"validation/loss": 0.5})
    resumed = MetricsLog(tmp_path, 20, enabled=True)
    assert [line["step"] for line in read_log(tmp_path)] == [0, 10, 20, 20]
    assert read_log(tmp_path)[-1] == {"step": 20, "validation/loss": 0.5}
    resumed.write(30, loss=0.25)
    resumed.write(40, loss=0.125)
    assert [line["step"] for line in read_log(tmp_path)] == [0, 10, 20, 20, 30, 40]
    assert read_log(tmp_path)[-2] == {"step": 30, "loss": 0.25}
    MetricsLog(tmp_path, 0, enabled=True)
    assert read_log(tmp_path) == []


def test_metrics_log_drops_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    MetricsLog(tmp_path, 2, enabled=True).write(3, loss=1.0)
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}]


def test_metrics_log_of_another_process_writes_nothing(tmp_path):
    MetricsLog(tmp_path, 0, enabled=False).write(1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_meter():
    meter = Meter(now=100.0)
    meter.add(32)
    meter.add(16)
    assert meter.read(now=104.0) == 12.0
    meter.add(10)
    assert meter.read(now=104.5) == 20.0  # since the last reading
    assert meter.read(now=105.0) == 0.0


def test_picture_grid():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (1, 2, 3)]
    grid = picture_grid([Image.new("RGB", (4, 3), colour) for colour in colours], columns=3)
    assert grid.size == (3 * 4 + 2 * 2, 2 * 3 + 2)
    pixels = grid.load()
    for i, colour in enumerate(colours):
        left, top = (i % 3) * 6, (i // 3) * 5
        assert {pixels[x, y] for x in range(left, left + 4) for y in range(top, top + 3)} == {colour}
    white = [(x, y) for x in range(16) for y in range(8) if pixels[x, y] == (255, 255, 255)]
    assert len(white) == 16 * 8 - 5 * 4 * 3  # gaps and the free place
    grey = picture_grid([Image.new("L", (2, 2), 7)], columns=1)
    assert grey.mode == "RGB" and grey.getpixel((1, 1)) == (7, 7, 7)


# --- setup ---


def test_precision():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="^train.precision fp16 needs a GPU"):
        setup.choose_precision("fp16", cpu)
    assert setup.choose_precision("fp32", cpu).mixed_precision == "no"
    assert setup.choose_precision("bf16", cpu).mixed_precision == "bf16"
    assert setup.choose_precision("fp16", torch.device("cuda")).mixed_precision == "fp16"
    automatic = setup.choose_precision("auto", cpu)
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert automatic.mixed_precision == ("bf16" if native else "no")
    assert automatic.reason == ("this cpu computes in bf16" if native else "this cpu has no native bf16")


@pytest.mark.usefixtures("accelerator")
def test_start_says_what_it_does(capsys):
    AcceleratorState._reset_state(True)
    config = TrainConfig(steps=1, batch_size=12, micro_batch_size=4, precision="fp32")
    started, plan = setup.start(config)
    assert plan == BatchPlan(12, 4, 1) and plan.accumulation == 3
    assert started.mixed_precision == "no"
    device = started.device
    assert capsys.readouterr().out == (
        f"{device}, 1 process(es), precision fp32 (as the config says); batch 12 = 4 x 1 processes x 3 accumulated\n"
    )
    assert setup.start(config.model_copy(update={"micro_batch_size": None}))[1].micro == 12
    with pytest.raises(ValueError, match="^train.batch_size 12 is not divisible by train.micro_batch_size 5"):
        setup.start(config.model_copy(update={"micro_batch_size": 5}))


@pytest.mark.parametrize(
    "build",
    [tiny_vae, lambda: Denoiser(tiny_unet(), tiny_text_encoder()), lambda: Denoiser(tiny_unet(), None)],
    ids=["vae", "unet and text encoder", "unet"],
)
def test_optimizer_has_every_trained_parameter_once(build):
    model = build()
    config = OptimizerConfig(lr=1e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    frozen = next(model.parameters()).requires_grad_(False)
    optimizer = setup.build_optimizer(model, config)
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
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.9), 1e-6)
    assert loop.set_learning_rate(optimizer, 0.5) == 0.5
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_due():
    assert [step for step in range(12) if loop.due(step, 5, 11)] == [0, 5, 10, 11]
    assert [step for step in range(5) if loop.due(step, 1, 4)] == [0, 1, 2, 3, 4]
    assert [step for step in range(4) if loop.due(step, 100, 3)] == [0, 3]


def test_clip_gradients(accelerator):
    model = nn.Linear(3, 1, bias=False)
    for limit, expected in [(None, 5.0), (10.0, 5.0), (1.0, 1.0)]:
        model.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
        assert float(loop.clip_gradients(accelerator, model, limit)) == pytest.approx(5.0)
        assert model.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    loop.check_finite(3.0, 7, tmp_path)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"^the loss is {loss} at step 7; "):
            loop.check_finite(loss, 7, tmp_path)


def test_grid_columns():
    dots = {n: picture_grid([Image.new("RGB", (1, 1))] * n) for n in (1, 2, 4, 8, 9, 16, 100)}
    assert [(dot.width + 2) // 3 for dot in dots.values()] == [1, 2, 2, 3, 3, 4, 8]


def test_a_copied_checkpoint_folder_can_be_continued(tmp_path, accelerator):
    """A folder from elsewhere, such as another run of the same model, is a start too."""
    state = trained(tmp_path / "a", accelerator, 2)
    shutil.copytree(checkpoint_folder(tmp_path / "a", 2), tmp_path / "start")
    other = new_state(accelerator, seed=1)
    assert resume(tmp_path / "b", other, str(tmp_path / "start"), accelerator)
    assert same_state(other, state) and steps_in(tmp_path / "b") == []
