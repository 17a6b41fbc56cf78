"""The options of a generation, checked before anything is computed."""

import math
import operator
import secrets
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.diffusion.samplers import Denoiser, Sampler, get_sampler
from latentdiff.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentdiff.diffusion.timesteps import Sigmas
from latentdiff.images import View, normalized, prepare, to_pixels
from latentdiff.models.pretrained_text import AnyTextEncoder
from latentdiff.models.tiling import check_parts
from latentdiff.pipeline.guidance import Guidance
from latentdiff.printable import shortened

MAX_IMAGES = 100_000  # of a call, which keeps all of them in memory


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of a call; saved in the folder, since what suits one model does not suit another.

    The sampler and its sigmas are in the folder's scheduler_config.json, the rest in generation_config.json.
    Raises ValueError for a value that no call could use.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    sampler: str = "ddim"
    sigmas: Sigmas = "schedule"

    def __post_init__(self) -> None:
        if integer("num_inference_steps", self.num_inference_steps) is None or self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {shortened(self.num_inference_steps)}, must be at least 1")
        Guidance(number("guidance_scale", self.guidance_scale), number("guidance_rescale", self.guidance_rescale))
        get_sampler(self.sampler)
        if self.sigmas not in get_args(Sigmas):
            raise ValueError(f"sigmas is {self.sigmas!r}, must be one of {', '.join(get_args(Sigmas))}")

    def levels(self, schedule: NoiseSchedule) -> list[NoiseLevel]:
        """The noise levels of a call without options; ValueError for an unknown sampler or impossible steps."""
        return get_sampler(self.sampler).levels(schedule, self.num_inference_steps, self.sigmas)


