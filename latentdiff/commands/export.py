"""`latentdiff export`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run of stage 2, a checkpoint, a pipeline's folder, single file or hub id."
        ),
    ],
    format: Annotated[
        Literal["diffusers", "single-file"],
        typer.Option(help="A diffusers folder, or the file that ComfyUI, A1111 and kohya read (.safetensors)."),
    ],
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Type of the weights (default: that of the UNet).")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="A kept checkpoint of the run (default: the published model, else the newest).")
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--raw", help="Of a checkpoint: the averaged weights, or those trained (default: averaged)."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="What to write, a new name (default: beside RUN, with its name).")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Open it with diffusers and compare; write nothing if it differs.")
    ] = False,
) -> None:
    """Write a model for other tools, and with --verify compare what they see with what it is."""
    if verify:
        from latentdiff.evaluation.interchange import require_libraries

        require_libraries()  # before anything large is opened
    source = run.expanduser()
    checkpoint = _checkpoint(source, step, ema)
    if out is None:
        out = _default_name(source, checkpoint, ema, format, dtype)
    out = out.expanduser()
    if format == "single-file" and out.suffix.lower() != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out {out} exists, delete it first or choose another name")

    import torch

    from latentdiff.pipeline.export import export as write
    from latentdiff.training.checkpoint import step_of
    from latentdiff.training.exported_card import write_exported_card
    from latentdiff.training.model_card import AVERAGES, TRAINED, Copy

    pipeline = _open(source, checkpoint, ema)
    if pipeline.adapters:
        pipeline.fuse_lora()
    pipeline.to("cpu", getattr(torch, DTYPES[dtype]) if dtype else pipeline.dtype)
    place, trained = source, None
    if checkpoint is not None:
        place, trained = checkpoint.resolve().parents[1], step_of(checkpoint.resolve())
    weights = TRAINED if ema is False else AVERAGES
    rounded = DTYPES[dtype] if dtype in ("fp16", "bf16") else None
    said: list[str] = []  # of the model card, which is there once `out` is

    def describe(folder: Path) -> None:
        copy = Copy(folder, out.name, trained, weights, rounded)
        said.append(write_exported_card(copy, place, checkpoint, pipeline))

    write(pipeline, out, format, _checking(pipeline, out, format) if verify else None, describe)
    print(out, *said, sep="\n")


def _checking(
    pipeline: "LatentDiffusionPipeline", out: Path, format: Literal["diffusers", "single-file"]
) -> Callable[[Path, Path], None]:
    """What compares a written model with the pipeline, prints a table, and ends the command if they differ."""
    from latentdiff.evaluation.interchange import compare, refuse_unknown, table

    refuse_unknown(pipeline)

    def check(written: Path, folder: Path) -> None:
        rows = compare(pipeline, written, folder, format)
        print(table(rows))
        if not all(row.same for row in rows):
            print(f"diffusers does not see the same model: {out} is not written")
            raise typer.Exit(1)

    return check


def _checkpoint(source: Path, step: int | None, ema: bool | None) -> Path | None:
    """The checkpoint to export; None: the pipeline in the folder, or the single file."""
    if (
        step is None
        and ema is None
        and not (source / "manifest.json").is_file()
        and not (source / "config.yaml").is_file()
    ):
        return None
    from latentdiff.training.checkpoint import checkpoint_folder, list_checkpoints, step_of
    from latentdiff.training.unet_model import unfinished_checkpoint

    if (source / "manifest.json").is_file():
        if step is not None:
            raise ValueError(f"--step is for a run; {source} is the checkpoint of one step")
        return source
    kept = list_checkpoints(source)
    if step is not None:
        if (chosen := checkpoint_folder(source, step)) not in kept:
            steps = ", ".join(str(step_of(folder)) for folder in kept)
            raise ValueError(
                f"--step {step}: {source} has {f'the checkpoints of {steps}' if kept else 'no checkpoints'}"
            )
        return chosen
    if ema is not None:
        if not kept:
            raise ValueError(f"--{'ema' if ema else 'raw'} is for a run with checkpoints, which {source} has not")
        return kept[-1]
    return unfinished_checkpoint(source)


def _default_name(source: Path, checkpoint: Path | None, ema: bool | None, format: str, dtype: str | None) -> Path:
    """saved/demo -> saved/demo-diffusers, saved/demo-step_00000500-raw-fp16.safetensors, ...; of a hub id here."""
    if checkpoint is None:
        place, parts = source, []
    else:
        place, parts = checkpoint.resolve().parents[1], [checkpoint.name, *(["raw"] if ema is False else [])]
    stem = place.stem if place.is_file() else place.resolve().name
    name = "-".join([stem, *parts, *([dtype] if dtype else [])])
    folder = place.resolve().parent if place.is_dir() else place.parent if place.is_file() else Path()
    return folder / (f"{name}-diffusers" if format == "diffusers" else f"{name}.safetensors")


def _open(source: Path, checkpoint: Path | None, ema: bool | None) -> "LatentDiffusionPipeline":
    from latentdiff.pipeline import LatentDiffusionPipeline

    if checkpoint is not None:
        from latentdiff.training.unet_model import open_checkpoint

        return open_checkpoint(checkpoint, "model" if ema is False else "ema")
    if source.is_file():
        return LatentDiffusionPipeline.from_single_file(source, dtype=None)
    return LatentDiffusionPipeline.from_pretrained(source, dtype=None)
