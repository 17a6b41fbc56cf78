"""The `latentdiff` command: one subcommand per module of this folder; each imports torch only when it runs."""

from collections.abc import Sequence
from typing import Annotated

import typer

import latentdiff
from latentdiff.commands.common import Command
from latentdiff.commands.configs import configs
from latentdiff.commands.ema import EMACommand, ema
from latentdiff.commands.evaluate import evaluate
from latentdiff.commands.evaluate_classes import evaluate_classes
from latentdiff.commands.evaluate_vae import evaluate_vae
from latentdiff.commands.forward_process import forward_process
from latentdiff.commands.generate import generate
from latentdiff.commands.grid import grid
from latentdiff.commands.image_to_image import image_to_image
from latentdiff.commands.info import info
from latentdiff.commands.inpaint import inpaint
from latentdiff.commands.inspect import inspect
from latentdiff.commands.interpolate import interpolate
from latentdiff.commands.new import new, train
from latentdiff.commands.plan import plan
from latentdiff.commands.push import push
from latentdiff.commands.report import report
from latentdiff.commands.serve import serve
from latentdiff.commands.train_stages import AS_GIVEN, train_stage
from latentdiff.commands.variations import variations
from latentdiff.training.arguments import DESCRIPTIONS, SETTINGS, TRACEBACK, run_as_command, run_typer

app = typer.Typer(
    help=latentdiff.__doc__, epilog=f"With {TRACEBACK}, any command shows where an error came from.", **SETTINGS
)


@app.command("train-vae", context_settings=AS_GIVEN, help=DESCRIPTIONS["vae"])
def _train_vae(context: typer.Context) -> None:
    train_stage("vae", context.args)


@app.command("train-unet", context_settings=AS_GIVEN, help=DESCRIPTIONS["unet"])
def _train_unet(context: typer.Context) -> None:
    train_stage("unet", context.args)


for _command in (train, new, plan, configs):
    app.command(cls=Command)(_command)
for _command in (generate, image_to_image, inpaint, interpolate, variations, grid, forward_process):
    app.command(cls=Command)(_command)
for _command in (info, inspect, evaluate, evaluate_vae, evaluate_classes, report, serve):
    app.command(cls=Command)(_command)
app.command(cls=EMACommand)(ema)
app.command(cls=Command)(push)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"latentdiff {latentdiff.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; wrong input is one line on stderr and exit status 2 (see `run_as_command`)."""
    run_as_command(lambda given: run_typer(app, given, "latentdiff"), arguments)
