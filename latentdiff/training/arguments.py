"""The command line of both training scripts, and how every command line of the project is run. Imports no torch."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

# Plain text help as wide as the terminal, Python's own tracebacks, no shell completion.
SETTINGS: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "context_settings": {"max_content_width": 120},
}


@dataclass(frozen=True)
class TrainArguments:
    """A config file, overrides of its values, and the checkpoint to resume from."""

    config: str
    overrides: tuple[str, ...]
    resume: str


def parse_arguments(arguments: Sequence[str] | None, description: str, kind: type) -> TrainArguments:
    """The command line of a training script; None: the process's own.

    kind: the script's config, VAETrainingConfig or UNetTrainingConfig, whose keys --help and --explain print.

    Exits with status 0 after --help and --explain, with status 2 and one line on an unknown or incomplete option.
    Raises ValueError if the config or an @FILE is missing, or --explain names an unknown section.
    """
    app = typer.Typer(**SETTINGS)

    class TrainCommand(TyperCommand):
        """A command whose --help ends with every config key."""

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            from latentdiff.explain import explain

            formatter.write(f"\nConfig keys:\n\n{explain(kind)}")

    @app.command(cls=TrainCommand, help=description)
    def train(
        config: Annotated[
            str | None,
            typer.Argument(metavar="CONFIG", help="YAML config, such as configs/demo/unet.yaml.", show_default=False),
        ] = None,
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="section.key=value", help="Config values, or @FILE with one per line."),
        ] = None,
        resume: Annotated[
            str,
            typer.Option(
                metavar="latest|never|FOLDER",
                help="Resume from the run's newest checkpoint if there is one, start from scratch, or resume from a "
                "checkpoint folder.",
            ),
        ] = "latest",
        explain_keys: Annotated[
            bool,
            typer.Option(
                "--explain",
                help="Print every config key with default, unit and meaning, or those of the sections given instead "
                "of CONFIG, and exit.",
            ),
        ] = False,
    ) -> TrainArguments:
        given = overrides or []
        if explain_keys:
            from latentdiff.explain import explain

            print(explain(kind, [] if config is None else [config, *given]), end="")
            raise typer.Exit()
        if config is None:
            raise ValueError("CONFIG is missing, must be a YAML config such as configs/demo/unet.yaml")
        lines = [line for word in given for line in (_of_file(word) if word[:1] == "@" else [word])]
        return TrainArguments(config, tuple(lines), resume)

    return run_typer(app, arguments)


def _of_file(argument: str) -> list[str]:
    """The overrides in @FILE, one per line; empty lines and lines that start with # are skipped."""
    path = Path(argument[1:])
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#") and not re.match(r"[\w.]+=", line):
            raise ValueError(f"{path}, line {number} is {line!r}, must be of the form section.key=value")
    return [line for line in lines if line and not line.startswith("#")]


def run_typer(app: typer.Typer, arguments: Sequence[str] | None, name: str | None = None) -> Any:
    """Run a typer app and return what its function returns.

    arguments: None for the process's own; name: of the command in its help, None for the file's.
    Exits with status 2 and one line on stderr for wrong usage, 0 after --help, 130 on Ctrl-C. Other exceptions pass.
    """
    try:
        result = get_command(app).main(
            None if arguments is None else list(arguments), prog_name=name, standalone_mode=False
        )
    except typer.TyperException as error:
        print(f"error: {' '.join(error.format_message().split())} (see --help)", file=sys.stderr)
        sys.exit(error.exit_code)
    if isinstance(result, int):  # an exit status: our functions return none
        sys.exit(result)
    return result


def run_as_command(main: Callable[[], None]) -> None:
    """Run a main function; a ValueError is one line on stderr and exit status 2.

    With LATENTDIFF_TRACEBACK=1 in the environment the ValueError passes, with its traceback.
    """
    try:
        main()
    except ValueError as error:
        if os.environ.get("LATENTDIFF_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
