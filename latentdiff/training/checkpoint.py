"""Checkpoints of a run: model, averages and optimiser as safetensors beside a manifest, written atomically.

A checkpoint holds no random state: every random number is a function of the step (`randomness`), so the step is enough.
Tensors are saved unsharded, so a run can resume on any number of processes.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import latentdiff
from latentdiff.config import OptimizerConfig, OutputConfig
from latentdiff.distributed import fill, from_main, gather_whole, on_all, on_main
from latentdiff.formats.files import (
    check_fit,
    read_json,
    read_safetensors,
    refuse_not_finite,
    sync_folder,
    write_json,
    write_safetensors,
)
from latentdiff.formats.swap import remove
from latentdiff.printable import first_line
from latentdiff.training.best_weights import BestWeights
from latentdiff.training.data_record import DataRecord
from latentdiff.training.ema import EMA, trainable
from latentdiff.training.loss_meter import LossMeter
from latentdiff.training.optimizer import learning_rate_at
from latentdiff.training.posthoc_ema import SNAPSHOTS, PowerEMA, drop_snapshots_after, list_snapshots
from latentdiff.training.run_folder import is_finished

CHECKPOINTS = "checkpoints"
DATA_FILE = "data.json"
MAX_DATA_BYTES = 2**32  # of that file: a name and digests of every image
RESERVE = 2**24  # bytes that a checkpoint leaves free
LIBRARIES = ("accelerate", "safetensors", "torch")


@dataclass
class TrainingState:
    """All that a resume needs.

    model: the module without its data-parallel wrapper. settings: the model's config, which must not change between
    save and resume; the rest of `config` may. pending: whether what is due at `step` (validation, samples) is still to
    be done. others: further modules with optimisers of their own, by name; one that a checkpoint lacks starts over.
    best: None if the last weights are published, whatever their validation loss. data: what the run is trained on, on
    the main process. trained_only: whether the weights that are not trained are left out, as they are the base model's.
    """

    model: nn.Module
    ema: EMA
    optimizer: Optimizer
    settings: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    power_ema: PowerEMA | None = None
    loss_meter: LossMeter | None = None
    others: Mapping[str, tuple[nn.Module, Optimizer]] = field(default_factory=dict)
    best: BestWeights | None = None
    data: DataRecord | None = None
    trained_only: bool = False
    step: int = 0
    pending: bool = True

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is saved of the model."""
        return trainable(self.model) if self.trained_only else self.model.state_dict()


def checkpoint_folder(run: Path, step: int) -> Path:
    """saved/<run>/checkpoints/step_00000500: the state before optimiser step 500 (0-based)."""
    return run / CHECKPOINTS / f"step_{step:08d}"


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint: tensors in main memory by file, the manifest without the files' digests, the data.

    Empty but for the step on all processes but the main one.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    manifest: Mapping[str, Any]
    data: Mapping[str, Any] | None


# (tensors by file, keep) -> the same unsharded in main memory; empty where `keep` is false.
Gather = Callable[[Mapping[str, Mapping[str, Tensor]], bool], Mapping[str, Mapping[str, Tensor]]]


def save_checkpoint(run: Path, state: TrainingState, output: OutputConfig, accelerator: Accelerator) -> None:
    """Write a checkpoint and wait for it; `saving.Saver` goes on meanwhile. Every process calls this.

    Does nothing if this step is saved.
    Raises ValueError, and older checkpoints stay as they are, if the disk is too full or a weight is not finite.
    """

    def gather(groups: Mapping[str, Mapping[str, Tensor]], keep: bool) -> Mapping[str, Mapping[str, Tensor]]:
        return {name: gather_whole(tensors, keep) for name, tensors in groups.items()}

    if is_saved(run, state.step, accelerator):
        return
    make_room(run, state, accelerator)
    contents = collect(state, accelerator, gather)
    on_main(accelerator, lambda: write_checkpoint(run, contents, output))


def is_saved(run: Path, step: int, accelerator: Accelerator) -> bool:
    """Whether there is a checkpoint of the step. Every process calls this."""
    return bool(from_main(accelerator, [checkpoint_folder(run, step).is_dir()])[0])


