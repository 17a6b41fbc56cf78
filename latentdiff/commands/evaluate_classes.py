"""`latentdiff evaluate-classes`: whether a run draws the classes that it was trained on, by a small classifier."""

import argparse
import shlex
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.commands.common import check_place

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.data.captioned_images import CaptionedImages
    from latentdiff.evaluation.classes import KID, ClassFidelity, Classifier
    from latentdiff.pipeline import LatentDiffusionPipeline


LEAST = {"per_class": 1, "held_out_limit": 2, "batch_size": 1, "classifier_steps": 1}  # of the counts
GRID_COLUMNS = 10
GRID_IMAGE_SIZE = 64  # pixels, the least
WORST = 3  # classes that the report names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `latentdiff evaluate-classes`."""
    parser.add_argument("run", type=Path, help="folder that train_unet.py wrote, with class names as captions")
    parser.add_argument("--per-class", type=int, default=100, help="images to draw (default: %(default)s)")
    parser.add_argument(
        "--held-out-limit", type=int, default=5000, help="real images to compare with, at most (default: %(default)s)"
    )
    parser.add_argument("--guidance-scale", type=float, help="(default: the folder's own, as of the next two)")
    parser.add_argument("--steps", type=int, help="of the sampler")
    parser.add_argument("--sampler", help="ddim, euler, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the first image, the next ones count up")
    parser.add_argument("--batch-size", type=int, default=100, help="images drawn at once (default: %(default)s)")
    parser.add_argument(
        "--classifier",
        type=Path,
        metavar="FILE",
        help="safetensors to read it from, or to write if there is none",
    )
    parser.add_argument(
        "--classifier-steps", type=int, default=1000, help="of its training, batches of 128 (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--log", type=Path, help="also append the figures to this Markdown file, such as docs/LOG.md")
    parser.add_argument("--no-progress", action="store_true")


def run(arguments: argparse.Namespace) -> None:
    """Measure a run on its own data; write class_fidelity.json and class_fidelity.png into its folder."""
    _check_arguments(arguments)
    from latentdiff.commands.common import open_pipeline
    from latentdiff.config import UNetTrainingConfig, load_config
    from latentdiff.data.captioned_images import open_images
    from latentdiff.evaluation.classes import class_fidelity, classes_of, of_classes
    from latentdiff.formats.files import write_json, write_png

    folder: Path = arguments.run
    show = not arguments.no_progress
    pipeline = open_pipeline(str(folder), arguments.device)
    config = load_config(UNetTrainingConfig, folder / "config.yaml")
    options = _options(arguments)
    training, held_out = open_images(config.data, pipeline.vae.config.in_channels, config.train.seed, progress=show)
    # What would be refused after the classifier's training is refused before it.
    classes = classes_of(training)
    held_out = of_classes(held_out, classes).some(arguments.held_out_limit)
    size = config.data.size
    pipeline.check(list(classes), height=size, width=size, seed=arguments.seed, **options)

    classifier = _classifier(arguments, pipeline, training)
    result = class_fidelity(
        pipeline,
        classifier,
        training,
        held_out,
        arguments.per_class,
        arguments.seed,
        arguments.batch_size,
        show,
        **options,
    )
    drawing = _drawing(pipeline, options) | {"seed": arguments.seed}
    write_json(_figures(result) | drawing, folder / "class_fidelity.json")
    write_png(_grid(result), folder / "class_fidelity.png")
    report = _report(result, drawing)
    print(f"{report}\n\n{folder / 'class_fidelity.json'}\n{folder / 'class_fidelity.png'}: a row a class")
    if arguments.log is not None:
        from latentdiff.commands.common import append_to_log

        append_to_log(arguments.log, f"latentdiff evaluate-classes {shlex.quote(str(folder))}", report)


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, must be at least {least}")
    for name in ("classifier", "log"):
        if getattr(arguments, name) is not None:
            check_place(f"--{name}", getattr(arguments, name))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's options that the command line says."""
    options = {
        "guidance_scale": arguments.guidance_scale,
        "num_inference_steps": arguments.steps,
        "sampler": arguments.sampler,
    }
    return {name: value for name, value in options.items() if value is not None}