@dataclass(frozen=True)
class Options:
    """Keyword options of every way of generating.

    num_inference_steps, guidance_scale, guidance_rescale, sampler, sigmas: the folder's own `defaults` where None.
    guidance_scale: weight of the prompt against the negative (or empty) one; 1 is no guidance, and half the work.
    guidance_rescale, guidance_interval: see `Guidance`.
    negative_prompt: one for all, or one per prompt.
    clip_skip: number of the text encoder's last layers to skip.
    seed: one integer (image i gets seed + i), one per image, or None for random ones; the output has them.
    sampler: see `diffusion.samplers`. sigmas: schedule, karras, exponential or beta; see `diffusion.timesteps`.
    eta: of ddim only, in 0 .. 1.
    prompt_weights: read weights such as "(red:1.2)" in the texts; False takes them as they stand.
    prompt_embeds, negative_prompt_embeds: context [B, L, D], one row per image, instead of texts.
    batch_size: images sampled and decoded at once; all by default. No image depends on it.
    tile: side, in latent pixels, of the tiles that the autoencoder works on; the whole image by default.
    callback(step_index, timestep, latents, x0): called after each step of a batch with the latents and the current
        estimate of the clean ones (`pipeline.decode` or a LatentPreview shows it). An exception in it ends the call.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    negative_prompt: str | Sequence[str] | None = None
    num_images_per_prompt: int = 1
    clip_skip: int = 0
    seed: int | Sequence[int] | None = None
    sampler: str | None = None
    sigmas: Sigmas | None = None
    eta: float | None = None
    prompt_weights: bool = True
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    batch_size: int | None = None
    tile: int | None = None
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None
    progress: bool = True


@dataclass(frozen=True)
class Request:
    """A checked generation: prompt, negative prompt and seed of each image, and how they are sampled."""

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    guidance: Guidance
    sampler: Sampler
    levels: list[NoiseLevel]
    options: Options

    @property
    def count(self) -> int:
        """Number of images to generate."""
        return len(self.seeds)

    @property
    def steps(self) -> int:
        """Number of sampling steps; 0 for a strength of 0."""
        return len(self.levels) - 1

    @property
    def batch_size(self) -> int:
        """Images sampled at once."""
        return self.options.batch_size or self.count

    def description(self, image: int) -> dict[str, Any]:
        """What an image was generated with; its texts are left out where embeddings were given instead."""
        negative = self.guidance.wanted and self.options.negative_prompt_embeds is None
        texts = {} if self.options.prompt_embeds is not None else {"prompt": self.prompts[image]}
        texts |= {"negative_prompt": self.negatives[image]} if negative else {}
        how = {"seed": self.seeds[image], "sampler": self.sampler.name, "num_inference_steps": self.steps}
        return texts | how | {"guidance_scale": self.guidance.scale}

    def batches(self) -> list[slice]:
        """The images of each batch."""
        return [slice(first, first + self.batch_size) for first in range(0, self.count, self.batch_size)]

    def after(self, strength: float) -> "Request":
        """The last `strength` of the steps, at least one unless it is 0; ValueError outside 0 .. 1."""
        if strength is None or not 0 <= number("strength", strength) <= 1:
            raise ValueError(f"strength is {strength}, must be in 0 .. 1")
        # As in diffusers, but 0.58 of 50 steps, 28.999999999999996, are 29.
        run = max(int(self.steps * strength + 1e-6), math.ceil(strength))
        return replace(self, levels=self.levels[self.steps - run :])

    def progress_bar(self) -> tqdm:
        """A bar over the steps of all batches."""
        return tqdm(
            total=self.steps * len(self.batches()),
            desc=self.sampler.name,
            unit="step",
            disable=not self.options.progress,
            leave=False,
        )

    def sample(
        self,
        denoise: Denoiser,
        x: Tensor,
        schedule: NoiseSchedule,
        generators: Sequence[torch.Generator],
        bar: tqdm,
    ) -> Tensor:
        """Run the sampler on a batch, if there are steps; the callback and the bar see each step."""
        if self.steps == 0:
            return x

        def after_step(step: int, timestep: float, x: Tensor, x0: Tensor) -> None:
            bar.update()
            if self.options.callback is not None:
                self.options.callback(step, timestep, x, x0)

        extra = {} if self.options.eta is None else {"eta": self.options.eta}
        return self.sampler(denoise, x, schedule, self.levels, generators, after_step, **extra)


def check_request(
    prompt: str | Sequence[str] | None,
    options: dict[str, Any],
    defaults: GenerationDefaults,
    schedule: NoiseSchedule,
    text_encoder: AnyTextEncoder,
) -> Request:
    """The request of a prompt and keyword options; ValueError, naming the option, for impossible values."""
    names = [field.name for field in fields(Options)]
    unknown = [name for name in options if name not in names]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}, must be one of {', '.join(names)}")
    chosen = Options(**options)
    for name in ("num_inference_steps", "num_images_per_prompt", "clip_skip", "batch_size", "tile"):
        integer(name, getattr(chosen, name))
    for name in ("num_images_per_prompt", "clip_skip", "progress", "prompt_weights"):
        if getattr(chosen, name) is None:
            raise ValueError(f"{name} is None, must be given or left out")
    for name in ("guidance_scale", "guidance_rescale", "eta"):
        number(name, getattr(chosen, name))
    prompts = _prompts(prompt, chosen, text_encoder.hidden_size)
    sampler = get_sampler(or_default(chosen.sampler, defaults.sampler))
    # The folder's default sigmas belong to its default sampler.
    sigmas = or_default(chosen.sigmas, defaults.sigmas if sampler.name == defaults.sampler else "schedule")
    if chosen.eta is not None and (sampler.name != "ddim" or not 0 <= chosen.eta <= 1):
        raise ValueError(f"eta is {chosen.eta} with {sampler.name}, must be in 0 .. 1, and only ddim has it")
    check_parts(chosen.batch_size, chosen.tile)
    if not 0 <= chosen.clip_skip <= text_encoder.max_clip_skip:
        raise ValueError(f"clip_skip is {chosen.clip_skip}, must be in 0 .. {text_encoder.max_clip_skip}")
    return Request(
        prompts=prompts,
        negatives=_negatives(chosen, len(prompts), text_encoder.hidden_size),
        seeds=_seeds(chosen.seed, len(prompts)),
        guidance=Guidance(
            or_default(chosen.guidance_scale, defaults.guidance_scale),
            or_default(chosen.guidance_rescale, defaults.guidance_rescale),
            chosen.guidance_interval,
        ),
        sampler=sampler,
        levels=sampler.levels(schedule, or_default(chosen.num_inference_steps, defaults.num_inference_steps), sigmas),
        options=chosen,
    )


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless they are finite numbers of a floating type and of that shape."""
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents are of type {type(latents).__name__}, must be a tensor")
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents are {list(latents.shape)}, must be {list(shape)}")
    if not latents.is_floating_point() or not latents.isfinite().all():
        raise ValueError(f"latents of type {latents.dtype} must be finite numbers of a floating type: unit noise")


