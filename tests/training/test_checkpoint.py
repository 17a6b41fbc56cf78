"""Checkpoint."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import safetensors
import torch
from states import (
    LENGTHS,
    OPTIMIZER,
    SETTINGS,
    equal,
    names_in,
    new_state,
    output,
    same_state,
    small_model,
    steps_in,
    train,
    trained,
    weights,
)
from torch import nn

import latentdiff
from latentdiff.training.checkpoint import (
    TrainingState,
    checkpoint_folder,
    expected_size,
    require_disk_space,
    resume,
    save_checkpoint,
)
from latentdiff.training.ema import EMA
from latentdiff.training.loss_meter import LossMeter
from latentdiff.training.optimizer import (
    build_optimizer,
)
from latentdiff.training.posthoc_ema import SNAPSHOTS, PowerEMA

FILES = ["ema", "model", "optimizer", "loss_meter"]


def manifest_of(run: Path, step: int) -> dict[str, object]:
    return json.loads((checkpoint_folder(run, step) / "manifest.json").read_text(encoding="utf-8"))


def test_settings_that_a_checkpoint_lacks_are_newer_than_it(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2)
    newer = new_state(accelerator, **{"model.later_key": 64})
    assert resume(tmp_path, newer, "latest", accelerator) and newer.step == 2


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


def test_averages_and_loss_meter_continue_bit_for_bit(tmp_path, accelerator):
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


def test_checkpoint_holds_safetensors_and_json_only(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2)
    folder = checkpoint_folder(tmp_path, 2)
    assert folder == tmp_path / "checkpoints" / "step_00000002"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder] == []
    assert names_in(folder) == [
        "ema.safetensors",
        "loss_meter.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    trained(tmp_path, accelerator, 3, lengths=LENGTHS)
    assert "power_ema.safetensors" in names_in(checkpoint_folder(tmp_path, 3))


def test_manifest_describes_the_state(tmp_path, accelerator):
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


def test_config_digest_differs_between_configs(tmp_path, accelerator):
    config = {"train": {"steps": 9, "seed": 0}}
    others = [{"train": {"seed": 0, "steps": 9}}, {"train": {"steps": 9, "seed": 1}}]
    digests = []
    for number, each in enumerate([config, *others]):
        trained(tmp_path / str(number), accelerator, 1, config=each)
        digests.append(manifest_of(tmp_path / str(number), 1)["config_sha256"])
    assert digests[0] == digests[1] != digests[2]  # the keys' order says nothing


@pytest.mark.parametrize("pending", [True, False])
def test_pending_is_saved(tmp_path, accelerator, pending):
    """Whether the validation at the checkpoint's step is still to be made."""
    state = new_state(accelerator)
    state.pending = pending
    save_checkpoint(tmp_path, state, output(), accelerator)
    loaded = new_state(accelerator)
    loaded.pending = not pending
    resume(tmp_path, loaded, "latest", accelerator)
    assert loaded.pending is pending


def test_only_the_newest_checkpoints_are_kept(tmp_path, accelerator):
    trained(tmp_path, accelerator, 1, 2, 3, 10, keep=2)
    assert steps_in(tmp_path) == [3, 10]


def test_keep_every_keeps_checkpoints_permanently(tmp_path, accelerator):
    state = trained(tmp_path, accelerator, *range(1, 9), keep=2, keep_every=3)
    assert steps_in(tmp_path) == [3, 6, 7, 8]
    train(state, 9)
    save_checkpoint(tmp_path, state, output(1, keep_every=6), accelerator)
    assert steps_in(tmp_path) == [6, 9]
    train(state, 10)
    save_checkpoint(tmp_path, state, output(1), accelerator)
    assert steps_in(tmp_path) == [10]


def test_saving_the_same_step_again_changes_nothing(tmp_path, accelerator):
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


def test_a_kill_while_pruning_leaves_whole_checkpoints(tmp_path, accelerator, monkeypatch):
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


