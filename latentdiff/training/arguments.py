"""The command line of both training scripts, and how every command line of the project is run. Imports no torch."""

import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand
from typer.main import get_command

from latentdiff.printable import printable, shown
from latentdiff.recipes import CONFIGS

# Plain text help as wide as the terminal, Python's own tracebacks, no shell completion.
SETTINGS: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "context_settings": {"max_content_width": 120},
}
TRACEBACK = "--traceback"  # which every command line takes


@dataclass(frozen=True)
class TrainArguments:
    """A config file, overrides of its values, and the checkpoint to resume from."""

    config: str
    overrides: tuple[str, ...]
    resume: str


Stage = Literal["vae", "unet"]
DESCRIPTIONS: dict[Stage, str] = {
    "vae": "Train the autoencoder (stage 1).",
    "unet": "Train the text-conditioned UNet (stage 2).",
}


def answer_help(stage: Stage) -> None:
    """Answer --help on the process's command line and exit; called before the imports that take seconds."""
    if "--help" in sys.argv[1:]:
        parse_arguments(["--help"], stage)


def parse_arguments(arguments: Sequence[str] | None, stage: Stage, name: str | None = None) -> TrainArguments:
    """The command line of a training script; None: the process's own. name: of the command in its help.

    Exits with status 0 after --help and --explain, with status 2 and one line on an unknown or incomplete option.
    Raises ValueError if the config or an @FILE is missing, or --explain names an unknown section.
    """
    app = typer.Typer(**SETTINGS)

    class TrainCommand(TyperCommand):
        """A command whose --help ends with an example and every config key."""

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            # The reference file, because the keys themselves can only be read after torch is imported.
            keys = (CONFIGS / "reference" / f"{stage}.yaml").read_text(encoding="utf-8")
            command = ctx.command_path if name else f"python {ctx.command_path}"
            example = f"{command} configs/demo/{stage}.yaml train.steps=1000 optimizer.lr=1e-3"
            formatter.write(f"\nExample: {example}\n\n{keys}")

    @app.command(cls=TrainCommand, help=DESCRIPTIONS[stage])
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
            from latentdiff.explain import STAGES, explain

            kind = next(kind for kind, name in STAGES.items() if name == stage)
            print(explain(kind, [] if config is None else [config, *given]), end="")
            raise typer.Exit()
        if config is None:
            raise ValueError("CONFIG is missing, must be a YAML config such as configs/demo/unet.yaml")
        if resume not in ("latest", "never") and not Path(resume).expanduser().is_dir():
            raise ValueError(
                f"--resume is {shown(resume)}, must be latest, never or the folder of a checkpoint, such as "
                "RUN/checkpoints/step_00000500"
            )
        lines = [line for word in given for line in (_of_file(word) if word[:1] == "@" else [word])]
        return TrainArguments(config, tuple(lines), resume)

    return run_typer(app, _without_dashes(sys.argv[1:] if arguments is None else arguments), name)


def _without_dashes(arguments: Sequence[str]) -> list[str]:
    """`--section.key=value` and `--section.key value`, as other trainers have them, as section.key=value."""
    words: list[str] = []
    for argument in arguments:
        if words and re.fullmatch(r"--\w+(\.\w+)+", words[-1]):
            words[-1] = f"{words[-1][2:]}={argument}"
        else:
            words.append(argument[2:] if re.match(r"--\w+(\.\w+)+=", argument) else argument)
    return words


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


def run_as_command(main: Callable[[Sequence[str]], object], arguments: Sequence[str] | None = None) -> None:
    """Run a main function on a command line, None: the process's own; what can be expected to fail ends in one line.

    A ValueError, which wrong input raises, ends with exit status 2; an error of the system (a file, the disk, memory)
    with 1. With --traceback anywhere on the command line they pass, as all other errors do.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    passes = TRACEBACK in given
    status = 0
    try:
        with _short_warnings():
            main([argument for argument in given if argument != TRACEBACK])
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        expected = expectation(error)
        if passes or expected is None:
            raise
        text, status = expected
        print(f"error: {printable(text)}", file=sys.stderr)
    if "WORLD_SIZE" in os.environ:
        # What main left in reference cycles goes now: the threads of a process group end with it, and they need the
        # interpreter.
        gc.collect()
    if status:
        sys.exit(status)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Within the block, what is said to users is a line without the place in the code; other warnings are unchanged."""
    usual = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is UserWarning:
            return f"warning: {printable(str(message))}\n"
        return usual(message, category, *place, **line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


def expectation(error: Exception) -> tuple[str, int] | None:
    """The line and the exit status for an error that can be expected; None for any other, which is a bug."""
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, OSError):
        # That of a worker process begins with its traceback.
        text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return f"{text} ({TRACEBACK} shows where)", 1
    text = str(error)
    if type(error).__name__.startswith("Dist") or ("gloo" in text and isinstance(error, RuntimeError)):
        reason = text.strip().splitlines()[0]
        return f"another process of this run has ended or does not answer: {reason} ({TRACEBACK} shows where)", 1
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    if isinstance(error, MemoryError) or is_torchs:
        first = (text.strip() or type(error).__name__).splitlines()[0]
        return f"out of memory: {first} ({TRACEBACK} shows where)", 1
    return None