def integer(name: str, value: Any) -> Any:
    """`value`, if it is an integer of any kind or None; else ValueError."""
    if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
        raise ValueError(f"{name} is {shortened(value)}, must be an integer")
    return value


def number(name: str, value: Any) -> Any:
    """`value`, if it is a number of any kind or None; else ValueError."""
    if value is not None and (isinstance(value, bool | str) or not hasattr(value, "__float__")):
        raise ValueError(f"{name} is {shortened(value)}, must be a number")
    return value


def images_of(name: str, value: Image.Image | Sequence[Image.Image], request: Request) -> list[Image.Image]:
    """One given image per image to generate; ValueError for another number of them or other than PIL images."""
    images: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise ValueError(f"{name} {i} is of type {type(image).__name__}, must be a PIL image")
    many = request.options.num_images_per_prompt
    if len(images) == 1:
        return images * request.count
    if len(images) * many != request.count:
        raise ValueError(f"{name} has {len(images)} images, but there are {request.count // many} prompts")
    return [image for image in images for _ in range(many)]


def upright(
    images: Sequence[Image.Image], height: int | None, width: int | None
) -> tuple[list[Image.Image], tuple[int, int]]:
    """The images normalized, and the size (width, height) to crop them to: the given one or their own.

    Raises ValueError if their own sizes differ.
    """
    turned = [normalized(image) for image in images]
    sizes = {(or_default(width, image.width), or_default(height, image.height)) for image in turned}
    if len(sizes) > 1:
        raise ValueError("the images have several sizes, must be one: give height and width to crop them to")
    return turned, sizes.pop()


