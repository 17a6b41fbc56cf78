"""`latentdiff variations`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.commands.common import with_option_groups
from latentdiff.commands.sampling import Model, Output, Sampling, Size, generate_and_write

if TYPE_CHECKING:
    from latentdiff.pipeline import PipelineOutput


@with_option_groups
def variations(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Prompt of the image to vary.")],
    output: Output,
    size: Size,
    sampling: Sampling,
    amount: Annotated[float, typer.Option(help="0 is the image itself, 1 any other image of the prompt.")] = 0.3,
) -> None:
    """Generate images that resemble the image of a prompt and seed."""
    output.check()
    if output.seed is None:
        raise ValueError("--seed is missing, must be the seed of the image to vary, as `latentdiff generate` prints it")
    pipeline = sampling.open(model)
    from latentdiff.pipeline.walks import variations as walk

    def vary(seed: int, num_images_per_prompt: int, **options: Any) -> "PipelineOutput":
        return walk(pipeline, prompt, seed, num_images_per_prompt, amount, **size.options(), **options)

    generate_and_write(vary, pipeline, output, sampling, print_seeds=False)
