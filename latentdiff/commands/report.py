"""`latentdiff report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that train_vae.py or train_unet.py wrote.")],
) -> None:
    """Write charts of a run's losses, validation, speed and samples into RUN/report."""
    from latentdiff.training.report import write_report

    for path in write_report(run):
        print(path)