def test_a_linked_checkpoint_is_pruned_without_following_the_link(tmp_path, accelerator):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    state = trained(run, accelerator, 1, keep=1)
    checkpoint_folder(run, 1).rename(elsewhere)
    checkpoint_folder(run, 1).symlink_to(elsewhere)
    before = names_in(elsewhere)
    train(state, 2)
    save_checkpoint(run, state, output(1), accelerator)
    assert names_in(run / "checkpoints") == ["step_00000002"] and names_in(elsewhere) == before


def test_leftovers_are_removed_before_a_run_starts_over(tmp_path, accelerator):
    trained(tmp_path, accelerator, 1)
    (tmp_path / "checkpoints" / ".step_00000002.tmp").mkdir()
    resume(tmp_path, new_state(accelerator), "never", accelerator)
    assert names_in(tmp_path / "checkpoints.1") == ["step_00000001"]


def test_a_damaged_checkpoint_gives_way_to_an_older_whole_one(tmp_path, accelerator, capsys):
    state = trained(tmp_path, accelerator, 1, 2, 3)
    for step, damaged in ((3, "model.safetensors"), (2, "manifest.json")):
        (checkpoint_folder(tmp_path, step) / damaged).write_bytes(b"half of it")
    other = new_state(accelerator, seed=1)
    assert resume(tmp_path, other, "latest", accelerator) and other.step == 1
    said = capsys.readouterr().out.splitlines()
    aside = "is set aside and an older checkpoint is used"
    assert said[0].endswith(f"model.safetensors is missing or damaged: step_00000003 {aside}")
    assert "manifest.json is not valid JSON" in said[1] and said[1].endswith(aside) and "resumed from" in said[2]
    assert names_in(tmp_path / "checkpoints") == ["step_00000001", "step_00000002.1", "step_00000003.1"]
    train(other, 3)
    save_checkpoint(tmp_path, other, output(9), accelerator)
    assert steps_in(tmp_path) == [1, 3] and same_state(other, state)


@pytest.mark.parametrize("group", ["model", "ema"])
def test_what_is_not_finite_replaces_no_checkpoint(tmp_path, accelerator, group):
    state = trained(tmp_path, accelerator, 1, keep=1)
    train(state, 2)
    with torch.no_grad():
        tensors = state.model.state_dict() if group == "model" else state.ema.average
        next(iter(tensors.values())).fill_(float("nan"))
    with pytest.raises(ValueError, match=f"no checkpoint is written at step 2: its {group} has values .* not finite"):
        save_checkpoint(tmp_path, state, output(1), accelerator)
    assert steps_in(tmp_path) == [1]


def disk_with(free: int) -> Callable[[Path], SimpleNamespace]:
    return lambda folder: SimpleNamespace(free=free)


def test_full_disk_is_an_error_before_anything_is_written(tmp_path, accelerator, monkeypatch):
    state = trained(tmp_path, accelerator, 2)
    saved = new_state(accelerator)
    train(state, 3)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk_with(free=10_000_000))
        with pytest.raises(ValueError, match=r"^a checkpoint needs 0\.00 GB and a reserve of 0\.02 GB, but "):
            save_checkpoint(tmp_path, state, output(1), accelerator)
    assert names_in(tmp_path / "checkpoints") == ["step_00000002"]
    resume(tmp_path, saved, "latest", accelerator)
    assert saved.step == 2
    save_checkpoint(tmp_path, state, output(1), accelerator)  # there is room again
    assert steps_in(tmp_path) == [3]


