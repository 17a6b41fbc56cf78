"""`latentdiff evaluate`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.commands.common import DeviceOption, LogOption, NoProgress, Run, append_to_log, open_pipeline

if TYPE_CHECKING:
    from latentdiff.data.captioned_images import CaptionedImages
    from latentdiff.evaluation.prompts import PromptFidelity
    from latentdiff.pipeline import LatentDiffusionPipeline


def evaluate(
    run: Run,
    prompts: Annotated[int, typer.Option(help="Captions of training images to generate.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the first image, the next ones count up.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated and measured at once.")] = 16,
    device: DeviceOption = None,
    log: LogOption = None,
    no_progress: NoProgress = False,
) -> None:
    """Measure a trained pipeline on its own training data: reconstruction and text-to-image.

    Writes evaluation.json and evaluation.png into the run's folder.
    """
    from latentdiff.config import UNetTrainingConfig, load_config
    from latentdiff.data.captioned_images import open_images
    from latentdiff.evaluation.prompts import prompt_fidelity
    from latentdiff.figures.grids import image_grid
    from latentdiff.formats.files import write_json, write_png

    pipeline = open_pipeline(str(run), device)
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    show = not no_progress
    training, held_out = open_images(config.data, pipeline.vae.config.in_channels, config.train.seed, progress=show)
    figures = _reconstruction_figures(pipeline, {"training": training, "held_out": held_out}, batch_size)
    fidelity = prompt_fidelity(pipeline, training, prompts, seed, batch_size, show)
    has_captions = config.data.caption_column is not None
    figures |= _prompt_figures(pipeline, fidelity, has_captions)
    write_json(figures, run / "evaluation.json")
    pairs = [image for pair in zip(fidelity.originals, fidelity.generated, strict=True) for image in pair]
    write_png(image_grid(pairs, columns=16), run / "evaluation.png")
    report = _report(figures)
    left = "training image" if has_captions else "nearest training image"
    print(f"{report}\n\n{run / 'evaluation.png'}: {left} beside the generated one")
    if log is not None:
        append_to_log(log, ["latentdiff", "evaluate", str(run)], report)


def _reconstruction_figures(
    pipeline: "LatentDiffusionPipeline", splits: "dict[str, CaptionedImages]", batch_size: int
) -> dict[str, Any]:
    """The number of images in each split and how well the autoencoder, if there is one, reconstructs them."""
    from latentdiff.evaluation.reconstruction import reconstruction_quality
    from latentdiff.models.autoencoder import AutoencoderKL

    figures: dict[str, Any] = {f"{name}_images": len(images) for name, images in splits.items()}
    vae = pipeline.vae
    for name, images in splits.items():
        if not vae.is_pixel_space and len(images):
            assert isinstance(vae, AutoencoderKL)
            quality = reconstruction_quality(vae, images, batch_size)
            figures[f"{name}_psnr"] = round(quality.psnr, 2)
            figures[f"{name}_ssim"] = round(quality.ssim, 4)
            figures[f"{name}_colour_error"] = round(quality.colour_error, 2)
    return figures


def _prompt_figures(
    pipeline: "LatentDiffusionPipeline", fidelity: "PromptFidelity", has_captions: bool
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "prompts": len(fidelity.prompts),
        "guidance_scale": pipeline.defaults.guidance_scale,
        "num_inference_steps": pipeline.defaults.num_inference_steps,
    }
    if has_captions:
        return figures | {"nearest_is_prompted": fidelity.hits}
    return figures | {"nearest_psnr": round(fidelity.psnr, 2)}


def _report(figures: dict[str, Any]) -> str:
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
