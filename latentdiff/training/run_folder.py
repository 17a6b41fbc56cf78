"""A run owns its folder: one process at a time trains there, one stage, and what is finished stays as it is."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, stage_of
from latentdiff.distributed import on_main
from latentdiff.formats.diffusers_folder import PIPELINE_FILE
from latentdiff.formats.files import read_json, write_json
from latentdiff.formats.locks import holding_file
from latentdiff.formats.lora import LORA_FILE

LOCK_FILE, RECORD_FILE = ".lock", "run.json"
STAGES = {"vae": "stage 1 (latentdiff train-vae)", "unet": "stage 2 (latentdiff train-unet)"}


@contextmanager
def owned(config: VAETrainingConfig | UNetTrainingConfig, accelerator: Accelerator) -> Iterator[None]:
    """No other run takes the folder of this one, `output.folder`, until the block ends. Every process calls this.

    The lock is the kernel's: it ends with the process, however that ends. Some network file systems have none.
    Raises ValueError if another run holds it, or the folder belongs to something else.
    """
    folder = Path(config.output.folder).expanduser()
    with ExitStack() as stack:
        on_main(accelerator, lambda: stack.enter_context(_claimed(folder, config)))
        yield


@contextmanager
def _claimed(folder: Path, config: VAETrainingConfig | UNetTrainingConfig) -> Iterator[None]:
    refuse_foreign(folder, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output.folder {config.output.folder!r}: {error}") from None
    try:
        with holding_file(folder / LOCK_FILE) as held:
            if not held:
                raise ValueError(
                    f"{folder} is in use by {_holder(folder)}; wait for it, stop it, or choose another output.folder"
                )
            started = datetime.now().astimezone().isoformat(timespec="seconds")
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": started}
            # In place: the lock is this file's, and another one under its name would be another lock.
            (folder / LOCK_FILE).write_text(json.dumps(holder) + "\n", encoding="utf-8")
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # if nothing was written


def _holder(folder: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']}, which trains there since {holder['since']}"
    return "another process"


def refuse_foreign(folder: Path, config: VAETrainingConfig | UNetTrainingConfig) -> None:
    """Raise ValueError if a run with this config must not write into the folder: it holds something else."""
    stage = _stage(config)
    source = Path(config.data.source).expanduser()
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"output.folder {config.output.folder!r} is in data.source {config.data.source!r}, whose images would then "
            "include the run's; choose a folder elsewhere"
        )
    if (folder / "ema.json").is_file():
        raise ValueError(f"{folder} was written by `latentdiff ema`; choose another output.folder")
    if has_model(folder) and not any((folder / name).exists() for name in (RECORD_FILE, "checkpoints")):
        raise ValueError(f"{folder} holds a model that was not trained there; choose another output.folder")
    if (folder / "config.yaml").is_file():
        found = stage_of(folder / "config.yaml")
        if found != stage:
            raise ValueError(f"{folder} is a run of {STAGES[found]}; choose another output.folder for {STAGES[stage]}")


def refuse_run(folder: Path, option: str) -> None:
    """Raise ValueError if a training run lives in the folder. option: what names it, for the message."""
    if (folder / "config.yaml").is_file() and not (folder / "ema.json").is_file():
        raise ValueError(f"{option} {folder} is the folder of a training run; choose another one")


def write_record(folder: Path, config: VAETrainingConfig | UNetTrainingConfig, *, finished: bool) -> None:
    """Write run.json: what the run is."""
    record: dict[str, Any] = {"stage": STAGES[_stage(config)], "data": config.data.source, "steps": config.train.steps}
    write_json({**record, "finished": finished}, folder / RECORD_FILE)


def has_model(folder: Path) -> bool:
    """Whether the folder holds a pipeline, a single model or a LoRA."""
    return any((folder / name).is_file() for name in ("config.json", PIPELINE_FILE, LORA_FILE))


def _stage(config: VAETrainingConfig | UNetTrainingConfig) -> str:
    return "unet" if isinstance(config, UNetTrainingConfig) else "vae"


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder has written its final model and all that comes with it."""
    path = folder / RECORD_FILE
    return has_model(folder) and path.is_file() and read_json(path).get("finished") is True
