"""The command line of both training scripts."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainArguments:
    """A config file, overrides of its values, and from which checkpoint to go on."""

    config: str
    overrides: tuple[str, ...]
    resume: str


def parse_arguments(arguments: Sequence[str] | None, description: str, kind: type) -> TrainArguments:
    """The command line of both scripts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="YAML config, such as configs/demo/vae.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config values, such as train.steps=100, or @FILE with one a line",
    )
    parser.add_argument(
        "--resume",
        default="latest",
        metavar="latest|never|FOLDER",
        help="continue from the newest checkpoint of the run if there is one (the default), start anew, or continue "
        "from a checkpoint folder",
    )
    parsed = parser.parse_intermixed_args(arguments)
    overrides = [line for given in parsed.overrides for line in (_of_file(given) if given[:1] == "@" else [given])]
    return TrainArguments(parsed.config, tuple(overrides), parsed.resume)


def _of_file(argument: str) -> list[str]:
    """The overrides in @FILE, one a line; empty lines and those that start with # are left out."""
    path = Path(argument[1:])
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#") and not re.match(r"[\w.]+=", line):
            raise ValueError(f"{path}, line {number} is {line!r}, must be of the form section.key=value")
    return [line for line in lines if line and not line.startswith("#")]


def run_as_command(main: Callable[[], None]) -> None:
    """Run a script's main: a wrong input is one line and exit status 2 (LATENTDIFF_TRACEBACK=1 shows where)."""
    try:
        main()
    except ValueError as error:
        if os.environ.get("LATENTDIFF_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
