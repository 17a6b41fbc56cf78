"""The command line of both training scripts."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainArguments:
    """A config file, overrides of its values, and from which checkpoint to go on."""

    config: str
    overrides: tuple[str, ...]
    resume: str


def parse_arguments(arguments: Sequence[str] | None, description: str) -> TrainArguments:
    """The command line of both scripts."""
    parser = _Parser(description=description, fromfile_prefix_chars="@")
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
    return TrainArguments(parsed.config, tuple(parsed.overrides), parsed.resume)


class _Parser(argparse.ArgumentParser):
    """Reads arguments from files that may have comments and empty lines."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """One argument a line; # starts a comment."""
        argument = re.sub(r"(^|\s)#.*", "", arg_line).strip()
        return [argument] if argument else []


def run_as_command(main: Callable[[], None]) -> None:
    """Run a script's main: a wrong input is one line and exit status 2 (LATENTDIFF_TRACEBACK=1 shows where)."""
    try:
        main()
    except ValueError as error:
        if os.environ.get("LATENTDIFF_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
