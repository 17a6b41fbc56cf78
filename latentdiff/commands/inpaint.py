"""`latentdiff inpaint`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.commands.common import with_option_groups
from latentdiff.commands.sampling import Model, Output, Prompts, Sampling, generate_and_write, read_image


@with_option_groups
def inpaint(
    model: Model,
    prompt: Prompts,
    image: Annotated[Path, typer.Option(help="Image to repaint.")],
    mask: Annotated[Path, typer.Option(help="Image of the same size, white where to repaint.")],
    output: Output,
    sampling: Sampling,
    strength: Annotated[
        float, typer.Option(help="How much of the old image is replaced under the mask, 0 .. 1.")
    ] = 1.0,
) -> None:
    """Repaint the part of an image that is white in a mask."""
    output.check()
    start, white = read_image("--image", image), read_image("--mask", mask)
    pipeline = sampling.open(model)
    generate_and_write(partial(pipeline.inpaint, prompt, start, white, strength), pipeline, output, sampling)
