"""`latentdiff interpolate`."""

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.commands.common import with_option_groups
from latentdiff.commands.sampling import (
    Model,
    OutOfSeveral,
    Overwrite,
    Sampling,
    Size,
    check_animation,
    check_png,
    write_animation,
    write_images,
)


@with_option_groups
def interpolate(
    model: Model,
    prompt: Annotated[tuple[str, str], typer.Argument(metavar="PROMPT PROMPT", help="First and last prompt.")],
    size: Size,
    sampling: Sampling,
    seeds: Annotated[tuple[int, int], typer.Option(metavar="SEED SEED", help="First and last seed.")] = (0, 1),
    frames: Annotated[int, typer.Option(help="Images, both ends included.")] = 8,
    out: OutOfSeveral = Path("out.png"),
    animation: Annotated[
        Path | None, typer.Option(help="Also write a .gif or .mp4 (needs PyAV) with the images as its frames.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Generate images on the way from one prompt and seed to another."""
    check_png(out)
    check_animation(animation)
    pipeline = sampling.open(model)
    from latentdiff.pipeline.walks import interpolate as walk

    result = walk(pipeline, prompt, seeds, frames, **size.options(), **sampling.options())
    write_images(result.images, out, overwrite)
    if animation is not None:
        write_animation(result.images, animation, overwrite)
