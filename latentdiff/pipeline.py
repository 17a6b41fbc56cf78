"""The pipeline: prompt -> context -> latents -> pixels -> picture."""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.config import DIFFUSERS_VERSION
from latentdiff.data import to_images
from latentdiff.diffusion import NoiseSchedule, sampling_timesteps
from latentdiff.formats.diffusers_folder import read_json, write_json
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.modes import evaluating
from latentdiff.models.text import CLIPTokenizer, TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.samplers import get_sampler, randn

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


GENERATION_FILE = "generation_config.json"


class NonFiniteError(ValueError):
    """Sampling gave NaN or infinity instead of a picture."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What a call uses where it says nothing; kept in the folder, as what suits one model does not suit another."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sampler: str = "ddim"


@dataclass(frozen=True)
class PipelineOutput(Sequence[Image.Image]):
    """The pictures of a call, in order; it is also a sequence of them. `seeds` repeats each picture."""

    images: list[Image.Image]
    seeds: list[int]

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)


class LatentDiffusionPipeline:
    """Chains tokenizer, text encoder, UNet sampler and VAE decoder.

    pipeline = LatentDiffusionPipeline.from_pretrained("saved/demo")
    pipeline("a red apple", seed=3).images[0].save("apple.png")
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet,
        text_encoder: TextEncoder,
        tokenizer: CLIPTokenizer,
        schedule: NoiseSchedule,
        defaults: GenerationDefaults = GenerationDefaults(),  # noqa: B008 (immutable)
    ) -> None:
        """Raises ValueError if the parts do not fit together."""
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"the UNet takes {unet.config.in_channels} latent channels, but the autoencoder gives "
                f"{vae.config.latent_channels}"
            )
        if unet.config.out_channels != unet.config.in_channels:
            raise ValueError(f"the UNet takes {unet.config.in_channels} channels, but gives {unet.config.out_channels}")
        if unet.config.cross_attention_dim != text_encoder.hidden_size:
            raise ValueError(
                f"the UNet's cross_attention_dim is {unet.config.cross_attention_dim}, but the text encoder is "
                f"{text_encoder.hidden_size} wide"
            )
        if tokenizer.max_length > text_encoder.max_length:
            raise ValueError(
                f"the tokenizer makes rows of {tokenizer.max_length} tokens, but the text encoder reads at most "
                f"{text_encoder.max_length}"
            )
        self.vae = vae
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.defaults = defaults

    # ------------------------------------------------------------------------------------------------------------------
    # Opening and saving

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, dtype: torch.dtype | None = None, variant: str | None = None
    ) -> "LatentDiffusionPipeline":
        """Open a folder in the diffusers layout, or a model id of the hub.

        `variant` picks files such as `diffusion_pytorch_model.fp16.safetensors`. Raises ValueError if the folder or a
        part of it is missing, broken or of a kind that is not supported.
        """
        folder = _local_folder(str(name_or_folder), variant)
        index = read_json(folder / "model_index.json")
        for part in COMPONENTS:
            if not (folder / part).is_dir():
                raise ValueError(f"{folder} has no {part}/ (model_index.json: {index.get(part)})")
        tokenizer = CLIPTokenizer.load(folder / "tokenizer")
        scheduler = folder / "scheduler" / "scheduler_config.json"
        try:
            schedule = NoiseSchedule.from_scheduler_config(read_json(scheduler))
        except ValueError as error:
            raise ValueError(f"{scheduler}: {error}") from None
        return cls(
            vae=AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, variant=variant),
            unet=UNet.from_pretrained(folder / "unet", dtype=dtype, variant=variant),
            text_encoder=TextEncoder.from_pretrained(
                str(folder), frozen=True, subfolder="text_encoder", dtype=dtype, variant=variant
            ),
            tokenizer=tokenizer,
            schedule=schedule,
            defaults=_read_defaults(folder / GENERATION_FILE),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the diffusers layout, safetensors only; the index comes last, so that a folder with one is whole."""
        folder = Path(folder)
        (folder / "model_index.json").unlink(missing_ok=True)
        self.vae.save_pretrained(folder / "vae")
        self.unet.save_pretrained(folder / "unet")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save(folder / "tokenizer")
        write_json(self.schedule.to_scheduler_config(), folder / "scheduler" / "scheduler_config.json")
        write_json(asdict(self.defaults), folder / GENERATION_FILE)
        write_json(INDEX, folder / "model_index.json")

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "LatentDiffusionPipeline":
        """Move the models; returns the pipeline itself."""
        for module in self._modules():
            module.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """In which type the UNet computes."""
        return self.unet.dtype

    # ------------------------------------------------------------------------------------------------------------------
    # Generating

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        sampler: str | None = None,
        latents: Tensor | None = None,
        callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
        progress: bool = True,
    ) -> PipelineOutput:
        """Generate pictures: `num_images_per_prompt` of each prompt, in the order of the prompts.

        num_inference_steps, guidance_scale, sampler: the folder's own defaults (`defaults`) where they are None.
        guidance_scale: weight of the prompt against the negative (or empty) one (Ho & Salimans 2022); 1 is no guidance.
        height, width: pixels; the trained size by default.
        seed: one integer (picture i gets seed + i), one a picture, or None for random ones, which the output tells.
        latents: starting noise [B, C, h, w] of unit variance instead of the seeds' own.
        callback(step_index, timestep, latents, x0): called after each sampling step.

        Raises ValueError for an empty or non-text prompt, lists of unequal lengths, sizes that do not divide, an
        unknown sampler, or steps outside 1 .. T.
        """
        # 1. Check the arguments; nothing is computed before all are known to be right
        prompts = self._prompts(prompt, num_images_per_prompt)
        negatives = self._negatives(negative_prompt, len(prompts), num_images_per_prompt)
        seeds = self._seeds(seed, len(prompts))
        shape = self._latent_shape(height, width)
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        sampler = self.defaults.sampler if sampler is None else sampler
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale is {guidance_scale}, must be a finite number of at least 0")
        sample = get_sampler(sampler)
        timesteps = sampling_timesteps(self.schedule, steps)
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise ValueError(f"latents are {list(latents.shape)}, must be {[len(prompts), *shape]}")

        # 2. Prompts to context; with guidance, both branches go through the UNet in one call
        guided = guidance_scale != 1.0
        with evaluating(*self._modules()):
            context = self.encode_prompts([*prompts, *negatives] if guided else prompts)

            # 3. Starting noise, drawn per picture on the CPU
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            noise = randn(shape, generators, self.device, self.dtype)
            x = noise if latents is None else latents.to(self.device, self.dtype)

            # 4. Sampling loop
            def denoise(x: Tensor, timestep: int) -> Tensor:
                t = torch.full((len(x),), timestep, device=x.device)
                if not guided:
                    return self.schedule.predict_x0(self.unet(x, t, context), x, t)
                both = self.unet(torch.cat([x, x]), torch.cat([t, t]), context)
                conditional, unconditional = both.chunk(2)
                output = unconditional + guidance_scale * (conditional - unconditional)
                return self.schedule.predict_x0(output, x, t)

            with tqdm(total=len(timesteps), desc=sampler, unit="step", disable=not progress, leave=False) as bar:

                def after_step(step: int, timestep: int, x: Tensor, x0: Tensor) -> None:
                    bar.update()
                    if callback is not None:
                        callback(step, timestep, x, x0)

                x = sample(denoise, x, self.schedule, timesteps, generators, after_step)
            if not x.isfinite().all():
                raise NonFiniteError(
                    f"sampling gave latents that are not finite with {self.dtype}; use float32 or bfloat16, or less "
                    "guidance"
                )

            # 5. Latents to pictures
            with torch.autocast(x.device.type, enabled=False):  # in bf16 the flat parts of a picture become uneven
                return PipelineOutput(to_images(self.vae.decode(x.to(self.vae.dtype))), seeds)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> context [B, L, D] on the UNet's device, in its dtype."""
        device = next(self.text_encoder.parameters()).device
        return self.text_encoder(self.tokenizer(list(prompts)).to(device)).to(self.device, self.dtype)

    def _modules(self) -> tuple[nn.Module, ...]:
        return self.vae, self.unet, self.text_encoder

    def _prompts(self, prompt: str | Sequence[str], num_images_per_prompt: int) -> list[str]:
        prompts = _texts("prompt", prompt)
        if not prompts:
            raise ValueError("prompt is an empty list, must be a text or a list of texts")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}, must be at least 1")
        return [text for text in prompts for _ in range(num_images_per_prompt)]

    def _negatives(self, negative: str | Sequence[str] | None, count: int, num_images_per_prompt: int) -> list[str]:
        if negative is None or isinstance(negative, str):
            return [negative or ""] * count
        negatives = _texts("negative_prompt", negative)
        if len(negatives) * num_images_per_prompt != count:
            raise ValueError(
                f"negative_prompt has {len(negatives)} texts, but there are {count // num_images_per_prompt} prompts"
            )
        return [text for text in negatives for _ in range(num_images_per_prompt)]

    def _seeds(self, seed: int | Sequence[int] | None, count: int) -> list[int]:
        if seed is None:
            seed = secrets.randbelow(2**31)
        if not isinstance(seed, int | Sequence):
            raise ValueError(f"seed is {seed!r}, must be an integer or a list of integers")
        seeds = list(range(seed, seed + count)) if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise ValueError(f"seed has {len(seeds)} entries, but there are {count} pictures to make")
        for s in seeds:
            if not isinstance(s, int) or not 0 <= s < 2**63:
                raise ValueError(f"seed {s!r} is not an integer in 0 .. 2**63 - 1")
        return seeds

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        f = self.vae.config.downsampling
        trained = (self.unet.config.sample_size or 64) * f
        height, width = trained if height is None else height, trained if width is None else width
        multiple = f * self.unet.config.downsampling
        for name, value in [("height", height), ("width", width)]:
            if value < multiple or value % multiple:
                raise ValueError(f"{name} is {value}, must be a multiple of {multiple}")
        return self.vae.config.latent_channels, height // f, width // f


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    """One text or several as a list; ValueError for anything else."""
    if not isinstance(value, str | Sequence):
        raise ValueError(f"{name} is {value!r}, must be a text or a list of texts")
    texts = [value] if isinstance(value, str) else list(value)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name} {i} is {text!r}, must be a text")
    return texts


def _read_defaults(path: Path) -> GenerationDefaults:
    """The folder's generation defaults; a folder from elsewhere has none."""
    if not path.is_file():
        return GenerationDefaults()
    try:
        return GenerationDefaults(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None


def _local_folder(name: str, variant: str | None) -> Path:
    """The folder itself, or a snapshot of a hub repository: the parts that a pipeline needs, safetensors only."""
    if os.path.isdir(os.path.expanduser(name)):
        return Path(name).expanduser()
    stem = "model" if variant is None else f"model.{variant}"
    wanted = [f"*/*{stem}.safetensors", f"*/*{stem}-0*.safetensors", "*/*.json", "*/*.txt", "model_index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["safety_checker/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is neither a folder nor a model that could be reached on the hub: {reason}"
        ) from None
