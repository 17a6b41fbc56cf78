"""Write a finished run of stage 2 as the small folder that is given away: half-precision weights and samples.

python tools/publish_model.py saved/emoji-128-run saved/emoji-128 --prompts configs/emoji-128/prompts.txt
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from latentdiff.commands.common import Command, NoProgress, Run
from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.evaluation.prompts import generate
from latentdiff.figures.grids import captioned_grid, magnified
from latentdiff.formats.files import write_png
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.export import export
from latentdiff.randomness import Stream, seed_for
from latentdiff.training.arguments import SETTINGS, run_as_command, run_typer
from latentdiff.training.exported_card import write_exported_card
from latentdiff.training.model_card import Copy
from latentdiff.training.unet_model import build_text_encoder

COLUMNS = 6
BATCH_SIZE = 12
SMALLEST_SIDE = 96  # pixels of an image in samples.png
# Beside the model in the run's folder.
COPIED = ("evaluation.json", "evaluation.png")


def publish(run: Path, out: Path, prompts: Sequence[str], progress: bool) -> dict[str, int]:
    """Write the pipeline of `run` into the new folder `out`; returns its bytes and the number of words it learned.

    float16 weights; samples.png with an image of each prompt, image i with seed i; what `latentdiff evaluate` measured.
    Raises ValueError if `out` exists, there are no prompts, or a weight is not finite in float16.
    """
    if out.exists():  # said again by `export`, but not after minutes
        raise ValueError(f"{out} exists, delete it first or choose another folder")
    if not prompts:
        raise ValueError("no prompts")
    pipeline = LatentDiffusionPipeline.from_pretrained(run)
    config = load_config(UNetTrainingConfig, run / "config.yaml")
    learned = forget_untrained_tokens(pipeline, config)
    pipeline.to(dtype=torch.float16)
    copied = partial(Copy, name=out.resolve().name, dtype="float16")
    export(pipeline, out, describe=lambda folder: print(write_exported_card(copied(folder), run, None, pipeline)))
    for name in COPIED:
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
    # As a user gets it: float16 on disk, float32 where it computes.
    opened = LatentDiffusionPipeline.from_pretrained(out)
    images = generate(opened, prompts, config.data.shape, 0, BATCH_SIZE, progress)
    write_png(samples(images, prompts), out / "samples.png")
    return {"bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()), "tokens": learned}


def forget_untrained_tokens(pipeline: LatentDiffusionPipeline, config: UNetTrainingConfig) -> int:
    """Set to zero the token vectors that training left as they were drawn; returns how many it did train.

    A word that no caption had is then no word instead of a random one, and the many zeros take no room in a compressed
    file, or in git.
    """
    if config.text.pretrained is not None:
        return len(pipeline.text_encoder.token_vectors)
    initial = build_text_encoder(config.text, seed_for(config.train.seed, Stream.TEXT_INIT))
    vectors, drawn = pipeline.text_encoder.token_vectors, initial.token_vectors
    untrained = (vectors == drawn).all(dim=1)
    with torch.no_grad():
        vectors[untrained] = 0.0
    return int((~untrained).sum())


def samples(images: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """Images with their prompts underneath; small ones enlarged."""
    return captioned_grid([[magnified(image, SMALLEST_SIDE)] for image in images], prompts, COLUMNS)


# ---------------------------------------------------------------- command line

app = typer.Typer(**SETTINGS)


@app.command(cls=Command)
def command(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, a new one.")],
    prompts: Annotated[Path, typer.Option(help="A text file with a prompt in each line, for the samples.")],
    no_progress: NoProgress = False,
) -> None:
    """Write a finished run as a small folder to give away."""
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    written = publish(run, out, [line for line in lines if line], not no_progress)
    print(f"{out}: {written['bytes'] / 1e6:.1f} MB, {written['tokens']} trained tokens; the samples are samples.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input is one line and exit status 2."""
    run_as_command(lambda given: run_typer(app, given), arguments)


if __name__ == "__main__":
    main()
