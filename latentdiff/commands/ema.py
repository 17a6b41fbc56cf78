"""`latentdiff ema`."""

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.commands.common import Command, DeviceOption, NoProgress


class EMACommand(Command):
    """`--sweep` alone compares the default lengths."""

    def values_of_bare(self, option: str) -> list[str]:
        if option != "--sweep":
            return []
        from latentdiff.training.ema_sweep import DEFAULT_LENGTHS

        return [str(length) for length in DEFAULT_LENGTHS]


def ema(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run that was trained with ema.snapshot_every.")
    ],
    length: Annotated[
        float | None, typer.Option(help="Fraction of the training, such as 0.1: write the model of that length.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Snapshot to average up to (default: the newest).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model to write (default: RUN/ema-LENGTH).")] = None,
    sweep: Annotated[
        list[float] | None,
        typer.Option(
            metavar="[LENGTH...]",
            help="Measure the loss on held-out images of several lengths; without lengths, of a range of them.",
        ),
    ] = None,
    device: DeviceOption = None,
    no_progress: NoProgress = False,
) -> None:
    """Average a run's weights over a length chosen after training: measure several lengths, write a model, or both."""
    if length is None and not sweep:
        raise ValueError("give --length to write a model, --sweep to compare lengths, or both")
    if length is None and out is not None:
        raise ValueError("--out is the folder of the model to write, so it takes --length")
    from latentdiff.training import ema_sweep

    if sweep:
        result = ema_sweep.sweep(run, sweep, step, device, not no_progress)
        print(f"{result.table()}\n{run / ema_sweep.SWEEP_FILE}: at step {result.step}")
    if length is not None:
        folder, card = ema_sweep.write_average(run, length, step, out, device, not no_progress)
        print(f"{card}\n{folder}")
