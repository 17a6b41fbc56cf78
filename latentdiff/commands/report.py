"""`latentdiff report`."""

import argparse
from pathlib import Path


def add_report(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff report`."""
    parser.add_argument("run", type=Path, help="folder that train_vae.py or train_unet.py wrote")
    parser.set_defaults(run_command=report)


def report(arguments: argparse.Namespace) -> None:
    """Write charts of losses, validation, speed and sample images into the run's folder."""
    from latentdiff.training.report import write_report

    for path in write_report(arguments.run):
        print(path)
