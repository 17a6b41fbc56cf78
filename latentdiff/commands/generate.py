"""`latentdiff generate`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.commands.common import with_option_groups
from latentdiff.commands.sampling import Model, Output, Prompts, Sampling, Size, generate_and_write

if TYPE_CHECKING:
    from torch import Tensor


@with_option_groups
def generate(
    model: Model,
    prompt: Prompts,
    output: Output,
    size: Size,
    sampling: Sampling,
    latents: Annotated[
        Path | None,
        typer.Option(help='Safetensors file whose tensor "latents" [images, C, h, w] is the starting noise.'),
    ] = None,
) -> None:
    """Generate images from prompts."""
    output.check()
    noise = None if latents is None else _read_latents(latents)
    pipeline = sampling.open(model)
    # With other starting noise the seeds do not repeat the images.
    call = partial(pipeline, prompt, latents=noise, **size.options())
    generate_and_write(call, pipeline, output, sampling, print_seeds=noise is None)


def _read_latents(path: Path) -> "Tensor":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--latents {path} is not a safetensors file: {error}") from None
    if "latents" not in tensors:
        raise ValueError(f"--latents {path} has no tensor latents, only {', '.join(tensors) or 'nothing'}")
    return tensors["latents"]
