"""`latentdiff evaluate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
HELD_OUT_PAIRS = 300
GRID_CELLS = 24
GRID_COLUMNS = 4
GRID_SIDE = 96  # pixels; smaller images are enlarged to it
BESIDE_TRUTHS = "for held-out prompts the generated image, the true image and the nearest training image"


@dataclass(frozen=True)
class TextToImage:
    """A part of the evaluation: its numbers, as text, and its image with a description."""

    figures: dict[str, Any]
    text: str
    grid: "Image"
    shown: str
    curve: dict[str, str]  # what a table over checkpoints says of it, by heading


def evaluate(
    run: Run,
    prompts: Annotated[
        int | None,
        typer.Option(
            help=f"Captions to generate (default: up to {CAPTIONS}; {COMPOSITIONS_OF_A_KIND} of each kind of "
            f"composition; up to {HELD_OUT_PAIRS} pairs of style and object)."
        ),
    ] = None,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints",
            help="Measure the averaged weights of each checkpoint instead, also of a run that still trains.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the first image, the next ones count up.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated and measured at once.")] = 16,
    dtype: Annotated[
        Literal["fastest", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Type of the UNet's and the text encoder's weights; fastest: bfloat16 if it is faster, else float32."
        ),
    ] = "float32",
    device: DeviceOption = None,
    log: LogOption = None,
    no_progress: NoProgress = False,
) -> None:
    """Measure a trained pipeline on its own data: reconstruction and text-to-image.

    The prompts are captions of training images. With data.source embedded:compositions most are of combinations that
    were never trained, and their true images are known; so they are for a validation split that holds out pairs of the
    columns style and label.
    Writes evaluation.json and evaluation.png into the run's folder; with --checkpoints evaluation_curve.json, and the
    images into evaluation/.
    """
    from latentdiff.config import UNetTrainingConfig, load_config
    from latentdiff.data.captioned_images import open_run_images
    from latentdiff.formats.files import write_json, write_png
    from latentdiff.training.model_card import refresh_card

    if checkpoints:
        _evaluate_checkpoints(run, prompts, seed, batch_size, device, dtype, log, not no_progress)
        return
    pipeline = _with_weights_in(open_pipeline(str(run), device), dtype)
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    show = not no_progress
    training, held_out = open_run_images(config, pipeline.vae.config, progress=show)
    figures = _reconstruction_figures(pipeline, {"training": training, "held_out": held_out}, batch_size)
    settings = _settings(pipeline)
    result = _measure(config.data, training, held_out, prompts, seed, batch_size, show)(pipeline)
    write_json(figures | settings | result.figures, run / "evaluation.json")
    write_png(result.grid, run / "evaluation.png")
    card = refresh_card(run)
    report = f"{_reconstruction_table(figures)}{result.text}; {_in_words(settings)}."
    print(f"{report}\n\n{run / 'evaluation.png'}: {result.shown}")
    if card is not None:
        print(card)
    if log is not None:
        append_to_log(log, ["latentdiff", "evaluate", str(run)], report)


def _with_weights_in(pipeline: "LatentDiffusionPipeline", dtype: str) -> "LatentDiffusionPipeline":
    """With the networks of the sampling loop in this type. The autoencoder stays in float32, and so do its figures."""
    import torch

    from latentdiff.devices import computes_in_bf16

    if dtype == "fastest":
        dtype = "bfloat16" if computes_in_bf16(pipeline.device) else "float32"
    pipeline.unet.to(getattr(torch, dtype))
    pipeline.text_encoder.to(getattr(torch, dtype))
    return pipeline


def _settings(pipeline: "LatentDiffusionPipeline") -> dict[str, Any]:
    """What the images are generated with."""
    return {
        "guidance_scale": pipeline.defaults.guidance_scale,
        "num_inference_steps": pipeline.defaults.num_inference_steps,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
    }


def _in_words(settings: dict[str, Any]) -> str:
    steps, scale = settings["num_inference_steps"], settings["guidance_scale"]
    return f"{steps} steps, guidance {scale}, {settings['dtype']}"


def _measure(
    data: "DataConfig",
    training: "CaptionedImages",
    held_out: "CaptionedImages",
    prompts: int | None,
    seed: int,
    batch_size: int,
    progress: bool,
) -> "Callable[[LatentDiffusionPipeline], TextToImage]":
    """The measurement that suits the data."""
    from latentdiff.config import COMPOSITIONS
    from latentdiff.evaluation.styles import held_out_pairs

    if data.source == COMPOSITIONS:
        count = COMPOSITIONS_OF_A_KIND if prompts is None else prompts
        return lambda pipeline: _compositions(pipeline, data, count, seed, batch_size, progress)
    if data.has_validation_set and held_out_pairs(training, held_out):
        count = HELD_OUT_PAIRS if prompts is None else prompts
        return lambda pipeline: _styles(pipeline, training, held_out, count, seed, batch_size, progress)
    most = min(CAPTIONS, len(training)) if training.captioned else CAPTIONS
    count = most if prompts is None else prompts
    return lambda pipeline: _captions(pipeline, training, count, seed, batch_size, progress)


def _evaluate_checkpoints(
    run: Path,
    prompts: int | None,
    seed: int,
    batch_size: int,
    device: str | None,
    dtype: str,
    log: Path | None,
    progress: bool,
) -> None:
    """Text-to-image with the averaged weights of each checkpoint of a run, against the number of samples seen."""
    from latentdiff.config import UNetTrainingConfig, load_config
    from latentdiff.data.captioned_images import open_run_images
    from latentdiff.devices import choose_device
    from latentdiff.evaluation.scores import markdown_table
    from latentdiff.formats.files import write_json, write_png
    from latentdiff.training.checkpoint import list_checkpoints, step_of
    from latentdiff.training.unet_model import checkpoint_pipeline, open_latent_space

    config = load_config(UNetTrainingConfig, run / "config.yaml")
    folders = list_checkpoints(run)
    if not folders:
        raise ValueError(f"{run} has no checkpoints")
    (config, vae), place = open_latent_space(config), choose_device(device)
    training, held_out = open_run_images(config, vae.config, progress=progress)
    measure = _measure(config.data, training, held_out, prompts, seed, batch_size, progress)
    rows: list[tuple[str, dict[str, str]]] = []
    figures: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for folder in folders:
        if not folder.is_dir():  # a run that still trains has pruned it since
            continue
        pipeline = _with_weights_in(checkpoint_pipeline(config, folder, vae).to(place), dtype)
        result = measure(pipeline)
        step = step_of(folder)
        samples = step * config.train.batch_size
        rows.append((f"{samples:,}", {"step": f"{step:,}", **result.curve}))
        figures.append({"step": step, "samples_seen": samples, **result.figures})
        settings = _settings(pipeline)
        # After each one: the next may take long.
        write_json({**settings, "checkpoints": figures}, run / "evaluation_curve.json")
        write_png(result.grid, run / "evaluation" / f"{folder.name}.png")
    if not figures:
        raise ValueError(f"{run} has no checkpoints left: they were removed after this command began")
    report = f"{markdown_table(rows, 'samples seen')}\n\nAveraged weights; {_in_words(settings)}."
    print(f"{report}\n\n{run / 'evaluation'}: the images of each checkpoint")
    if log is not None:
        append_to_log(log, ["latentdiff", "evaluate", str(run), "--checkpoints"], report)


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
    if not training.captioned:
        psnr = round(fidelity.psnr, 2)
        text = (
            f"{prompts} generated images, without captions; their mean PSNR against the nearest of the training images "
            f"({len(training)}) is {psnr:.1f} dB"
        )
        shown = "nearest training image beside the generated one"
        curve = {"PSNR to the nearest training image (dB)": f"{psnr:.1f}"}
        return TextToImage({"prompts": prompts, "nearest_psnr": psnr}, text, grid, shown, curve)
    hits = fidelity.hits
    text = (
        f"Of {prompts} generated images the nearest of the {len(training)} training images (pixel MSE) has the prompt "
        f"as its caption for {hits} ({hits / prompts:.0%})"
    )
    figures = {"prompts": prompts, "nearest_is_prompted": hits}
    curve = {"nearest training image is the prompted one": f"{hits} / {prompts}"}
    return TextToImage(figures, text, grid, "training image beside the generated one", curve)


def _compositions(
    pipeline: "LatentDiffusionPipeline", data: "DataConfig", prompts: int, seed: int, batch_size: int, progress: bool
) -> TextToImage:
    """How generated images compare with the true images of held-out and of trained compositions."""
    from latentdiff.data.compositions import CompositionSet, render
    from latentdiff.evaluation.compositions import evaluate_compositions, nearest_training_images

    report = evaluate_compositions(pipeline, data, prompts, seed, batch_size, progress)
    chosen = report.first(GRID_CELLS)
    nearest = nearest_training_images(CompositionSet.of(data), [image for _, image in chosen])
    cells = [
        (image, render(composition, data.shape[0]), copy)
        for (composition, image), copy in zip(chosen, nearest, strict=True)
    ]
    grid = _grid_of_truths(cells, [composition.prompt for composition, _ in chosen])
    text = f"{report.table()}\n\nPrompts of each kind: at most {prompts}"
    figures = {"prompts": prompts, "compositions": report.to_json()}
    return TextToImage(figures, text, grid, BESIDE_TRUTHS, report.rows[0].score.cells())


def _styles(
    pipeline: "LatentDiffusionPipeline",
    training: "CaptionedImages",
    held_out: "CaptionedImages",
    prompts: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> TextToImage:
    """How generated images compare with the true images of held-out and of trained pairs of style and object."""
    from latentdiff.evaluation.styles import evaluate_styles

    report = evaluate_styles(pipeline, training, held_out, prompts, seed, batch_size, progress)
    examples = report.some(GRID_CELLS)
    cells = [(example.generated, example.truth, example.nearest) for example in examples]
    grid = _grid_of_truths(cells, [example.prompt for example in examples])
    text = f"{report.table()}\n\nNearest of {len(training) + len(held_out)} true images"
    figures = {"prompts": len(report.examples), "styles": report.to_json()}
    return TextToImage(figures, text, grid, BESIDE_TRUTHS, report.curve())


def _grid_of_truths(cells: "Sequence[Sequence[Image]]", prompts: Sequence[str]) -> "Image":
    """Small images enlarged, with the prompt under each cell."""
    from latentdiff.figures.grids import captioned_grid, magnified

    return captioned_grid([[magnified(image, GRID_SIDE) for image in cell] for cell in cells], prompts, GRID_COLUMNS)
