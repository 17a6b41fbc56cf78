"""The `latentdiff` command."""

import argparse
import os
import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import latentdiff
from latentdiff import class_fidelity_command, drawing_commands, emoji, fashion_mnist
from latentdiff.machine import processor_name
from latentdiff.training.arguments import run_as_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand; a wrong input is one line and exit status 2 (LATENTDIFF_TRACEBACK=1 shows where)."""
    parser = argparse.ArgumentParser(prog="latentdiff", description=latentdiff.__doc__)
    parser.add_argument("--version", action="version", version=f"latentdiff {latentdiff.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    drawing_commands.add_commands(commands)
    add_evaluate(commands.add_parser("evaluate", help="measure a trained pipeline on its own training data"))
    add_evaluate_vae(commands.add_parser("evaluate-vae", help="measure an autoencoder: does it fit for stage 2?"))
    add_report(commands.add_parser("report", help="draw charts of a training run"))
    add_ema(commands.add_parser("ema", help="average a run's weights over a length chosen after the training"))
    classes = commands.add_parser("evaluate-classes", help="measure whether a class-conditional run draws its classes")
    class_fidelity_command.add_arguments(classes)
    classes.set_defaults(run_command=class_fidelity_command.run)
    build = commands.add_parser("build-emoji", help="draw a larger set of captioned emoji pictures")
    emoji.add_arguments(build)
    build.set_defaults(run_command=emoji.run)
    build = commands.add_parser("build-fashion-mnist", help="make Fashion-MNIST from its idx files, without the hub")
    fashion_mnist.add_arguments(build)
    build.set_defaults(run_command=fashion_mnist.run)

    parsed = parser.parse_args(arguments)
    run_as_command(lambda: parsed.run_command(parsed))


# ----------------------------------------------------------------------------------------------------------------------
# evaluate


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff evaluate`."""
    parser.add_argument("run", type=Path, help="folder that train_unet.py wrote")
    parser.add_argument("--prompts", type=int, default=32, help="captions of training pictures to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture, the next ones count up")
    parser.add_argument("--batch-size", type=_positive, default=16, help="pictures drawn and measured at once")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--log", type=Path, help="also append the figures to this Markdown file, such as docs/LOG.md")
    parser.add_argument("--no-progress", action="store_true")
    parser.set_defaults(run_command=evaluate)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure reconstruction and text-to-image on the run's own data; write evaluation.json and evaluation.png."""
    from latentdiff.config import UNetTrainingConfig, load_config
    from latentdiff.data import open_pictures
    from latentdiff.evaluate import prompt_fidelity, reconstruction_quality
    from latentdiff.formats.diffusers_folder import write_json, write_png
    from latentdiff.models.autoencoder import AutoencoderKL
    from latentdiff.training.logging import picture_grid

    run: Path = arguments.run
    pipeline = drawing_commands.open_pipeline(str(run), arguments.device)
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    show = not arguments.no_progress
    pictures, held_out = open_pictures(config.data, pipeline.vae.config.in_channels, config.train.seed, progress=show)
    figures: dict[str, float] = {"training_pictures": len(pictures), "held_out_pictures": len(held_out)}
    compressed = isinstance(pipeline.vae, AutoencoderKL)  # else there is nothing to reconstruct
    for name, split in [("training", pictures), ("held_out", held_out)]:
        if compressed and len(split):
            quality = reconstruction_quality(pipeline.vae, split, arguments.batch_size)
            figures[f"{name}_psnr"] = round(quality.psnr, 2)
            figures[f"{name}_ssim"] = round(quality.ssim, 4)
            figures[f"{name}_colour_error"] = round(quality.colour_error, 2)
    fidelity = prompt_fidelity(pipeline, pictures, arguments.prompts, arguments.seed, arguments.batch_size, show)
    figures |= {
        "prompts": len(fidelity.prompts),
        "guidance_scale": pipeline.defaults.guidance_scale,
        "num_inference_steps": pipeline.defaults.num_inference_steps,
    }
    if config.data.caption_column is not None:
        figures["nearest_is_prompted"] = fidelity.hits
    else:
        figures["nearest_psnr"] = round(fidelity.psnr, 2)
    write_json(figures, run / "evaluation.json")
    pairs = [image for pair in zip(fidelity.originals, fidelity.generated, strict=True) for image in pair]
    write_png(picture_grid(pairs, columns=16), run / "evaluation.png")
    report = _report(figures)
    pair = "training picture" if config.data.caption_column is not None else "nearest training picture"
    print(f"{report}\n\n{run / 'evaluation.png'}: {pair} beside the generated one")
    if arguments.log is not None:
        append_to_log(arguments.log, f"latentdiff evaluate {shlex.quote(str(run))}", report)


