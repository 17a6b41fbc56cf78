"""The `latentdiff` command itself: help, several values per option, grouped options, wrong usage."""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.main import get_command

import latentdiff
from latentdiff.commands.cli import app, main
from latentdiff.commands.common import Command, with_option_groups
from latentdiff.training.arguments import SETTINGS, run_typer

COMMANDS = [
    "train",
    "new",
    "plan",
    "configs",
    "generate",
    "image-to-image",
    "inpaint",
    "interpolate",
    "variations",
    "grid",
    "forward-process",
]
COMMANDS += [
    "info",
    "inspect",
    "evaluate",
    "evaluate-vae",
    "evaluate-classes",
    "report",
    "serve",
    "ema",
    "export",
    "push",
]
COMMANDS += ["train-vae", "train-unet"]


def lists_app() -> typer.Typer:
    """A command with list options that returns what it was given."""
    app = typer.Typer(**SETTINGS)

    @app.command(cls=Command)
    def command(
        words: list[str],
        values: Annotated[list[float] | None, typer.Option()] = None,
        names: Annotated[list[str] | None, typer.Option()] = None,
        flag: Annotated[bool, typer.Option("--flag")] = False,
    ) -> dict[str, object]:
        return {"words": words, "values": values, "names": names, "flag": flag}

    return app


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "--values", "1", "-2", "3"], {"words": ["a"], "values": [1, -2, 3], "flag": False}),
        (["a", "--values", "1", "--names", "x", "y", "--flag"], {"values": [1], "names": ["x", "y"], "flag": True}),
        (["--values", "1", "2", "--flag", "a", "b"], {"words": ["a", "b"], "values": [1, 2]}),
        (["--values", "1", "--values", "2", "--", "a", "--names"], {"words": ["a", "--names"], "values": [1, 2]}),
        (["--values=1", "a"], {"words": ["a"], "values": [1]}),
        (["words", "values"], {"words": ["words", "values"], "names": None}),
    ],
)
def test_list_options_take_several_values(arguments, expected):
    result = run_typer(lists_app(), arguments)
    assert {name: result[name] for name in expected} == expected


def test_list_option_needs_a_value(capsys):
    for arguments in (["a", "--values", "--flag"], ["a", "--values"]):
        with pytest.raises(SystemExit) as end:
            run_typer(lists_app(), arguments)
        assert end.value.code == 2 and "--values" in capsys.readouterr().err


def test_option_groups_are_spread_into_options():
    @dataclass(frozen=True)
    class Size:
        height: Annotated[int | None, typer.Option(help="Pixels.")] = None
        width: Annotated[int, typer.Option(help="Pixels.")] = 3

    app = typer.Typer(**SETTINGS)
    seen = []

    @app.command()
    @with_option_groups
    def command(name: str, size: Size, count: int = 1) -> None:
        seen.append((name, size, count))

    run_typer(app, ["a", "--height", "5", "--count", "2"])
    run_typer(app, ["b", "--width", "4"])
    assert seen == [("a", Size(5, 3), 2), ("b", Size(None, 4), 1)]


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"latentdiff {latentdiff.__version__}\n"


def test_python_m_latentdiff():
    done = subprocess.run([sys.executable, "-m", "latentdiff", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"latentdiff {latentdiff.__version__}\n"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    listed, _, more = capsys.readouterr().out.partition("Commands:\n")[2].partition("\n\n")
    assert [line.split()[0] for line in listed.splitlines()] == COMMANDS and "--traceback" in more


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_is_understood(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    example = " ".join(capsys.readouterr().out.partition("Example: ")[2].partition("\n\n")[0].split())
    words = shlex.split(example)
    assert words[:2] == ["latentdiff", name] and len(words) > 2
    command = get_command(app).commands[name]
    command.make_context(name, words[2:])  # raises for an option or a value that there is not


def test_help_imports_no_torch():
    """Of the command and of each subcommand, in a process of its own."""
    code = f"""
import contextlib, io, sys
from latentdiff.commands.cli import app, main
for command in [[], *([name] for name in {COMMANDS!r})]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([*command, "--help"])
print([name for name in ("torch", "datasets", "numpy", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["paint"], "No such command 'paint'"),
        (["generate"], "Missing argument"),
        (["generate", "folder", "a", "--sampler"], "--sampler"),
        (["generate", "folder", "a", "--colour", "red"], "No such option: --colour"),
        (["generate", "folder", "a", "--num-inference-steps", "many"], "--num-inference-steps"),
        (["generate", "folder", "a", "--dtype", "float8"], "--dtype"),
        (["image-to-image", "folder", "a"], "Missing option '--image'"),
        (["grid", "folder", "a", "--columns", "colour"], "--columns"),
        (["evaluate", "folder", "--batch-size", "0"], "--batch-size"),
        (["evaluate-vae", "folder", "--metrics", "lpips", "psnr"], "--metrics"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert output.err.startswith("error: ") and message in output.err and output.err.count("\n") == 1
