"""`latentdiff evaluate`."""

import argparse
import shlex
from pathlib import Path

from latentdiff.commands.common import _positive, append_to_log, open_pipeline


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff evaluate`."""
    parser.add_argument("run", type=Path, help="folder that train_unet.py wrote")
    parser.add_argument("--prompts", type=int, default=32, help="captions of training images to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the first image, the next ones count up")
    parser.add_argument("--batch-size", type=_positive, default=16, help="images drawn and measured at once")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--log", type=Path, help="also append the figures to this Markdown file, such as docs/LOG.md")
    parser.add_argument("--no-progress", action="store_true")
    parser.set_defaults(run_command=evaluate)


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure reconstruction and text-to-image on the run's own data; write evaluation.json and evaluation.png."""
    from latentdiff.config import UNetTrainingConfig, load_config
    from latentdiff.data.captioned_images import open_images
    from latentdiff.evaluation.prompts import prompt_fidelity
    from latentdiff.evaluation.reconstruction import reconstruction_quality
    from latentdiff.figures.grids import image_grid
    from latentdiff.formats.files import write_json, write_png
    from latentdiff.models.autoencoder import AutoencoderKL

    run: Path = arguments.run
    pipeline = open_pipeline(str(run), arguments.device)
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    show = not arguments.no_progress
    images, held_out = open_images(config.data, pipeline.vae.config.in_channels, config.train.seed, progress=show)
    figures: dict[str, float] = {"training_images": len(images), "held_out_images": len(held_out)}
    compressed = isinstance(pipeline.vae, AutoencoderKL)  # else there is nothing to reconstruct
    for name, split in [("training", images), ("held_out", held_out)]:
        if compressed and len(split):
            quality = reconstruction_quality(pipeline.vae, split, arguments.batch_size)
            figures[f"{name}_psnr"] = round(quality.psnr, 2)
            figures[f"{name}_ssim"] = round(quality.ssim, 4)
            figures[f"{name}_colour_error"] = round(quality.colour_error, 2)
    fidelity = prompt_fidelity(pipeline, images, arguments.prompts, arguments.seed, arguments.batch_size, show)
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
    write_png(image_grid(pairs, columns=16), run / "evaluation.png")
    report = _report(figures)
    pair = "training image" if config.data.caption_column is not None else "nearest training image"
    print(f"{report}\n\n{run / 'evaluation.png'}: {pair} beside the generated one")
    if arguments.log is not None:
        append_to_log(arguments.log, f"latentdiff evaluate {shlex.quote(str(run))}", report)


def _report(figures: dict[str, float]) -> str:
    rows = []
    for name, label in [("training", "training split"), ("held_out", "held-out split")]:
        if f"{name}_psnr" in figures:
            count, psnr, ssim, colour = (figures[f"{name}_{key}"] for key in ("images", "psnr", "ssim", "colour_error"))
            rows.append((label, str(count), f"{psnr:.2f}", f"{ssim:.3f}", f"{colour:.2f}"))
    if rows:
        heading = ("reconstruction", "images", "PSNR (dB)", "SSIM", "colour error (of 255)")
        rows = [heading, ("---",) * 5, *rows]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows) + ("\n" if rows else "")
    steps = f"{figures['num_inference_steps']} steps, guidance {figures['guidance_scale']}."
    if "nearest_is_prompted" not in figures:
        return (
            f"{table}{figures['prompts']} generated images, without captions; their mean PSNR against the nearest of "
            f"the training images ({figures['training_images']}) is {figures['nearest_psnr']:.1f} dB; {steps}"
        )
    return (
        f"{table}Of {figures['prompts']} generated images the nearest of the {figures['training_images']} training "
        f"images (pixel MSE) has the prompt as its caption for {figures['nearest_is_prompted']} "
        f"({figures['nearest_is_prompted'] / figures['prompts']:.0%}); {steps}"
    )
