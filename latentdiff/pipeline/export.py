"""A pipeline written for other tools: as a new folder or a new single file, whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from latentdiff.formats.swap import writing_new
from latentdiff.pipeline.folder import write_folder
from latentdiff.pipeline.single_file import SUFFIX, write_single_file

if TYPE_CHECKING:
    from latentdiff.pipeline.pipeline import LatentDiffusionPipeline

Format = Literal["diffusers", "single-file"]


def export(
    pipeline: "LatentDiffusionPipeline",
    out: Path,
    kind: Format = "diffusers",
    check: Callable[[Path, Path], None] | None = None,
    describe: Callable[[Path], None] | None = None,
) -> None:
    """Write a pipeline into `out`, which must not be there: a diffusers folder, or Stable Diffusion's single file.

    describe(folder): adds to the folder what is not of the model itself, such as a model card.
    check(written, folder): called before anything is at `out`, with what is to be there and a diffusers folder of the
    same model; if it raises, nothing will be.
    Raises ValueError if `out` exists or is no .safetensors for a single file, if no single file names the model (the
    message says why), or if a weight is not finite.
    """
    if kind == "single-file" and out.suffix.lower() != SUFFIX:
        raise ValueError(f"{out} must end in {SUFFIX}")
    with writing_new(out) as staged:
        folder = staged if kind == "diffusers" else staged.parent / "folder"
        write_folder(pipeline, folder)
        if kind == "single-file":
            write_single_file(folder, staged)
        if kind == "diffusers" and describe is not None:
            describe(folder)
        if check is not None:
            check(staged, folder)