def _report(figures: dict[str, float]) -> str:
    rows = []
    for name, label in [("training", "training split"), ("held_out", "held-out split")]:
        if f"{name}_psnr" in figures:
            count, psnr, ssim, colour = (
                figures[f"{name}_{key}"] for key in ("pictures", "psnr", "ssim", "colour_error")
            )
            rows.append((label, str(count), f"{psnr:.2f}", f"{ssim:.3f}", f"{colour:.2f}"))
    if rows:
        heading = ("reconstruction", "pictures", "PSNR (dB)", "SSIM", "colour error (of 255)")
        rows = [heading, ("---",) * 5, *rows]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows) + ("\n" if rows else "")
    steps = f"{figures['num_inference_steps']} steps, guidance {figures['guidance_scale']}."
    if "nearest_is_prompted" not in figures:
        return (
            f"{table}{figures['prompts']} generated pictures, without captions; their mean PSNR against the nearest of "
            f"the training pictures ({figures['training_pictures']}) is {figures['nearest_psnr']:.1f} dB; {steps}"
        )
    return (
        f"{table}Of {figures['prompts']} generated pictures the nearest of the {figures['training_pictures']} training "
        f"pictures (pixel MSE) has the prompt as its caption for {figures['nearest_is_prompted']} "
        f"({figures['nearest_is_prompted'] / figures['prompts']:.0%}); {steps}"
    )


def append_to_log(path: Path, command: str, report: str) -> None:
    """Append what a command measured, where and when, to a Markdown file."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores} cores, {processor_name()}"
    entry = f"\n## {date.today()}: {command}\n\n{device}; torch {torch.__version__}.\n\n{report}\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(entry)


# ----------------------------------------------------------------------------------------------------------------------
# evaluate-vae


def add_evaluate_vae(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff evaluate-vae`."""
    parser.add_argument("run", type=Path, help="folder that train_vae.py wrote, or of a pipeline")
    parser.add_argument("--config", type=Path, help="whose data section says what to measure on (RUN/config.yaml)")
    parser.add_argument("--split", choices=["held-out", "training"], help="(default: held-out if there is one)")
    parser.add_argument("--batch-size", type=_positive, default=16, help="pictures measured at once")
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

    from latentdiff.evaluate_vae import Thresholds, evaluate_run

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


# ----------------------------------------------------------------------------------------------------------------------
# report


def add_report(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff report`."""
    parser.add_argument("run", type=Path, help="folder that train_vae.py or train_unet.py wrote")
    parser.set_defaults(run_command=report)


def report(arguments: argparse.Namespace) -> None:
    """Write charts of losses, validation, speed and sample pictures into the run's folder."""
    from latentdiff.report import write_report

    for path in write_report(arguments.run):
        print(path)


# ----------------------------------------------------------------------------------------------------------------------
# ema


def add_ema(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff ema`."""
    parser.add_argument("run", type=Path, help="folder of a run that was trained with ema.snapshot_every")
    parser.add_argument("--length", type=float, help="share of the training, such as 0.1: write a model")
    parser.add_argument("--step", type=int, help="of a snapshot to average up to (default: the newest)")
    parser.add_argument("--out", type=Path, help="folder of the model to write (default: RUN/ema-LENGTH)")
    parser.add_argument(
        "--sweep", type=float, nargs="*", metavar="LENGTH", help="loss on held-out pictures of several lengths"
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
    from latentdiff.ema_command import DEFAULT_LENGTHS, SWEEP_FILE, sweep, write_average

    run, step, show = arguments.run, arguments.step, not arguments.no_progress
    if arguments.sweep is not None:
        result = sweep(run, arguments.sweep or DEFAULT_LENGTHS, step, arguments.device, show)
        print(f"{result.table()}\n{run / SWEEP_FILE}: at step {result.step}")
    if arguments.length is not None:
        print(write_average(run, arguments.length, step, arguments.out, arguments.device, show))
