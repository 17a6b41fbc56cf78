"""The model card of a model that is written into another folder, with the images that it shows and its config."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from latentdiff.evaluation.scores import markdown_table
from latentdiff.formats.files import read_json, write_text
from latentdiff.formats.headers import small_text
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.printable import first_line, printable
from latentdiff.training.checkpoint import DATA_FILE, MAX_DATA_BYTES, list_checkpoints
from latentdiff.training.data_record import DataRecord
from latentdiff.training.model_card import (
    CARD_FILE,
    CONFIG_FILE,
    LICENCE,
    MAX_CARD_BYTES,
    Copy,
    Origin,
    card,
    escaped,
    has_clip,
    header,
    images_shown,
    joined,
    name_of_private,
    origin_of_own,
    pipeline_parts,
    pipeline_tag,
    shareable_config,
    use_pipeline,
)

VERSIONS = ("latentdiff", "torch")  # that a card names


def write_exported_card(
    copy: Copy, source: Path, checkpoint: Path | None, pipeline: LatentDiffusionPipeline | None
) -> str:
    """Write the card of the model in `copy.model`; returns a line that says so.

    source: the run that it is from, or the folder, single file or hub id of a pipeline. checkpoint: of that run, which
    has the model. pipeline: what was written, if the source may be no run. Of a published model a card that somebody
    wrote or edited is copied as it is. No card here is signed, so none will be replaced.
    Nothing that goes wrong is an error: the model is written.
    """
    config = _own_file(source, CONFIG_FILE)
    with suppress(OSError, ValueError):
        if config is not None and not os.path.lexists(copy.model / CONFIG_FILE):
            write_text(shareable_config(config), copy.model / CONFIG_FILE)
    if os.path.lexists(copy.model / CARD_FILE):
        return f"{copy.model / CARD_FILE} is there already and is left as it is"
    try:
        own = origin_of_own(source)
        theirs = _own_file(source, CARD_FILE) if copy.step is None and own is None else None
        if theirs is not None:
            text = small_text(theirs, MAX_CARD_BYTES)
        elif config is not None and (origin := own or _origin(source, checkpoint)) is not None:
            text = card(source, origin, copy)
        elif pipeline is not None:
            text = plain_card(pipeline, source, copy)
        else:
            raise ValueError(f"neither {CARD_FILE} nor a checkpoint in {source} says what it was trained on")
        write_text(text, copy.model / CARD_FILE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no model card is written: {printable(first_line(error))}"
    _copy_images(source, copy.model)
    return f"its model card is {CARD_FILE}{': fill in its licence' if theirs is None else ''}"


def plain_card(pipeline: LatentDiffusionPipeline, source: Path, copy: Copy) -> str:
    """The card of a pipeline whose training is not known, such as one of Stable Diffusion's."""
    pixel_space, clip, defaults = pipeline.vae.is_pixel_space, has_clip(copy.model), pipeline.defaults
    values = {"library_name": "diffusers"} if clip and not pixel_space else {}
    if not source.exists():
        values["base_model"] = str(source)  # on the hub
    values["pipeline_tag"] = pipeline_tag(copy.model)
    tags = ["latentdiff", "diffusion" if pixel_space else "latent-diffusion"]
    name = escaped(name_of_private(str(source)))
    kind = "diffusion model in pixel space" if pixel_space else "latent diffusion model"
    use = use_pipeline(
        copy.name, None, "a prompt", defaults.num_inference_steps, defaults.guidance_scale, pixel_space, clip
    )
    parts = pipeline_parts(copy.model, pipeline.schedule.prediction_type, "")
    rounded = "" if copy.dtype is None else f", with weights rounded to {copy.dtype}"
    sections = [
        header({**values, "tags": tags}),
        f"# {escaped(copy.name)}",
        f"A text-to-image {kind}: {name}, written with latentdiff{rounded}. Its licence holds here too.",
        "## Use\n\n" + use,
        "## Parts\n\n" + markdown_table(parts, "part"),
        LICENCE,
    ]
    return joined(sections)


def _origin(run: Path, checkpoint: Path | None) -> Origin | None:
    """What a run was trained on, by its checkpoint (None: the newest); None if there is none."""
    checkpoint = checkpoint or next(reversed(list_checkpoints(run)), None)
    if checkpoint is None or not (checkpoint / DATA_FILE).is_file():
        return None
    data = DataRecord.from_json(read_json(checkpoint / DATA_FILE, MAX_DATA_BYTES))
    versions = read_json(checkpoint / "manifest.json")["versions"]
    return Origin.of(data, [], {name: str(versions[name]) for name in VERSIONS})


def _copy_images(run: Path, model: Path) -> None:
    """The images that the card shows, as far as they are in the run's folder."""
    for name in images_shown(model / CARD_FILE):
        with suppress(OSError):  # such as a name that is too long
            if (path := _own_file(run, name)) is not None and not (model / name).exists():
                (model / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, model / name)


def _own_file(folder: Path, name: str) -> Path | None:
    """A file in a folder; None if it is missing, or a link to one outside: what is there may be private."""
    path = folder / name
    return path if path.is_file() and path.resolve().is_relative_to(folder.resolve()) else None