def make_room(run: Path, state: TrainingState, accelerator: Accelerator) -> None:
    """Remove what interrupted saves left; ValueError if the disk is too full. Every process calls this."""

    def clear() -> None:
        _clear_leftovers(run)
        require_disk_space(run, _size(state))

    on_main(accelerator, clear)


def collect(state: TrainingState, accelerator: Accelerator, gather: Gather) -> Contents:
    """What goes into a checkpoint of this state. Every process calls this; ValueError if a weight is not finite."""
    groups = _groups(state)

    def check() -> None:
        for name in ("model", "ema"):  # elsewhere infinity can stand for what is not there yet
            own = {key: t.to_local() if isinstance(t, DTensor) else t for key, t in groups[name].items()}
            refuse_not_finite(own, f"no checkpoint is written at step {state.step}: its {name}")

    on_all(accelerator, check)
    keep = accelerator.is_main_process
    tensors = dict(gather(groups, keep))
    if not keep:
        return Contents(state.step, {}, {}, None)
    if state.best is not None:
        tensors["best"] = state.best.state()  # is in main memory, and replaced as a whole
    return Contents(
        state.step, tensors, _manifest(state, accelerator), None if state.data is None else state.data.to_json()
    )


def write_checkpoint(
    run: Path, contents: Contents, output: OutputConfig, cancelled: threading.Event | None = None
) -> None:
    """Write to a temporary folder, rename it into place, then prune old checkpoints. Makes no collective calls.

    The newest `keep` checkpoints and those at multiples of `keep_every` are kept.
    cancelled: another thread sets it to end this after the current file; then the checkpoint is not written.
    """
    folder = checkpoint_folder(run, contents.step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    digests = {}
    if contents.data is not None:
        write_json(contents.data, temporary / DATA_FILE, indent=None)
        digests[DATA_FILE] = _sha256(temporary / DATA_FILE)
    for name, tensors in contents.tensors.items():
        if cancelled is not None and cancelled.is_set():
            return
        file = temporary / f"{name}.safetensors"
        write_safetensors(tensors, file)
        digests[file.name] = _sha256(file)
    write_json({**contents.manifest, "sha256": dict(sorted(digests.items()))}, temporary / "manifest.json")
    sync_folder(temporary)
    os.replace(temporary, folder)
    sync_folder(folder.parent)
    for old in list_checkpoints(run)[: -output.keep]:
        if output.keep_every is None or step_of(old) % output.keep_every:
            _remove(old)


def require_disk_space(folder: Path, needed: int) -> None:
    """Raise ValueError unless the disk of `folder` has `needed` bytes free, and a small reserve."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed * 1.05 + RESERVE:
        raise ValueError(
            f"a checkpoint needs {needed * 1.05 / 1e9:.2f} GB and a reserve of {RESERVE / 1e9:.2f} GB, but {folder} "
            f"has only {free / 1e9:.2f} GB free; make room, lower output.keep, or choose "
            "another output.folder (the existing checkpoints stay valid)"
        )


def expected_size(state: TrainingState, averages: int) -> int:
    """Bytes of a checkpoint, at most: the weights, two moments of AdamW, and `averages` averages."""
    trained = sum(p.numel() * 4 for p in trainable(state.model).values())
    return sum(t.numel() * t.element_size() for t in state.weights.values()) + (2 + averages) * trained


def list_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    folders = (run / CHECKPOINTS).glob("step_*")
    return sorted(folder for folder in folders if re.fullmatch(r"step_\d+", folder.name))


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def resume(run: Path, state: TrainingState, wanted: str, accelerator: Accelerator) -> bool:
    """Load a checkpoint into `state`: `latest` (the newest whole one), `never`, or a folder. True if one was loaded.

    What the run wrote after the resumed state is renamed, so that it is kept but not found: with `never` or a folder of
    another run everything, with a checkpoint of this run the later ones.

    Raises ValueError if the folder is not a checkpoint, a file is damaged, the model's settings differ, or the data:
    frozen weights are others, no image is the same, or the run is finished and any image or caption has changed.
    """
    if accelerator.is_main_process:
        _clear_leftovers(run)
    if wanted == "never":
        if accelerator.is_main_process:
            _set_all_aside(run)
        accelerator.wait_for_everyone()
        return False
    if wanted == "latest":
        folder = _newest_whole(run, accelerator)
        if folder is None:
            if accelerator.is_main_process and _has_history(run):
                _set_all_aside(run)
            accelerator.wait_for_everyone()
            return False
    else:
        folder = Path(wanted).expanduser()
    if wanted != "latest" or not accelerator.is_main_process:  # there its files have just been read
        _check_files(folder)
    manifest = _read_manifest(folder)
    _check_settings(manifest["settings"], _plain(state.settings), folder)
    data_changes: list[str] = []
    on_main(accelerator, lambda: data_changes.extend(_changed_data(state, folder, is_finished(run), wanted)))
    _load(state, folder)
    if manifest["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(manifest["scaler"])
    state.step, state.pending = manifest["step"], manifest["pending"]
    if accelerator.is_main_process:
        if wanted == "latest":
            drop_snapshots_after(run, state.step)  # the resumed run writes them again
        else:
            _set_abandoned_aside(run, folder, state.step)
    accelerator.wait_for_everyone()
    accelerator.print(f"resumed from {folder}, step {state.step}")
    for line in [*_changes(manifest["config"], _plain(state.config), state.step), *data_changes]:
        accelerator.print(f"  changed since: {line}")
    return True


def _newest_whole(run: Path, accelerator: Accelerator) -> Path | None:
    """The newest checkpoint whose files are whole; None if there are none at all. Newer, damaged ones are set aside.

    Raises ValueError if all are damaged.
    """
    chosen = -1

    def choose() -> None:
        nonlocal chosen
        problems: dict[Path, ValueError] = {}
        for folder in reversed(list_checkpoints(run)):
            try:
                _check_files(folder)
            except ValueError as error:
                problems[folder] = error
                continue
            chosen = step_of(folder)
            break
        if problems and chosen == -1:
            raise next(iter(problems.values()))
        for folder, problem in problems.items():
            print(f"{str(problem).split(';')[0]}: {folder.name} is set aside and an older checkpoint is used")
            _set_aside(folder)

    on_main(accelerator, choose)
    (step,) = from_main(accelerator, [chosen])
    return None if step == -1 else checkpoint_folder(run, step)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest; ValueError if it is none."""
    manifest = read_json(folder / "manifest.json")
    if missing := {"step", "pending", "settings", "config", "scaler", "sha256"} - manifest.keys():
        raise ValueError(
            f"{folder / 'manifest.json'} is not the manifest of a checkpoint: it has no {', '.join(sorted(missing))}"
        )
    return manifest


def _check_files(folder: Path) -> None:
    """Read a checkpoint's files; ValueError if one is missing or damaged, or there is no manifest."""
    for name, digest in _read_manifest(folder)["sha256"].items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise ValueError(f"{path} is missing or damaged; resume from another checkpoint with --resume FOLDER")


def _set_aside(path: Path) -> None:
    """Rename to the next free `<name>.<number>`: starting over deletes nothing."""
    if path.exists():
        number = 1
        while (aside := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(aside)


def _has_history(run: Path) -> bool:
    """Whether a run without checkpoints has trained: it may be a finished one whose checkpoints were removed."""
    log = run / "metrics.jsonl"
    return bool(list_snapshots(run)) or (log.is_file() and '"lr"' in log.read_text(encoding="utf-8", errors="replace"))


def _set_all_aside(run: Path) -> None:
    for name in (CHECKPOINTS, SNAPSHOTS, "samples", "metrics.jsonl", "index.html"):
        _set_aside(run / name)


def _set_abandoned_aside(run: Path, folder: Path, step: int) -> None:
    """Set aside what this run wrote after the checkpoint in `folder`, which may be of another run."""
    if folder.resolve().parent != (run / CHECKPOINTS).resolve():
        _set_all_aside(run)
        return
    for checkpoint in list_checkpoints(run):
        if step_of(checkpoint) >= step and checkpoint.resolve() != folder.resolve():
            _set_aside(checkpoint)
    for at, snapshot in list_snapshots(run).items():
        if at > step:
            _set_aside(snapshot)


def _check_settings(saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    # A key that the checkpoint lacks is newer than it; what it would change in the weights is found when they are read.
    changed = [
        f"{key} was {saved[key]!r}, now {current.get(key)!r}" for key in _differing(saved, current) if key in saved
    ]
    if changed:
        raise ValueError(
            f"cannot resume from {folder}: {'; '.join(changed)}. Restore the config, choose another output.folder, "
            "or start over with --resume never"
        )


def _changed_data(state: TrainingState, folder: Path, finished: bool, wanted: str) -> list[str]:
    """What has changed in the images, captions and frozen weights since the checkpoint in `folder`, as lines.

    Raises ValueError where it cannot be the same run, or is a finished one.
    """
    path = folder / DATA_FILE
    if state.data is None or not path.is_file():
        return []
    try:
        old = DataRecord.from_json(read_json(path, MAX_DATA_BYTES))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not as a checkpoint writes it ({first_line(error)})") from None
    changes = state.data.changes_since(old)
    way_out = "choose another output.folder, or start over with --resume never"
    if replaced := state.data.replaced(old):
        raise ValueError(
            f"cannot resume from {folder}: the weights of the {' and the '.join(replaced)} are others than it was "
            f"trained with. Put them back, {way_out}"
        )
    if not state.data.shares_images_with(old):
        raise ValueError(f"cannot resume from {folder}: none of its training images is in data.source; {way_out}")
    if changes and finished and wanted == "latest":
        raise ValueError(
            f"{folder.parents[1]} is a finished run of other data: {'; '.join(changes)}. {way_out.capitalize()}"
        )
    return changes


def _changes(saved: Mapping[str, Any], current: Mapping[str, Any], step: int) -> list[str]:
    """Changes of the config that are allowed, but make the run differ from an uninterrupted one."""
    changes = [
        f"{section}.{key} {before[key]!r} -> {after[key]!r}"
        for section in ("data", "loss", "diffusion", "optimizer", "train", "ema", "validation")
        if isinstance(before := saved.get(section), dict) and isinstance(after := current.get(section), dict)
        for key in _differing(before, after)
        if key in before and key in after
    ]
    if (rates := _rates(saved, current, step)) is not None:
        changes.append(f"the learning rate of step {step}: {rates[0]:.3g} -> {rates[1]:.3g}")
    if saved.get("vae") != current.get("vae"):
        changes.append(f"vae {saved.get('vae')!r} -> {current.get('vae')!r}")
    return changes


def _rates(saved: Mapping[str, Any], current: Mapping[str, Any], step: int) -> tuple[float, float] | None:
    """The learning rate of a step before and now; None if it is the same, or not to be worked out."""
    try:
        before, now = (
            learning_rate_at(step, config["train"]["steps"], OptimizerConfig.model_validate(config["optimizer"]))
            for config in (saved, current)
        )
    except (KeyError, ValueError):
        return None
    return None if before == now else (before, now)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """After a round trip through JSON, so that a tuple compares equal to the saved list."""
    return json.loads(json.dumps(settings))


# ----------------------------------------------------------------------------------------------------------------------
# What is in the files


def _groups(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file but the best weights', as they are, sharded or not. Every process calls this."""
    groups = {
        "model": state.weights,
        "ema": state.ema.average,
        "optimizer": _optimizer_tensors(state.model, state.optimizer),
    }
    for name, (module, optimizer) in state.others.items():
        groups[name] = module.state_dict()
        groups[f"{name}_optimizer"] = _optimizer_tensors(module, optimizer)
    if state.power_ema is not None:
        groups["power_ema"] = state.power_ema.state()
    if state.loss_meter is not None:
        groups["loss_meter"] = state.loss_meter.state()
    return groups


def _size(state: TrainingState) -> int:
    """Bytes of a checkpoint of this state."""
    parts = [state.weights, state.ema.average, _optimizer_tensors(state.model, state.optimizer)]
    if state.power_ema is not None:
        parts.append(state.power_ema.state())
    if state.best is not None:
        parts.append(state.best.state())
    for module, optimizer in state.others.values():
        parts += [module.state_dict(), _optimizer_tensors(module, optimizer)]
    return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())


def _manifest(state: TrainingState, accelerator: Accelerator) -> dict[str, Any]:
    config = _plain(state.config)
    return {
        "step": state.step,
        "pending": state.pending,
        "settings": _plain(state.settings),
        "config": config,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "versions": {
            "latentdiff": latentdiff.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }


def _load(state: TrainingState, folder: Path) -> None:
    """Everything is read and checked before anything is changed."""
    saved = {file.stem: read_safetensors(file) for file in sorted(folder.glob("*.safetensors"))}
    weights = state.weights
    check_fit(weights, saved["model"], str(folder / "model.safetensors"))
    entries = _optimizer_entries(state.model, state.optimizer, saved["optimizer"])
    others = {}
    for name, (module, optimizer) in state.others.items():
        if name in saved:
            check_fit(module.state_dict(), saved[name], str(folder / f"{name}.safetensors"))
            others[name] = _optimizer_entries(module, optimizer, saved[f"{name}_optimizer"])
    if state.power_ema is not None and "power_ema" not in saved:
        raise ValueError(
            f"{folder} has no averages for snapshots: it was written with ema.snapshot_every null; set it to null "
            "again, or start over with --resume never"
        )
    if state.best is not None and "best" not in saved:
        raise ValueError(
            f"{folder} has no best weights: it was written by a run that publishes the last ones; set output.publish "
            "to last, or start over with --resume never"
        )
    if state.power_ema is not None:
        state.power_ema.load(saved["power_ema"])  # first, as it checks
    for name, tensor in weights.items():
        fill(tensor, saved["model"][name])
    state.ema.load(saved["ema"])
    for parameter, entry in entries.items():
        state.optimizer.state[parameter] = entry
    for name, entries in others.items():
        module, optimizer = state.others[name]
        for key, tensor in module.state_dict().items():
            fill(tensor, saved[name][key])
        for parameter, entry in entries.items():
            optimizer.state[parameter] = entry
    if state.loss_meter is not None:
        state.loss_meter.load(saved["loss_meter"])
    if state.best is not None:
        state.best.load(saved["best"])


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat names: `<parameter>:exp_avg`. Its hyper-parameters are functions of the config."""
    return {
        f"{name}:{key}": torch.as_tensor(value)
        for name, parameter in trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _optimizer_entries(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> dict[Tensor, dict[str, Tensor]]:
    """The optimiser's state by parameter, on the parameter's device and in its memory layout.

    Raises ValueError if it is of another model, or of another optimizer.kind.
    """
    parameters = trainable(model)
    muon = {p for group in optimizer.param_groups if group.get("muon") for p in group["params"]}
    entries: dict[Tensor, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit(":", 1)
        if parameter_name not in parameters:
            raise ValueError(f"the optimiser's state belongs to another model: it has {parameter_name}")
        parameter = parameters[parameter_name]
        if (key == "momentum_buffer") != (parameter in muon):
            raise ValueError(
                f"the checkpoint was written with another optimizer.kind (it has {name}); set it back, choose another "
                "output.folder, or start over with --resume never"
            )
        if tensor.ndim == 0:  # Adam's step counter is on the CPU, unless the kernel is fused
            value = tensor.to(parameter.device if optimizer.defaults["fused"] else "cpu", copy=True)
        else:
            value = torch.empty_like(parameter)
            fill(value, tensor)
        entries.setdefault(parameter, {})[key] = value
    return entries


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Removing


def _remove(folder: Path) -> None:
    """Remove a checkpoint, after renaming it: a kill must not leave half of one."""
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    os.replace(folder, old)
    remove(old)


def _clear_leftovers(run: Path) -> None:
    """Remove what interrupted saves and removals left behind."""
    for pattern in (".step_*.tmp", ".step_*.old"):
        for leftover in (run / CHECKPOINTS).glob(pattern):
            remove(leftover)
