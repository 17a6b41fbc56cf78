"""The `latentdiff` command."""

import argparse
from collections.abc import Sequence

import latentdiff
from latentdiff.commands import evaluate_classes
from latentdiff.commands.ema import add_ema
from latentdiff.commands.evaluate import add_evaluate
from latentdiff.commands.evaluate_vae import add_evaluate_vae
from latentdiff.commands.generate import add_commands
from latentdiff.commands.report import add_report
from latentdiff.training.arguments import run_as_command
from tools import build_emoji, build_fashion_mnist


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand; a wrong input is one line and exit status 2 (LATENTDIFF_TRACEBACK=1 shows where)."""
    parser = argparse.ArgumentParser(prog="latentdiff", description=latentdiff.__doc__)
    parser.add_argument("--version", action="version", version=f"latentdiff {latentdiff.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    add_commands(commands)
    add_evaluate(commands.add_parser("evaluate", help="measure a trained pipeline on its own training data"))
    add_evaluate_vae(commands.add_parser("evaluate-vae", help="measure an autoencoder: does it fit for stage 2?"))
    add_report(commands.add_parser("report", help="draw charts of a training run"))
    add_ema(commands.add_parser("ema", help="average a run's weights over a length chosen after the training"))
    classes = commands.add_parser("evaluate-classes", help="measure whether a class-conditional run draws its classes")
    evaluate_classes.add_arguments(classes)
    classes.set_defaults(run_command=evaluate_classes.run)
    build = commands.add_parser("build-emoji", help="draw a larger set of captioned emoji images")
    build_emoji.add_arguments(build)
    build.set_defaults(run_command=build_emoji.run)
    build = commands.add_parser("build-fashion-mnist", help="make Fashion-MNIST from its idx files, without the hub")
    build_fashion_mnist.add_arguments(build)
    build.set_defaults(run_command=build_fashion_mnist.run)

    parsed = parser.parse_args(arguments)
    run_as_command(lambda: parsed.run_command(parsed))
