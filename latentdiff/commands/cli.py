"""The `latentdiff` command: one subcommand per module of this folder; each imports torch only when it runs."""

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import latentdiff
from latentdiff.commands.common import Command
from latentdiff.commands.configs import configs
from latentdiff.commands.ema import EMACommand, ema
from latentdiff.commands.evaluate import evaluate
from latentdiff.commands.evaluate_classes import evaluate_classes
from latentdiff.commands.evaluate_vae import evaluate_vae
from latentdiff.commands.export import export
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


# Each with the arguments of an example, for its help.
COMMANDS: dict[Callable[..., None], str] = {
    train: "path/to/images --minutes 30 --name mine",
    new: "path/to/images --minutes 30 --name mine",
    plan: "configs/demo",
    configs: "demo --write configs/mine",
    generate: 'saved/demo "a blue apple" --seed 3 --out apple.png',
    image_to_image: 'saved/demo "fluent flat style, blue apple" --image apple.png --strength 0.6',
    inpaint: 'saved/demo "a green hat" --image cat.png --mask mask.png',
    interpolate: 'saved/demo "a blue apple" "a pink rocket" --frames 24 --animation walk.mp4',
    variations: 'saved/demo "a rocket" --seed 3 --amount 0.2 --num-images-per-prompt 8',
    grid: 'saved/demo "a blue apple" "a green house" --columns guidance-scale --values 1 2 4 8',
    forward_process: "saved/demo --image apple.png",
    info: "saved/demo",
    inspect: "path/to/images --html report.html",
    evaluate: "saved/demo --prompts 64",
    evaluate_vae: "saved/demo-vae",
    evaluate_classes: "saved/fashion-28-small --classifier saved/classifier.safetensors",
    report: "saved/demo",
    serve: "saved --port 8000",
    ema: "saved/demo --sweep",
    export: "saved/demo --format single-file --dtype fp16 --verify",
    push: "saved/demo me/demo --dry-run",
}
for _command, _example in COMMANDS.items():
    _name = _command.__name__.replace("_", "-")
    _kind = EMACommand if _command is ema else Command
    app.command(cls=_kind, epilog=f"Example: latentdiff {_name} {_example}")(_command)


@app.command("train-vae", context_settings=AS_GIVEN, help=DESCRIPTIONS["vae"])
def _train_vae(context: typer.Context) -> None:
    train_stage("vae", context.args)


@app.command("train-unet", context_settings=AS_GIVEN, help=DESCRIPTIONS["unet"])
def _train_unet(context: typer.Context) -> None:
    train_stage("unet", context.args)


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
