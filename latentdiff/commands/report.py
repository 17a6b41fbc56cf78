"""`latentdiff report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of either stage.")],
) -> None:
    """Write charts of a run's losses, validation, speed and samples into RUN/report, and the page RUN/index.html."""
    from latentdiff.training.report import write_report
    from latentdiff.training.run_page import PAGE_FILE, write_page

    for path in write_report(run):
        print(path)
    said = write_page(run)
    print(run / PAGE_FILE)
    print(said.text)