def suitable_size(size: tuple[int, int], trained: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The size (width, height) for an image of a size: the same, or with a warning one that suits the network.

    trained: size (width, height) of the training images. multiple: of which a side must be a multiple.
    """
    width, height = size
    if not (width % multiple or height % multiple or _is_far_larger(size, trained)):
        return size
    scale = math.sqrt(math.prod(trained)) / math.sqrt(width * height)
    new = [max(1, round(side * scale / multiple)) * multiple for side in size]
    warnings.warn(
        f"the image is {width}x{height}, the model was trained on {trained[0]}x{trained[1]}: it is scaled to "
        f"{new[0]}x{new[1]}; give height and width, multiples of {multiple}, for another size",
        stacklevel=4,
    )
    return new[0], new[1]


def warn_of_far_larger(size: tuple[int, int], trained: tuple[int, int]) -> None:
    """Warn where sampling would take long and show things several times: the network never saw as much at once."""
    if _is_far_larger(size, trained):
        warnings.warn(
            f"the image is {size[0]}x{size[1]}, the model was trained on {trained[0]}x{trained[1]}: repainting takes "
            "long and may repeat things; scale image and mask down first",
            stacklevel=3,
        )


def _is_far_larger(size: tuple[int, int], trained: tuple[int, int]) -> bool:
    return math.prod(size) > 4 * math.prod(trained)


def mask_weights(mask: Image.Image | Sequence[Image.Image], pixels: Tensor, request: Request) -> Tensor:
    """Masks as weights [B, 1, H, W] in 0 .. 1, white is 1; ValueError for another size or one without any white.

    Transparent parts are black.
    """
    masks = [normalized(one) for one in images_of("mask", mask, request)]
    height, width = pixels.shape[2:]
    weights = []
    for i, one in enumerate(masks):
        if one.size != (width, height):
            raise ValueError(
                f"mask {i} is {one.width}x{one.height}, must be {width}x{height} (width x height) like the image"
            )
        weights.append((to_pixels(prepare(one, one.size, 1, (0, 0, 0), View())) + 1) / 2)
        if weights[-1].max() == 0:
            raise ValueError(f"mask {i} is black all over, must be white where the image should be repainted")
    return torch.stack(weights)


def or_default(value: Any, default: Any) -> Any:
    """`value`, or `default` where it is None."""
    return default if value is None else value


def _prompts(prompt: str | Sequence[str] | None, options: Options, width: int) -> list[str]:
    given, many = options.prompt_embeds, options.num_images_per_prompt
    if many < 1:
        raise ValueError(f"num_images_per_prompt is {many}, must be at least 1")
    if (prompt is None) == (given is None):
        raise ValueError("give either a prompt or prompt_embeds")
    if given is not None:
        _check_embeds("prompt_embeds", given, None, width)
        if many != 1:
            raise ValueError(f"num_images_per_prompt is {many}, but prompt_embeds have one row per image: must be 1")
        return [""] * len(given)
    prompts = _texts("prompt", prompt)
    if not prompts:
        raise ValueError("prompt is an empty list, must be a text or a list of texts")
    if len(prompts) * many > MAX_IMAGES:
        raise ValueError(
            f"{len(prompts)} prompts with num_images_per_prompt {many} are {len(prompts) * many:,} images, at most "
            f"{MAX_IMAGES:,} are made at once"
        )
    return [text for text in prompts for _ in range(many)]


def _negatives(options: Options, count: int, width: int) -> list[str]:
    negative, many = options.negative_prompt, options.num_images_per_prompt
    if options.negative_prompt_embeds is not None:
        if negative is not None:
            raise ValueError("give either a negative_prompt or negative_prompt_embeds")
        _check_embeds("negative_prompt_embeds", options.negative_prompt_embeds, count, width)
    if negative is None or isinstance(negative, str):
        return [negative or ""] * count
    negatives = _texts("negative_prompt", negative)
    if len(negatives) * many != count:
        raise ValueError(f"negative_prompt has {len(negatives)} texts, but there are {count // many} prompts")
    return [text for text in negatives for _ in range(many)]


def _check_embeds(name: str, embeds: Tensor, count: int | None, width: int) -> None:
    if not isinstance(embeds, Tensor):
        raise ValueError(f"{name} are of type {type(embeds).__name__}, must be a tensor")
    if embeds.ndim != 3 or embeds.shape[2] != width or not len(embeds) or (count or len(embeds)) != len(embeds):
        raise ValueError(f"{name} are {list(embeds.shape)}, must be [{count or 'images'}, tokens, {width}]")


def _seeds(seed: Any, count: int) -> list[int]:
    if seed is None:
        seed = secrets.randbelow(2**31)
    if isinstance(seed, str) or not (hasattr(seed, "__index__") or isinstance(seed, Iterable)):
        raise ValueError(f"seed is {shortened(seed)}, must be an integer or a list of integers")
    try:
        first = operator.index(seed)  # pyright: ignore[reportArgumentType] (TypeError is what is asked for)
        given = [first + i for i in range(count)]
    except TypeError:
        given = list(seed)
    if len(given) != count:
        raise ValueError(f"seed has {len(given)} entries, but there are {count} images to generate")
    seeds = []
    for s in given:
        if isinstance(s, bool) or not hasattr(s, "__index__") or not 0 <= operator.index(s) < 2**63:
            raise ValueError(f"seed {s!r} is not an integer in 0 .. 2**63 - 1")
        seeds.append(operator.index(s))
    return seeds


def _texts(name: str, value: Any) -> list[str]:
    """One text or several as a list; ValueError for anything else."""
    if not isinstance(value, str | Sequence):
        raise ValueError(f"{name} is {shortened(value)}, must be a text or a list of texts")
    texts = [value] if isinstance(value, str) else list(value)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name} {i} is {shortened(text)}, must be a text")
    return texts
