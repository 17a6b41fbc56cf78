"""`latentdiff new` and `latentdiff train`: from a folder of images to a recipe, and to a trained model."""

import math
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.commands.common import DeviceOption, NoProgress, with_option_groups
from latentdiff.printable import printable

if TYPE_CHECKING:
    from latentdiff.evaluation.inspection import Inspection

Images = Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, archive, parquet file or hub id of images.")]


@dataclass(frozen=True)
class Wanted:
    """What `new` and `train` are told besides the images."""

    minutes: Annotated[float, typer.Option(help="How long both stages may take together, on this machine.")] = 20.0
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Training size, pixels (default: 64, on a GPU 256; less for small images)."),
    ] = None
    name: Annotated[str | None, typer.Option(help="Name of the recipe and the runs (default: the source's).")] = None
    device: DeviceOption = None
    no_progress: NoProgress = False


@with_option_groups
def new(
    source: Images,
    options: Wanted,
) -> None:
    """Write configs/NAME/vae.yaml and unet.yaml for your own images, sized to them and to the minutes.

    Some steps are timed on this machine for that. `latentdiff train` does this, and trains.
    """
    chosen = name_of(source, options.name)
    folder = Path("configs", chosen)
    _check(options)
    _refuse_runs(chosen)
    found = _inspected(source, not options.no_progress)
    for file in _write(source, chosen, folder, options, found):
        print(file)
    training = shlex.join(["latentdiff", "train", source, "--name", chosen])
    print(f"next: latentdiff plan {folder}, or {training}")


@with_option_groups
def train(
    source: Images,
    options: Wanted,
) -> None:
    """Train both stages on your own images: inspect them, write configs/NAME, train, and say what to do next.

    Run the same command again to go on with a training that was stopped. Configs that are there are used as they are.
    """
    chosen = name_of(source, options.name)
    folder = Path("configs", chosen)
    files = [folder / "vae.yaml", folder / "unet.yaml"]
    _check(options)
    if all(file.is_file() for file in files):
        _refuse_other_images(files, source, options.size)
        print(
            f"{folder} is there and is used as it is, whatever --minutes says; for a new recipe choose another --name"
        )
    else:
        _refuse_runs(chosen)
        found = _inspected(source, not options.no_progress)
        _write(source, chosen, folder, options, found)
        print(f"wrote {files[0]} and {files[1]}")
    from latentdiff.config import load_run_config
    from latentdiff.training.run_folder import is_finished
    from latentdiff.training.run_page import next_command

    for file, command in zip(files, ("train-vae", "train-unet"), strict=True):
        config = load_run_config(file)
        run = Path(config.output.folder).expanduser()
        if is_finished(run):
            print(f"{run} is finished")
            if command == "train-unet" and (following := next_command(run, config)):
                print(f"next: {printable(following)}")
            continue
        words = [sys.executable, "-m", "latentdiff", command, str(file)]
        words += ["logging.progress=false"] if options.no_progress else []
        print(f"\n$ latentdiff {command} {file}", flush=True)
        status = _run_and_wait(words)
        if status < 0:
            name = signal.Signals(-status).name
            print(
                f"error: {command} was ended by {name}{' (is there enough memory?)' if name == 'SIGKILL' else ''}; "
                "the same command goes on from its newest checkpoint",
                file=sys.stderr,
            )
        if status:
            raise typer.Exit(status if status > 0 else 128 - status)
        if not is_finished(run):
            print(f"{run} was stopped; the same command goes on")
            return


def _run_and_wait(words: Sequence[str]) -> int:
    """Run a stage in a process of its own, so that what it took is free for the next one; its exit status.

    A signal to stop is the stage's business: it saves first, which takes longer than subprocess.run would wait. Ctrl-C
    reaches it anyway, the others are passed on.
    """
    running: list[subprocess.Popen[bytes]] = []

    def received(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT and running:
            running[0].send_signal(number)

    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = [signal.signal(number, received) for number in numbers]
    try:
        running.append(subprocess.Popen(words))
        return running[0].wait()
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def name_of(source: str, name: str | None) -> str:
    """The recipe's name: --name, or the source's own in plain letters; ValueError for one that is no file name."""
    if not source.strip():
        raise ValueError(f"SOURCE is {source!r}, must be a folder, archive, parquet file or hub id of images")
    if name is None:
        stem = Path(source.rstrip("/*")).stem if not Path(source).is_dir() else Path(source).resolve().name
        name = re.sub(r"\W+", "-", stem.lower()).strip("-") or "mine"
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise ValueError(f"--name is {name!r}, must consist of letters, digits, '.', '-' and '_'")
    return name


def _inspected(source: str, progress: bool) -> "Inspection":
    """What is in a source; ValueError if training would refuse it."""
    from latentdiff.evaluation.inspection import inspect, read_settings, sections
    from latentdiff.evaluation.inspection_page import as_text

    found = inspect(read_settings(source, None, None), progress)
    if found.rows and not found.captioned:
        print(
            "there are no captions: the model will draw such images without a prompt (docs/data.md: forms of captions)"
        )
        found = inspect(read_settings(source, None, None, ["data.captions=none"]), progress)
    if found.problems:
        command = shlex.join(["latentdiff", "inspect", source])
        raise ValueError("\n".join([*found.problems, f"`{command}` shows everything about it"]))
    shown = [section for section in sections(found) if section.title.startswith(("Files", "Captions", "Held"))]
    print(as_text(shown), end="\n\n")
    return found


def _write(
    source: str,
    name: str,
    folder: Path,
    options: Wanted,
    found: "Inspection",
) -> list[Path]:
    """Write a recipe and print its plan."""
    from latentdiff.devices import choose_device
    from latentdiff.training.new_recipe import default_size, new_recipe
    from latentdiff.training.plan import duration

    place = choose_device(options.device)
    recipe = new_recipe(name, source, options.size or default_size(found, place), options.minutes, found, place)
    files = recipe.write(folder)
    for stage, (file, plan) in enumerate(zip(files, recipe.plans, strict=True), 1):
        print(f"stage {stage}, {file}\n{plan.text()}")
    print(f"both stages at {recipe.unet['data']['size']} px: about {duration(recipe.seconds)}")
    if recipe.seconds > 90 * options.minutes:
        print(
            f"that is more than --minutes {options.minutes:g}, with fewer steps nothing is learned; "
            "a smaller --size is faster"
        )
    return files


def _check(options: Wanted) -> None:
    if options.device is not None:
        from latentdiff.devices import choose_device

        choose_device(options.device)  # before the images are read
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        raise ValueError(f"--minutes is {options.minutes:g}, must be a finite number above 0")


def _refuse_runs(name: str) -> None:
    for run in (Path("saved", f"{name}-vae"), Path("saved", name)):
        if run.exists():
            raise ValueError(f"{run} is there already, of another recipe; delete it or choose another --name")


def _refuse_other_images(files: list[Path], source: str, size: int | None) -> None:
    from latentdiff.config import load_run_config

    for file in files:
        data = load_run_config(file).data
        known = data.source
        if size is not None and data.shape != (size, size):
            raise ValueError(f"{file} is for images of {data.shape[0]} px, not --size {size}; choose another --name")
        if known != source and Path(known).expanduser().resolve() != Path(source).expanduser().resolve():
            raise ValueError(f"{file} is for the images of {known!r}, not {source!r}; choose another --name")
