"""What several commands share: options, opening a pipeline, checking and writing files. Imports no torch."""

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of stage 2.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: a GPU if there is one).")]
LogOption = Annotated[
    Path | None, typer.Option(help="Also append the figures to this Markdown file, such as docs/LOG.md.")
]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Show no progress bar.")]


# ----------------------------------------------------------------------------------------------------------------------
# Options


class Command(TyperCommand):
    """A command whose list options take several values each: `--values 1 2 3`, like argparse's nargs="+"."""

    def values_of_bare(self, option: str) -> list[str]:
        """The values of a list option that is given without any; by default none, which is an error."""
        return []

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of a list option before each of its values, as typer wants it."""
        lists = {name for param in self.get_params(ctx) if getattr(param, "multiple", False) for name in param.opts}
        spread, option, given = [], None, 0
        for i, word in enumerate([*args, None]):
            if option is not None and word is not None and not _is_option(word):
                spread += [option, word]
                given += 1
                continue
            if option is not None and given == 0:
                spread += [part for value in self.values_of_bare(option) for part in (option, value)] or [option]
            option, given = (word, 0) if word in lists else (None, 0)
            if word == "--":  # only arguments follow
                spread += args[i:]
                break
            if word is not None and option is None:
                spread.append(word)
        return super().parse_args(ctx, spread)


def _is_option(word: str) -> bool:
    """Whether a word starts an option, as a negative number does not."""
    if not word.startswith("-") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses as parameters: typer sees each of their fields as an option of its own."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=field.type))

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    spread.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread


# ----------------------------------------------------------------------------------------------------------------------
# Models and files


def open_pipeline(
    model: str, device: str | None, dtype: str = "float32", prediction_type: str | None = None
) -> "LatentDiffusionPipeline":
    """The pipeline of a folder, single file or model id, on a device.

    dtype: torch's name of a type, for the weights and all that is computed; "auto": weights in float32, and the decoder
        in the fastest way that costs no quality.
    A folder may also be a checkpoint, or a run of stage 2 that has not finished: the averaged weights of its newest
    checkpoint are taken then. prediction_type: of a single file that does not say it.
    Raises ValueError if it cannot be read or the device not be used.
    """
    from latentdiff.devices import choose_device
    from latentdiff.pipeline import LatentDiffusionPipeline
    from latentdiff.pipeline.speed import AUTO

    chosen = choose_device(device)
    folder = Path(model).expanduser()
    if folder.is_file():
        return LatentDiffusionPipeline.from_single_file(folder, dtype=dtype, prediction_type=prediction_type).to(chosen)
    if prediction_type is not None:
        raise ValueError(f"--prediction-type {prediction_type} is for single files; {model} says itself what it is")
    if (folder / "manifest.json").is_file() or (folder / "config.yaml").is_file():
        # Only here: what trains takes a while to import.
        from latentdiff.training.checkpoint import step_of
        from latentdiff.training.unet_model import open_checkpoint, unfinished_checkpoint

        checkpoint = unfinished_checkpoint(folder)
        if checkpoint is not None:
            print(f"the averaged weights of step {step_of(checkpoint):,}, from {checkpoint}", file=sys.stderr)
            return open_checkpoint(checkpoint).to(chosen, None if dtype == AUTO else dtype)  # it is in float32
    return LatentDiffusionPipeline.from_pretrained(model, dtype=dtype).to(chosen)


def check_writable(option: str, path: Path) -> None:
    """Raise ValueError if a file cannot be written at `path`; called before the work whose result it gets."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder, must be a file")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"{option} {path}: {existing} is not a folder")


def append_to_log(path: Path, command: Sequence[str], report: str) -> None:
    """Append what a command measured, where and when, to a Markdown file. command: its words."""
    import torch

    from latentdiff.devices import processor_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores} cores, {processor_name()}"
    entry = f"\n## {date.today()}: {shlex.join(command)}\n\n{device}; torch {torch.__version__}.\n\n{report}\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(entry)
