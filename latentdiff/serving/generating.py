"""A request of the live page -> an image. One thread uses this."""

import base64
import binascii
import io
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ConfigDict, Field

from latentdiff.config import Section
from latentdiff.formats.files import PNG_KEY, save_png
from latentdiff.images import READ_ERRORS, decode
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.printable import first_line, shortened
from latentdiff.serving.latest import Latest
from latentdiff.serving.runs import PUBLISHED, published_file, weights_of
from latentdiff.training.checkpoint import checkpoint_folder
from latentdiff.training.unet_model import open_checkpoint

MAX_PIPELINES = 2  # in memory
MAX_PROMPT = 2000  # characters


class Asked(Section):
    """What the page asks for. None: the model's own default, or a random seed."""

    model_config = ConfigDict(strict=True)

    prompt: str = Field("", max_length=MAX_PROMPT)
    seed: int | None = Field(None, ge=0, lt=2**63)
    sampler: str | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    weights: str | None = None
    """"published", or the step of a checkpoint."""
    image: str | None = None
    """To start from, as a data URI."""
    strength: float = Field(0.75, ge=0, le=1)


class Pipelines:
    """The pipelines that were used last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: Latest[tuple[Path, str, int], LatentDiffusionPipeline] = Latest(MAX_PIPELINES)

    def __len__(self) -> int:
        return len(self._open)

    def get(self, run: Path, weights: str) -> LatentDiffusionPipeline:
        """The pipeline with these weights of a run, as they are now on the disk; ValueError if they cannot be read."""
        folder = run if weights == PUBLISHED else checkpoint_folder(run, int(weights))
        changed = (published_file(run) if weights == PUBLISHED else folder / "manifest.json").stat().st_mtime_ns

        def opened() -> LatentDiffusionPipeline:
            found = LatentDiffusionPipeline.from_pretrained(run) if weights == PUBLISHED else open_checkpoint(folder)
            return found.to(self.device)

        return self._open.get((run, weights, changed), opened)


def generate(pipelines: Pipelines, run: Path, asked: Asked, check: Callable[[], None]) -> dict[str, Any]:
    """The image of a request, as a PNG in a data URI, with its seed, its settings and what the pipeline warns of.

    check: called before each step; what it raises ends the generation. Raises ValueError for what the pipeline refuses,
    for unknown weights and for an image that cannot be read.
    """
    known = weights_of(run)
    if not known:
        raise ValueError(f"{run.name} has no weights that generate images yet")
    weights = asked.weights or known[0]
    if weights not in known:
        raise ValueError(f"weights are {shortened(weights)}, must be one of {', '.join(known)}")
    start = None if asked.image is None else read_image(asked.image)
    options = asked.model_dump(include={"seed", "sampler", "num_inference_steps", "guidance_scale"})
    options |= {"progress": False, "callback": lambda *_: check()}
    check()
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        pipeline = pipelines.get(run, weights)
        if start is None:
            output = pipeline(asked.prompt, **options)
        else:
            _, height, width = pipeline.latent_shape(None, None)
            f = pipeline.vae.config.downsampling
            options |= {"height": height * f, "width": width * f}
            output = pipeline.image_to_image(asked.prompt, start, asked.strength, **options)
    image = output.images[0]
    return {
        "image": data_uri(image),
        "seed": output.seeds[0],
        "weights": weights,
        "settings": json.loads(image.info[PNG_KEY]),
        "notes": [str(one.message) for one in said if issubclass(one.category, UserWarning)],
        "seconds": round(time.monotonic() - began, 2),
    }


def data_uri(image: Image.Image) -> str:
    """A PNG of the image, with what it was generated with, as a data URI."""
    buffer = io.BytesIO()
    save_png(image, buffer)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_image(uri: str) -> Image.Image:
    """The image in a data URI; ValueError if it is none or cannot be read."""
    head, comma, content = uri.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise ValueError("image must be a data URI in base64")
    try:
        return decode({"bytes": base64.b64decode(content, validate=True), "path": None})
    except binascii.Error:
        raise ValueError("image is not valid base64") from None
    except READ_ERRORS as error:
        raise ValueError(f"the image cannot be read: {first_line(error)}") from None