def test_required_disk_space_has_a_reserve(tmp_path, monkeypatch):
    """Five percent and 16 MiB more than the tensors; on the disk where the folder will be."""
    run, needed = tmp_path / "not" / "yet", 3_500_000_000
    enough = 3_675_000_000 + 2**24
    for free in (enough, 2 * enough):
        monkeypatch.setattr(shutil, "disk_usage", disk_with(free))
        require_disk_space(run, needed)
    for free, shown in ((enough - 1, "3.69"), (1_250_000_000, "1.25"), (0, "0.00")):
        monkeypatch.setattr(shutil, "disk_usage", disk_with(free))
        with pytest.raises(ValueError) as error:
            require_disk_space(run, needed)
        assert str(error.value) == (
            f"a checkpoint needs 3.67 GB and a reserve of 0.02 GB, but {run} has only {shown} GB free; make room, "
            "lower output.keep, or choose another output.folder (the existing checkpoints stay valid)"
        )
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=enough))
    require_disk_space(run, needed)
    assert asked == [tmp_path.resolve()] and not run.exists()


@pytest.mark.parametrize("lengths", [(), LENGTHS], ids=["no snapshots", "snapshots"])
def test_expected_size_equals_the_files(tmp_path, accelerator, lengths):
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
    assert written == pytest.approx(expected_size(state, averages=1 + len(lengths)), rel=0.01)


def test_a_run_without_checkpoint_starts_from_scratch(tmp_path, accelerator):
    state = new_state(accelerator)
    before = weights(state.model)
    assert not resume(tmp_path, state, "latest", accelerator)
    assert not resume(tmp_path, state, "never", accelerator)
    assert state.step == 0 and equal(weights(state.model), before)
    assert list(tmp_path.iterdir()) == []


def test_resume_never_sets_old_checkpoints_aside(tmp_path, accelerator):
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


def test_resuming_an_earlier_checkpoint_sets_later_ones_aside(tmp_path, accelerator):
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


def test_a_copied_checkpoint_folder_can_be_resumed(tmp_path, accelerator):
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


def test_later_snapshots_are_removed_or_set_aside(tmp_path, accelerator):
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


def test_a_checkpoint_of_another_run_sets_this_one_aside(tmp_path, accelerator):
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
    with pytest.raises(ValueError, match=r"is not the manifest of a checkpoint: it has no config, pending, settings"):
        resume(tmp_path, new_state(accelerator), "latest", accelerator)


def test_resume_never_sets_everything_aside(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2)
    write_snapshots(tmp_path, 2)
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    (tmp_path / "config.yaml").write_text("written at each start", encoding="utf-8")
    resume(tmp_path, new_state(accelerator), "never", accelerator)
    assert names_in(tmp_path) == [
        "checkpoints.1",
        "config.yaml",
        "ema_snapshots.1",
        "metrics.jsonl.1",
        "samples.1",
    ]


def test_changed_config_values_are_reported(tmp_path, accelerator, capsys):
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


def test_changed_settings_are_named(tmp_path, accelerator):
    trained(tmp_path, accelerator, 1)
    changed = new_state(accelerator, **{"model.block_out_channels": (8, 32), "text.pretrained": "clip"})
    before = weights(changed.model)
    with pytest.raises(ValueError) as error:
        resume(tmp_path, changed, "latest", accelerator)
    assert str(error.value) == (
        f"cannot resume from {checkpoint_folder(tmp_path, 1)}: model.block_out_channels was [8, 16], now [8, 32]; "
        "text.pretrained was None, now 'clip'. Restore the config, choose another output.folder, or start over with "
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


def test_folder_without_a_manifest_is_refused(tmp_path, accelerator):
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
        "set it to null again, or start over with --resume never",
    )


def test_checkpoint_with_averages_of_other_lengths_is_refused(tmp_path, accelerator):
    trained(tmp_path, accelerator, 2, lengths=LENGTHS)
    assert_refused(
        tmp_path,
        new_state(accelerator, seed=1, lengths=(0.05, 0.2)),
        "the checkpoint has power-function averages of lengths [0.05, 0.1], but ema.snapshot_lengths is [0.05, 0.2]; "
        "restore the config, or start over with --resume never",
    )
    without = new_state(accelerator, seed=1)
    assert resume(tmp_path, without, "latest", accelerator)  # snapshots may be given up
    assert without.step == 2
