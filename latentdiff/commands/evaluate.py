"""`latentdiff evaluate`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.commands.common import DeviceOption, LogOption, NoProgress, Run, append_to_log, open_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentdiff.config import DataConfig
    from latentdiff.data.captioned_images import CaptionedImages
    from latentdiff.pipeline import LatentDiffusionPipeline

RECONSTRUCTED = 256  # images of each split, at most
CAPTIONS = 32
COMPOSITIONS_OF_A_KIND = 128
GRID_CELLS = 24
GRID_COLUMNS = 4
GRID_SIDE = 96  # pixels; smaller images are enlarged to it


@dataclass(frozen=True)
class TextToImage:
    """A part of the evaluation: its numbers, as text, and its image with a description."""

    figures: dict[str, Any]
    text: str
    grid: "Image"
    shown: str


def evaluate(
    run: Run,
    prompts: Annotated[
        int | None,
        typer.Option(
            help=f"Captions to generate (default: {CAPTIONS}, or {COMPOSITIONS_OF_A_KIND} of each kind of composition)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image, the next ones count up.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated and measured at once.")] = 16,
    device: DeviceOption = None,
    log: LogOption = None,
    no_progress: NoProgress = False,
) -> None:
    """Measure a trained pipeline on its own data: reconstruction and text-to-image.

    The prompts are captions of training images. With data.source embedded:compositions most are of combinations that
    were never trained, and their true images are known.
    Writes evaluation.json and evaluation.png into the run's folder.
    """
    from latentdiff.config import COMPOSITIONS, UNetTrainingConfig, load_config
    from latentdiff.data.captioned_images import open_images
    from latentdiff.formats.files import write_json, write_png

    pipeline = open_pipeline(str(run), device)
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    show = not no_progress
    training, held_out = open_images(config.data, pipeline.vae.config.in_channels, config.train.seed, progress=show)
    figures = _reconstruction_figures(pipeline, {"training": training, "held_out": held_out}, batch_size)
    settings = {
        "guidance_scale": pipeline.defaults.guidance_scale,
        "num_inference_steps": pipeline.defaults.num_inference_steps,
    }
    if config.data.source == COMPOSITIONS:
        count = COMPOSITIONS_OF_A_KIND if prompts is None else prompts
        result = _compositions(pipeline, config.data, count, seed, batch_size, show)
    else:
        result = _captions(pipeline, training, CAPTIONS if prompts is None else prompts, seed, batch_size, show)
    write_json(figures | settings | result.figures, run / "evaluation.json")
    write_png(result.grid, run / "evaluation.png")
    report = (
        f"{_reconstruction_table(figures)}{result.text}; {settings['num_inference_steps']} steps, "
        f"guidance {settings['guidance_scale']}."
    )
    print(f"{report}\n\n{run / 'evaluation.png'}: {result.shown}")
    if log is not None:
        append_to_log(log, ["latentdiff", "evaluate", str(run)], report)


def _reconstruction_figures(
    pipeline: "LatentDiffusionPipeline", splits: "dict[str, CaptionedImages]", batch_size: int
) -> dict[str, Any]:
    """The number of images in each split and how well the autoencoder, if there is one, reconstructs some of them."""
    from latentdiff.evaluation.reconstruction import reconstruction_quality
    from latentdiff.models.autoencoder import AutoencoderKL

    figures: dict[str, Any] = {f"{name}_images": len(images) for name, images in splits.items()}
    vae = pipeline.vae
    for name, images in splits.items():
        if not vae.is_pixel_space and len(images):
            assert isinstance(vae, AutoencoderKL)
            some = images.some(RECONSTRUCTED)
            quality = reconstruction_quality(vae, some, batch_size)
            figures[f"{name}_measured"] = len(some)
            figures[f"{name}_psnr"] = round(quality.psnr, 2)
            figures[f"{name}_ssim"] = round(quality.ssim, 4)
            figures[f"{name}_colour_error"] = round(quality.colour_error, 2)
    return figures


def _reconstruction_table(figures: dict[str, Any]) -> str:
    rows = []
    for name, label in [("training", "training split"), ("held_out", "held-out split")]:
        if f"{name}_psnr" in figures:
            measured, psnr, ssim, colour = (
                figures[f"{name}_{key}"] for key in ("measured", "psnr", "ssim", "colour_error")
            )
            rows.append((label, str(measured), f"{psnr:.2f}", f"{ssim:.3f}", f"{colour:.2f}"))
    if not rows:
        return ""
    heading = ("reconstruction", "images", "PSNR (dB)", "SSIM", "colour error (of 255)")
    return "".join(f"| {' | '.join(row)} |\n" for row in [heading, ("---",) * 5, *rows]) + "\n"


def _captions(
    pipeline: "LatentDiffusionPipeline",
    training: "CaptionedImages",
    prompts: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> TextToImage:
    """How generated images compare with the training images of their captions."""
    from latentdiff.evaluation.prompts import prompt_fidelity
    from latentdiff.figures.grids import image_grid

    fidelity = prompt_fidelity(pipeline, training, prompts, seed, batch_size, progress)
    pairs = [image for pair in zip(fidelity.originals, fidelity.generated, strict=True) for image in pair]
    grid = image_grid(pairs, columns=16)
    if training.config.caption_column is None:
        psnr = round(fidelity.psnr, 2)
        text = (
            f"{prompts} generated images, without captions; their mean PSNR against the nearest of the training images "
            f"({len(training)}) is {psnr:.1f} dB"
        )
        shown = "nearest training image beside the generated one"
        return TextToImage({"prompts": prompts, "nearest_psnr": psnr}, text, grid, shown)
    hits = fidelity.hits
    text = (
        f"Of {prompts} generated images the nearest of the {len(training)} training images (pixel MSE) has the prompt "
        f"as its caption for {hits} ({hits / prompts:.0%})"
    )
    figures = {"prompts": prompts, "nearest_is_prompted": hits}
    return TextToImage(figures, text, grid, "training image beside the generated one")


def _compositions(
    pipeline: "LatentDiffusionPipeline", data: "DataConfig", prompts: int, seed: int, batch_size: int, progress: bool
) -> TextToImage:
    """How generated images compare with the true images of held-out and of trained compositions."""
    from PIL import Image

    from latentdiff.data.compositions import CompositionSet, render
    from latentdiff.evaluation.compositions import evaluate_compositions, nearest_training_images
    from latentdiff.figures.grids import captioned_grid

    report = evaluate_compositions(pipeline, data, prompts, seed, batch_size, progress)
    chosen = report.first(GRID_CELLS)
    nearest = nearest_training_images(CompositionSet.of(data), [image for _, image in chosen])
    side = data.size * max(1, -(-GRID_SIDE // data.size))
    cells = [
        [one.resize((side, side), Image.Resampling.NEAREST) for one in (image, render(composition, data.size), copy)]
        for (composition, image), copy in zip(chosen, nearest, strict=True)
    ]
    grid = captioned_grid(cells, [composition.prompt for composition, _ in chosen], GRID_COLUMNS)
    text = f"{report.table()}\n\nPrompts of each kind: at most {prompts}"
    shown = "for held-out prompts the generated image, the true image and the nearest training image"
    return TextToImage({"prompts": prompts, "compositions": report.to_json()}, text, grid, shown)
