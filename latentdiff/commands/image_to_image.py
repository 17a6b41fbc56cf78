"""`latentdiff image-to-image`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.commands.common import with_option_groups
from latentdiff.commands.sampling import Model, Output, Prompts, Sampling, Size, generate_and_write, read_image


@with_option_groups
def image_to_image(
    model: Model,
    prompt: Prompts,
    image: Annotated[Path, typer.Option(help="Image to start from.")],
    output: Output,
    size: Size,
    sampling: Sampling,
    strength: Annotated[float, typer.Option(help="0 keeps the image, 1 hardly anything of it.")] = 0.75,
) -> None:
    """Change an image as a prompt says."""
    output.check()
    start = read_image("--image", image)
    pipeline = sampling.open(model)
    call = partial(pipeline.image_to_image, prompt, start, strength, **size.options())
    generate_and_write(call, pipeline, output, sampling)
