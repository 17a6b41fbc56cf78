"""Whether diffusers and transformers see the same model in what was written: each part compared in numbers."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.models.pretrained_text import PretrainedTextEncoder, quiet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.export import Format

if TYPE_CHECKING:
    from PIL import Image

LIBRARIES = ("diffusers", "transformers")
# Without weights, mojibake and the like, which only one of the two sides reads.
PROMPTS = ("a red apple", "", "Two cats, 3 dogs & a rocket at night - in the style of an old poster")
TOLERANCE = 1e-4  # of the largest value: both compute in float32, in another order
IMAGE_TOLERANCE = 2.0  # of 255
MAX_STEPS = 10
GUIDANCE = 2.0


@dataclass(frozen=True)
class Difference:
    """How far a part is from ours at most; the unit is part of the name."""

    part: str
    largest: float
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether the difference, which may be NaN, is within the tolerance."""
        return self.largest <= self.tolerance


def require_libraries() -> None:
    """Raise ValueError in one line if what `compare` needs is not installed."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'verifying needs {" and ".join(missing)}: pip install "latentdiff[export]"')


def refuse_unknown(pipeline: LatentDiffusionPipeline) -> None:
    """Raise ValueError for a model that diffusers has no pipeline for."""
    if pipeline.vae.is_pixel_space:
        raise ValueError("diffusers has no text-conditioned pipeline in pixel space, so nothing can be verified")
    if pipeline.unet.config.has_linear_attention:
        raise ValueError("diffusers has no blocks of linear attention, so nothing can be verified")
    if isinstance(pipeline.text_encoder, PretrainedTextEncoder):
        raise ValueError(
            f"the text encoder is a {pipeline.text_encoder.class_name}, diffusers' StableDiffusionPipeline takes CLIP "
            "alone, so nothing can be verified"
        )


@torch.no_grad()
def compare(pipeline: LatentDiffusionPipeline, written: Path, folder: Path, kind: Format) -> list[Difference]:
    """Open `written` with diffusers and compare each part, and an image, with `pipeline`; all in float32, on the CPU.

    pipeline: the model that was written, with the same rounding; it is moved. folder: a diffusers folder of it, in
    which diffusers finds what a single file does not say.
    Raises ValueError if diffusers does not open it.
    """
    theirs = _open(written, folder, kind)
    ours = pipeline.to("cpu", torch.float32)
    rows = [_tokens(ours, theirs), _relative("text states", *_text_states(ours, theirs))]
    generator = torch.Generator().manual_seed(0)
    shape = ours.latent_shape(None, None)
    latents = torch.randn(2, *shape, generator=generator)
    context = ours.encode_captions(PROMPTS[:2])
    timesteps = torch.tensor([0, ours.schedule.num_train_timesteps * 3 // 4])
    sample = theirs.unet(latents, timesteps, encoder_hidden_states=context).sample
    rows.append(_relative("UNet", sample, ours.unet(latents, timesteps, context)))
    rows += _autoencoder(ours, theirs, latents, generator)
    rows.append(_image(ours, theirs, latents[:1]))
    return rows


def table(rows: list[Difference]) -> str:
    """The differences as text, one part a line."""
    width = max(len(row.part) for row in rows)
    lines = [f"{'part':{width}}  {'largest difference':>18}  {'tolerance':>9}"]
    for row in rows:
        lines.append(
            f"{row.part:{width}}  {row.largest:>18.3g}  {row.tolerance:>9g}  {'same' if row.same else 'DIFFERENT'}"
        )
    return "\n".join(lines)


def _open(written: Path, folder: Path, kind: Format) -> Any:
    """diffusers' StableDiffusionPipeline, in float32; imported only here."""
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    options: dict[str, Any] = {"safety_checker": None, "local_files_only": True}
    try:
        with quiet(diffusers_logging, transformers_logging):
            if kind == "diffusers":
                pipeline: Any = StableDiffusionPipeline.from_pretrained(str(written), **options)
            else:
                pipeline = StableDiffusionPipeline.from_single_file(str(written), config=str(folder), **options)
            pipeline = pipeline.to(torch.float32)
    except Exception as error:  # whatever it raises, the export is not one that it opens
        raise ValueError(f"diffusers does not open it: {' '.join(str(error).split())[:300]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokens(ours: LatentDiffusionPipeline, theirs: Any) -> Difference:
    ids = _their_ids(theirs)
    same = ids.shape == ours.tokenizer(PROMPTS).shape
    return Difference("token ids", float((ids != ours.tokenizer(PROMPTS)).sum()) if same else math.inf, 0)


def _their_ids(theirs: Any) -> Tensor:
    return theirs.tokenizer(
        list(PROMPTS),
        padding="max_length",
        max_length=theirs.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def _text_states(ours: LatentDiffusionPipeline, theirs: Any) -> tuple[Tensor, Tensor]:
    ids = ours.tokenizer(PROMPTS)
    return theirs.text_encoder(ids)[0], ours.text_encoder(ids)


def _autoencoder(
    ours: LatentDiffusionPipeline, theirs: Any, latents: Tensor, generator: torch.Generator
) -> list[Difference]:
    vae: Any = ours.vae
    height, width = (side * vae.config.downsampling for side in latents.shape[2:])
    pixels = torch.rand(1, vae.config.in_channels, height, width, generator=generator) * 2 - 1
    # The scale is part of it: theirs is applied by their pipeline.
    scale = theirs.vae.config.scaling_factor
    encoded = theirs.vae.encode(pixels).latent_dist.mean * scale
    decoded = theirs.vae.decode(latents[:1] / scale).sample
    return [
        _relative("VAE encoder", encoded, vae.sample(vae.encode(pixels))),
        _relative("VAE decoder", decoded, vae.decode(latents[:1])),
    ]


def _image(ours: LatentDiffusionPipeline, theirs: Any, latents: Tensor) -> Difference:
    """One image of the same noise, by DDIM in steps of one length, in which both follow the same timesteps."""
    from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]

    total = ours.schedule.num_train_timesteps
    steps = max(n for n in range(1, MAX_STEPS + 1) if total % n == 0)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    height, width = (side * ours.vae.config.downsampling for side in latents.shape[2:])
    image = theirs(
        PROMPTS[0],
        latents=latents.clone(),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
    ).images[0]
    own = ours(
        PROMPTS[0],
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        guidance_rescale=0.0,
        sampler="ddim",
        sigmas="schedule",
        progress=False,
    )
    return Difference("image (of 255)", _levels(image, own[0]), IMAGE_TOLERANCE)


def _levels(one: "Image.Image", other: "Image.Image") -> float:
    if one.size != other.size or one.mode != other.mode:
        return math.inf
    return float(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max())


def _relative(part: str, theirs: Tensor, ours: Tensor) -> Difference:
    """The largest difference, relative to our largest value."""
    if theirs.shape != ours.shape:
        return Difference(part, math.inf, TOLERANCE)
    return Difference(part, ((theirs - ours).abs().max() / ours.abs().max()).item(), TOLERANCE)
