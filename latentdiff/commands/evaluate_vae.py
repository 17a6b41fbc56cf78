"""`latentdiff evaluate-vae`."""

import argparse
import shlex
from pathlib import Path

from latentdiff.commands.common import _positive, append_to_log


def add_evaluate_vae(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff evaluate-vae`."""
    parser.add_argument("run", type=Path, help="folder that train_vae.py wrote, or of a pipeline")
    parser.add_argument("--config", type=Path, help="whose data section says what to measure on (RUN/config.yaml)")
    parser.add_argument("--split", choices=["held-out", "training"], help="(default: held-out if there is one)")
    parser.add_argument("--batch-size", type=_positive, default=16, help="images measured at once")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--metrics", nargs="+", choices=["lpips", "fid", "kid"], default=[], help="by pretrained networks, downloaded"
    )
    parser.add_argument("--min-psnr", type=float, default=22.0, help="dB (default: %(default)s)")
    parser.add_argument("--min-ssim", type=float, default=0.6, help="(default: %(default)s)")
    parser.add_argument("--max-dead-channels", type=float, default=0.25, help="share (default: %(default)s)")
    parser.add_argument(
        "--max-scale-error", type=float, default=0.2, help="of mean and deviation of the latents (default: %(default)s)"
    )
    parser.add_argument(
        "--max-noise-loss", type=float, default=3.0, help="dB, by noise of 0.1 on the latents (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, help="also append the figures to this Markdown file, such as docs/LOG.md")
    parser.add_argument("--no-progress", action="store_true")
    parser.set_defaults(run_command=evaluate_vae)


def evaluate_vae(arguments: argparse.Namespace) -> None:
    """Measure and judge an autoencoder; write vae_report.json, vae_report.png and latent_preview.json beside it."""
    from dataclasses import fields

    from latentdiff.evaluation.autoencoder import Thresholds, evaluate_run

    thresholds = Thresholds(**{key.name: getattr(arguments, key.name) for key in fields(Thresholds)})
    result = evaluate_run(
        arguments.run,
        thresholds,
        config=arguments.config,
        split=arguments.split,
        batch_size=arguments.batch_size,
        device=arguments.device,
        metrics=arguments.metrics,
        progress=not arguments.no_progress,
    )
    print(result.text(), "", *result.files, sep="\n")
    if arguments.log is not None:
        append_to_log(arguments.log, f"latentdiff evaluate-vae {shlex.quote(str(arguments.run))}", result.text())
