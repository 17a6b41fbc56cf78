"""`latentdiff grid`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latentdiff.commands.common import with_option_groups
from latentdiff.commands.sampling import Model, Out, Overwrite, Sampling, Size, check_png, enlarged, write_images

# What may vary over the columns, and how a value is read.
GRID_OPTIONS: dict[str, Callable[[str], Any]] = {
    "guidance-scale": float,
    "guidance-rescale": float,
    "num-inference-steps": int,
    "sampler": str,
    "sigmas": str,
    "seed": int,
}
GridOption = Literal["guidance-scale", "guidance-rescale", "num-inference-steps", "sampler", "sigmas", "seed"]
MIN_IMAGE_SIZE = 128  # pixels


@with_option_groups
def grid(
    model: Model,
    prompt: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One or more prompts, one per row.")],
    size: Size,
    sampling: Sampling,
    columns: Annotated[GridOption, typer.Option(help="The option that varies.")] = "guidance-scale",
    values: Annotated[
        list[str] | None, typer.Option(metavar="VALUE...", help="Values of the option, one per column.")
    ] = None,
    out: Out = Path("grid.png"),
    seed: Annotated[int, typer.Option(help="Seed of every image.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Generate prompts with several values of an option, as a table of images."""
    check_png(out)
    if not values:
        raise ValueError(f"--values is missing, must be the values of {columns}, one per column")
    try:
        parsed = [GRID_OPTIONS[columns](value) for value in values]
    except ValueError as error:
        raise ValueError(f"--values of {columns}: {error}") from None
    from latentdiff.figures.grids import labelled_grid

    pipeline = sampling.open(model)
    option = columns.replace("-", "_")
    cells = []
    for value in parsed:
        cell = size.options() | sampling.options() | {"seed": seed} | {option: value}
        cell["seed"] = [cell["seed"]] * len(prompt)
        pipeline.check(prompt, **cell)
        cells.append(cell)
    images = [enlarged(pipeline(prompt, **cell).images, MIN_IMAGE_SIZE) for cell in cells]
    rows = [list(row) for row in zip(*images, strict=True)]
    table = labelled_grid(rows, prompt, [f"{columns} {value}" for value in parsed])
    write_images([table], out, overwrite, None if option == "seed" else [seed])