def _classifier(
    arguments: argparse.Namespace, pipeline: "LatentDiffusionPipeline", training: "CaptionedImages"
) -> "Classifier":
    """That of --classifier, if the file exists and fits the data; else a new one, whose seed is always the same."""
    from latentdiff.evaluation.classes import Classifier, train_classifier

    path: Path | None = arguments.classifier
    if path is not None and path.exists():
        classifier = Classifier.load(path)
        classifier.check(training, f"--classifier {path}")
        return classifier.to(pipeline.device)
    classifier = train_classifier(
        training, steps=arguments.classifier_steps, progress=not arguments.no_progress, device=pipeline.device
    )
    if path is not None:
        classifier.save(path)
    return classifier


def _drawing(pipeline: "LatentDiffusionPipeline", options: dict[str, Any]) -> dict[str, Any]:
    """How the images were drawn."""
    names = ("num_inference_steps", "sampler", "guidance_scale")
    return {name: options.get(name, getattr(pipeline.defaults, name)) for name in names}


def _figures(result: "ClassFidelity") -> dict[str, Any]:
    """The contents of class_fidelity.json."""
    by_class = {
        name: {"drawn": round(drawn, 4), "real": _rounded(result.class_accuracy_real.get(name))}
        for name, drawn in result.class_accuracy.items()
    }
    return {
        "drawn_images": len(result.images),
        "held_out_images": result.held_out,
        "accuracy": round(result.accuracy, 4),
        "accuracy_real": round(result.accuracy_real, 4),
        "kid_classifier_features": _kid_figures(result.kid),
        "kid_classifier_features_floor": _kid_figures(result.kid_floor),
        "classes": by_class,
    }


def _kid_figures(kid: "KID") -> dict[str, float]:
    return {"mean": float(f"{kid.mean:.6g}"), "std": float(f"{kid.std:.6g}")}


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _grid(result: "ClassFidelity") -> "Image.Image":
    """The first images of each class in a row beside its name."""
    from PIL import ImageOps

    from latentdiff.figures.grids import labelled_grid

    factor = ceil(GRID_IMAGE_SIZE / min(result.images[0].size))
    columns = min(GRID_COLUMNS, result.per_class)
    firsts = range(0, len(result.images), result.per_class)
    rows = [[ImageOps.scale(image, factor) for image in result.images[i : i + columns]] for i in firsts]
    return labelled_grid(rows, result.classes, [""] * columns)


def _report(result: "ClassFidelity", drawing: dict[str, Any]) -> str:
    rows = [
        ("images", "of the right class", "KID (classifier features)"),
        ("---",) * 3,
        (f"{len(result.images)} drawn", f"{result.accuracy:.1%}", _kid_text(result.kid)),
        ("real ones", f"{result.accuracy_real:.1%}", _kid_text(result.kid_floor)),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    worst = sorted(result.class_accuracy, key=lambda name: result.class_accuracy[name])[:WORST]
    named = ", ".join(f"{name} {result.class_accuracy[name]:.0%}{_beside(result, name)}" for name in worst)
    return (
        f"{table}\n\n{result.per_class} images of each of {len(result.classes)} classes against {result.held_out} "
        f"held-out ones; {drawing['num_inference_steps']} steps of {drawing['sampler']}, guidance "
        f"{drawing['guidance_scale']:g}, seed {drawing['seed']}. KID: mean and standard deviation over subsets; that "
        f"of real ones is of as many training images. Lowest classes: {named}."
    )


def _kid_text(kid: "KID") -> str:
    return f"{kid.mean:.4g} ± {kid.std:.2g}"


def _beside(result: "ClassFidelity", name: str) -> str:
    share = result.class_accuracy_real.get(name)
    return "" if share is None else f" (real {share:.0%})"
