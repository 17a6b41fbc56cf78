"""Checkpoints of a run: model, EMA and optimiser as safetensors beside a manifest, written atomically.

A checkpoint holds no random state: every draw is a function of the step (`randomness`), so the step is enough.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.formats.diffusers_folder import (
    load_strictly,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from latentdiff.training.ema import EMA

CHECKPOINTS = "checkpoints"


@dataclass
class TrainingState:
    """All that a resume needs. `model` is the bare module; `settings` (the model's config) must not change."""

    model: nn.Module
    ema: EMA
    optimizer: Optimizer
    settings: Mapping[str, Any]
    step: int = 0


def checkpoint_folder(run: Path, step: int) -> Path:
    """saved/<run>/checkpoints/step_00000500: the state before optimiser step 500 (0-based)."""
    return run / CHECKPOINTS / f"step_{step:08d}"


def save_checkpoint(run: Path, state: TrainingState, keep: int, accelerator: Accelerator) -> None:
    """Write the state beside, then rename; remove all but the newest `keep`. Every process calls this."""
    if accelerator.is_main_process:
        folder = checkpoint_folder(run, state.step)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        write_safetensors(state.model.state_dict(), temporary / "model.safetensors")
        write_safetensors(state.ema.average, temporary / "ema.safetensors")
        write_safetensors(_optimizer_tensors(state), temporary / "optimizer.safetensors")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        manifest = {"step": state.step, "settings": _plain(state.settings), "scaler": scaler}
        manifest["torch"] = torch.__version__
        manifest["sha256"] = {file.name: _sha256(file) for file in sorted(temporary.glob("*.safetensors"))}
        write_json(manifest, temporary / "manifest.json")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def list_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    folders = (run / CHECKPOINTS).glob("step_*")
    return sorted(folder for folder in folders if re.fullmatch(r"step_\d+", folder.name))


def resume(run: Path, state: TrainingState, wanted: str, accelerator: Accelerator) -> bool:
    """Load a checkpoint into `state`: `latest` (if there is one), `never`, or a folder. True if one was loaded.

    Checkpoints of the run that are not on the way to the new state (with `never` all, with a folder the later ones)
    are set aside under another name, so that they are neither found nor take the place of the new ones.

    Raises ValueError if the folder is no checkpoint, a file of it is broken, or it is of a model with other settings.
    """
    if wanted == "never":
        if accelerator.is_main_process:
            for name in (CHECKPOINTS, "samples", "metrics.jsonl"):
                _set_aside(run / name)
        accelerator.wait_for_everyone()
        return False
    if wanted == "latest":
        found = list_checkpoints(run)
        if not found:
            return False
        folder = found[-1]
    else:
        folder = Path(wanted)
    manifest = read_json(folder / "manifest.json")
    _check_settings(manifest["settings"], _plain(state.settings), folder)
    for name, digest in manifest["sha256"].items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise ValueError(f"{path} is missing or damaged; resume from another checkpoint with --resume FOLDER")
    weights = folder / "model.safetensors"
    load_strictly(state.model, read_safetensors(weights), str(weights), assign=False)
    state.ema.load(read_safetensors(folder / "ema.safetensors"))
    _load_optimizer(state, read_safetensors(folder / "optimizer.safetensors"))
    if manifest["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(manifest["scaler"])
    state.step = manifest["step"]
    if accelerator.is_main_process:
        for later in list_checkpoints(run):
            if later.name > checkpoint_folder(run, state.step).name:
                _set_aside(later)
    accelerator.wait_for_everyone()
    accelerator.print(f"resumed from {folder}, step {state.step}")
    return True


def _set_aside(path: Path) -> None:
    """Rename to the next free `<name>.<number>`: a new start deletes nothing."""
    if path.exists():
        number = 1
        while (aside := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(aside)


def _check_settings(saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    changed = [
        f"{key} was {saved.get(key)!r}, now {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise ValueError(
            f"cannot resume from {folder}: {'; '.join(changed)}. Restore the config, choose another output.folder, "
            "or start anew with --resume never"
        )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON reads it back, so that a tuple compares equal to the saved list."""
    return json.loads(json.dumps(settings))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named_parameters(state: TrainingState) -> dict[str, Tensor]:
    return {name: p for name, p in state.model.named_parameters() if p.requires_grad}


def _optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    """AdamW's state as flat names: `<parameter>:exp_avg`. Its hyper-parameters are functions of the config."""
    return {
        f"{name}:{key}": torch.as_tensor(value)
        for name, parameter in _named_parameters(state).items()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    parameters = _named_parameters(state)
    entries: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.rsplit(":", 1)
        entries.setdefault(parameter, {})[key] = tensor
    if entries.keys() - parameters.keys():
        raise ValueError(f"the optimiser's state is of another model: {sorted(entries.keys() - parameters.keys())[:3]}")
    for name, entry in entries.items():
        parameter = parameters[name]
        state.optimizer.state[parameter] = {
            # Adam's step counter is on the CPU, unless the kernel is fused; the moments are laid out like the weights.
            key: value.to(parameter.device if state.optimizer.defaults["fused"] else "cpu")
            if value.ndim == 0
            else torch.empty_like(parameter).copy_(value)
            for key, value in entry.items()
        }
