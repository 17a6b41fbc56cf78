"""`latentdiff ema`."""

import argparse
from pathlib import Path


def add_ema(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff ema`."""
    parser.add_argument("run", type=Path, help="folder of a run that was trained with ema.snapshot_every")
    parser.add_argument("--length", type=float, help="share of the training, such as 0.1: write a model")
    parser.add_argument("--step", type=int, help="of a snapshot to average up to (default: the newest)")
    parser.add_argument("--out", type=Path, help="folder of the model to write (default: RUN/ema-LENGTH)")
    parser.add_argument(
        "--sweep", type=float, nargs="*", metavar="LENGTH", help="loss on held-out images of several lengths"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--no-progress", action="store_true")
    parser.set_defaults(run_command=ema)


def ema(arguments: argparse.Namespace) -> None:
    """Measure averages of several lengths, write the model of one, or both."""
    if arguments.length is None and arguments.sweep is None:
        raise ValueError("give --length to write a model, --sweep to compare lengths, or both")
    if arguments.length is None and arguments.out is not None:
        raise ValueError("--out is where a model is written, which takes --length")
    from latentdiff.training.ema_sweep import DEFAULT_LENGTHS, SWEEP_FILE, sweep, write_average

    run, step, show = arguments.run, arguments.step, not arguments.no_progress
    if arguments.sweep is not None:
        result = sweep(run, arguments.sweep or DEFAULT_LENGTHS, step, arguments.device, show)
        print(f"{result.table()}\n{run / SWEEP_FILE}: at step {result.step}")
    if arguments.length is not None:
        print(write_average(run, arguments.length, step, arguments.out, arguments.device, show))
