"""`latentdiff evaluate-classes`: whether a run generates the classes it was trained on, by a small classifier."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.commands.common import (
    DeviceOption,
    LogOption,
    NoProgress,
    Run,
    append_to_log,
    check_writable,
    open_pipeline,
    with_option_groups,
)

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.data.captioned_images import CaptionedImages
    from latentdiff.evaluation.classes import KID, ClassFidelity, Classifier
    from latentdiff.pipeline import LatentDiffusionPipeline


GRID_COLUMNS = 10
MIN_IMAGE_SIZE = 64  # pixels
NUM_LOWEST = 3  # classes that the report names


@dataclass(frozen=True)
class ClassSampling:
    """How the images of the classes are sampled; None: the folder's own."""

    guidance_scale: Annotated[float | None, typer.Option(help="Default: the folder's own.")] = None
    num_inference_steps: Annotated[int | None, typer.Option(help="Sampling steps (default: the folder's own).")] = None
    sampler: Annotated[
        str | None, typer.Option(help="ddim, euler, ...: see docs/sampling.md (default: the folder's own).")
    ] = None

    def options(self) -> dict[str, Any]:
        """The pipeline's keyword arguments that were given."""
        options = {
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
            "sampler": self.sampler,
        }
        return {name: value for name, value in options.items() if value is not None}


@with_option_groups
def evaluate_classes(
    run: Run,
    sampling: ClassSampling,
    per_class: Annotated[int, typer.Option(min=1, help="Images to generate of each class.")] = 100,
    held_out_limit: Annotated[int, typer.Option(min=2, help="Most held-out images to compare with.")] = 5000,
    seed: Annotated[int, typer.Option(help="Seed of the first image, the next ones count up.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated at once.")] = 100,
    classifier: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Safetensors file to read the classifier from, or to write.")
    ] = None,
    classifier_steps: Annotated[
        int, typer.Option(min=1, help="Training steps of the classifier, of 128 images.")
    ] = 1000,
    device: DeviceOption = None,
    log: LogOption = None,
    no_progress: NoProgress = False,
) -> None:
    """Measure whether a run whose captions are class names generates its classes.

    Writes class_fidelity.json and class_fidelity.png into the run's folder.
    """
    for option, path in [("--classifier", classifier), ("--log", log)]:
        if path is not None:
            check_writable(option, path)
    from latentdiff.config import UNetTrainingConfig, load_config
    from latentdiff.data.captioned_images import open_run_images
    from latentdiff.evaluation.classes import class_fidelity, classes_of, of_classes
    from latentdiff.formats.files import write_json, write_png

    show = not no_progress
    pipeline = open_pipeline(str(run), device)
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    options = sampling.options()
    training, held_out = open_run_images(config, pipeline.vae.config, progress=show)
    # Report every user error before the classifier is trained.
    classes = classes_of(training)
    held_out = of_classes(held_out, classes).some(held_out_limit)
    height, width = config.data.shape
    pipeline.check(list(classes), height=height, width=width, seed=seed, **options)

    judge = _classifier(classifier, classifier_steps, pipeline, training, show)
    result = class_fidelity(pipeline, judge, training, held_out, per_class, seed, batch_size, show, **options)
    settings = _settings(pipeline, options) | {"seed": seed}
    write_json(_figures(result) | settings, run / "class_fidelity.json")
    write_png(_grid(result), run / "class_fidelity.png")
    report = _report(result, settings)
    print(f"{report}\n\n{run / 'class_fidelity.json'}\n{run / 'class_fidelity.png'}: one row per class")
    if log is not None:
        append_to_log(log, ["latentdiff", "evaluate-classes", str(run)], report)


def _classifier(
    path: Path | None, steps: int, pipeline: "LatentDiffusionPipeline", training: "CaptionedImages", progress: bool
) -> "Classifier":
    """The classifier in the file, if it exists and fits the data; else a new one, always from the same seed."""
    from latentdiff.evaluation.classes import Classifier, train_classifier

    if path is not None and path.exists():
        classifier = Classifier.load(path)
        classifier.check(training, f"--classifier {path}")
        return classifier.to(pipeline.device)
    classifier = train_classifier(training, steps=steps, progress=progress, device=pipeline.device)
    if path is not None:
        classifier.save(path)
    return classifier


def _settings(pipeline: "LatentDiffusionPipeline", options: dict[str, Any]) -> dict[str, Any]:
    """How the images were sampled."""
    names = ("num_inference_steps", "sampler", "guidance_scale")
    return {name: options.get(name, getattr(pipeline.defaults, name)) for name in names}


def _figures(result: "ClassFidelity") -> dict[str, Any]:
    """The contents of class_fidelity.json."""
    by_class = {
        name: {"generated": round(accuracy, 4), "real": _rounded(result.class_accuracy_real.get(name))}
        for name, accuracy in result.class_accuracy.items()
    }
    return {
        "generated_images": len(result.images),
        "held_out_images": result.held_out,
        "accuracy": round(result.accuracy, 4),
        "accuracy_real": round(result.accuracy_real, 4),
        "kid_classifier_features": _kid_figures(result.kid),
        "kid_classifier_features_floor": _kid_figures(result.kid_floor),
        "classes": by_class,
    }


def _kid_figures(kid: "KID") -> dict[str, float]:
    return {"mean": float(f"{kid.mean:.6g}"), "std": float(f"{kid.std:.6g}")}


def _rounded(fraction: float | None) -> float | None:
    return None if fraction is None else round(fraction, 4)


def _grid(result: "ClassFidelity") -> "Image.Image":
    """The first images of each class in a row beside its name."""
    from PIL import ImageOps

    from latentdiff.figures.grids import labelled_grid

    factor = ceil(MIN_IMAGE_SIZE / min(result.images[0].size))
    columns = min(GRID_COLUMNS, result.per_class)
    firsts = range(0, len(result.images), result.per_class)
    rows = [[ImageOps.scale(image, factor) for image in result.images[i : i + columns]] for i in firsts]
    return labelled_grid(rows, result.classes, [""] * columns)


def _report(result: "ClassFidelity", settings: dict[str, Any]) -> str:
    rows = [
        ("images", "of the right class", "KID (classifier features)"),
        ("---",) * 3,
        (f"{len(result.images)} generated", f"{result.accuracy:.1%}", _kid_text(result.kid)),
        ("real ones", f"{result.accuracy_real:.1%}", _kid_text(result.kid_floor)),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    lowest = sorted(result.class_accuracy, key=lambda name: result.class_accuracy[name])[:NUM_LOWEST]
    named = ", ".join(f"{name} {result.class_accuracy[name]:.0%}{_real_text(result, name)}" for name in lowest)
    return (
        f"{table}\n\n{result.per_class} images of each of {len(result.classes)} classes against {result.held_out} "
        f"held-out ones; {settings['num_inference_steps']} steps of {settings['sampler']}, guidance "
        f"{settings['guidance_scale']:g}, seed {settings['seed']}. KID: mean and standard deviation over subsets; for "
        f"real ones, of as many training images. Lowest classes: {named}."
    )


def _kid_text(kid: "KID") -> str:
    return f"{kid.mean:.4g} ± {kid.std:.2g}"


def _real_text(result: "ClassFidelity", name: str) -> str:
    fraction = result.class_accuracy_real.get(name)
    return "" if fraction is None else f" (real {fraction:.0%})"
