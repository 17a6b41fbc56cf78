"""What the commands that generate images share: options, reading images, writing images and animations."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentdiff.commands.common import DeviceOption, NoProgress, check_writable, open_pipeline

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from latentdiff.pipeline import LatentDiffusionPipeline, PipelineOutput

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Pipeline folder, single file (.safetensors), or model id on the hub.")
]
Prompts = Annotated[
    list[str], typer.Argument(metavar="PROMPT", help="One or more prompts; (word:1.2) gives a word more weight.")
]
Out = Annotated[Path, typer.Option(help="PNG to write; out-2.png, ... if there is one.")]
OutOfSeveral = Annotated[
    Path,
    typer.Option(help="PNG to write; out-0.png, ... for several; out-2.png or out-2-0.png, ... if there are some."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there, instead of numbering.")]
Animation = Annotated[
    Path | None, typer.Option(help="Also write a .gif or .mp4 (needs PyAV) with one frame per sampling step.")
]
ANIMATION_SUFFIXES = (".gif", ".mp4")


@dataclass(frozen=True)
class Output:
    """What is written, how many images of each prompt, and with which seeds."""

    out: OutOfSeveral = Path("out.png")
    animation: Animation = None
    animate: Annotated[
        Literal["estimate", "noisy"] | None,
        typer.Option(
            help="What a frame of --animation shows: the estimate of the final image (the default), or the noisy image."
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first image, the next ones count up (default: random).")
    ] = None
    num_images_per_prompt: Annotated[int, typer.Option(help="Images of each prompt.")] = 1
    overwrite: Overwrite = False

    def check(self) -> None:
        """Raise ValueError if a file cannot be written, or --animate has no --animation."""
        if self.animation is None and self.animate is not None:
            raise ValueError(f"--animate {self.animate} needs --animation FILE")
        check_png(self.out)
        check_animation(self.animation)


@dataclass(frozen=True)
class Size:
    """Size of the images."""

    height: Annotated[int | None, typer.Option(help="Pixels (default: the trained size, or that of the image).")] = None
    width: Annotated[int | None, typer.Option(help="Pixels (default: the trained size, or that of the image).")] = None

    def options(self) -> dict[str, int | None]:
        """The pipeline's keyword arguments."""
        return {"height": self.height, "width": self.width}


@dataclass(frozen=True)
class Sampling:
    """How images are sampled, and on what."""

    negative_prompt: Annotated[str | None, typer.Option(help="What the images should not show.")] = None
    num_inference_steps: Annotated[int | None, typer.Option(help="Sampling steps (default: the model's own).")] = None
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance (default: the model's own).")] = None
    guidance_rescale: Annotated[float | None, typer.Option(help="0 .. 1, against overexposure.")] = None
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Range of sigma / alpha with guidance; none outside."),
    ] = None
    sampler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++2m, ...: see docs/sampling.md (default: the model's own).")
    ] = None
    sigmas: Annotated[
        str | None, typer.Option(help="schedule, karras, exponential or beta (default: the model's own).")
    ] = None
    eta: Annotated[float | None, typer.Option(help="New noise per step of ddim, 0 .. 1.")] = None
    clip_skip: Annotated[int, typer.Option(help="Last layers of the text encoder to leave out.")] = 0
    batch_size: Annotated[int | None, typer.Option(help="Images sampled at once (default: all).")] = None
    tile: Annotated[int | None, typer.Option(help="Decode in tiles of this size in latent pixels, to save memory.")] = (
        None
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type to compute in; auto: float32, large decoders in bfloat16 where it costs no quality."),
    ] = "auto"
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction"] | None,
        typer.Option(help="Of a single file that doesn't say it (default: of SD 1 epsilon, of SD 2 v_prediction)."),
    ] = None
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA to add: .safetensors files, folders or hub ids, one or several.")
    ] = None
    lora_scale: Annotated[
        list[float] | None, typer.Option(help="How strongly each --lora acts, 1 as trained (default: 1).")
    ] = None
    device: DeviceOption = None
    compile: Annotated[
        Literal["off", "blocks", "step"],
        typer.Option(help="Compile first: the blocks (seconds), or the whole UNet (minutes, fastest on GPUs)."),
    ] = "off"
    no_progress: NoProgress = False

    def options(self) -> dict[str, Any]:
        """The pipeline's keyword arguments."""
        return {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "guidance_interval": self.guidance_interval,
            "sampler": self.sampler,
            "sigmas": self.sigmas,
            "eta": self.eta,
            "clip_skip": self.clip_skip,
            "batch_size": self.batch_size,
            "tile": self.tile,
            "progress": not self.no_progress,
        }

    def open(self, model: str) -> "LatentDiffusionPipeline":
        """The pipeline with its LoRAs, compiled if that is asked for."""
        names, scales = self.lora or [], self.lora_scale or [1.0] * len(self.lora or [])
        if len(scales) != len(names):
            raise ValueError(f"--lora-scale has {len(scales)} numbers for {len(names)} --lora: give one for each")
        pipeline = open_pipeline(model, self.device, self.dtype, self.prediction_type)
        for name, scale in zip(names, scales, strict=True):
            pipeline.load_lora_weights(name, scale=scale)
        return pipeline.compile(self.compile)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def check_png(path: Path) -> None:
    """Raise ValueError unless --out is a .png that can be written."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path} must end in .png")
    check_writable("--out", path)


def check_animation(path: Path | None) -> None:
    """Raise ValueError if --animation is given and cannot be written."""
    if path is None:
        return
    if path.suffix.lower() not in ANIMATION_SUFFIXES:
        raise ValueError(f"--animation {path} must end in {' or '.join(ANIMATION_SUFFIXES)}")
    check_writable("--animation", path)
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        raise ValueError(f'--animation {path} needs PyAV: pip install "latentdiff[video]"')


def read_image(option: str, path: Path) -> "Image.Image":
    """The image in a file; ValueError if it is missing or not an image."""
    from PIL import UnidentifiedImageError

    from latentdiff.images import decode

    try:
        return decode({"bytes": None, "path": str(path)})
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{option} {path} is not a readable image: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Generating and writing


def generate_and_write(
    generate: Callable[..., "PipelineOutput"],
    pipeline: "LatentDiffusionPipeline",
    output: Output,
    sampling: Sampling,
    *,
    print_seeds: bool = True,
) -> None:
    """Call `generate` with the options, then write its images and the animation; nothing is written before it returns.

    generate(seed=, num_images_per_prompt=, callback=, ...): a method of the pipeline with its other arguments bound.
    """
    latents: list[Tensor] = []
    callback = None
    if output.animation is not None:
        if sampling.batch_size is not None:
            raise ValueError("--animation shows all images at once: leave out --batch-size")

        def record(step: int, timestep: float, noisy: "Tensor", x0: "Tensor") -> None:
            latents.append((noisy if output.animate == "noisy" else x0).cpu())

        callback = record

    options = sampling.options() | {"callback": callback}
    result = generate(seed=output.seed, num_images_per_prompt=output.num_images_per_prompt, **options)
    write_images(result.images, output.out, output.overwrite, result.seeds if print_seeds else None)
    if output.animation is not None:
        from latentdiff.figures.grids import image_grid

        frames = [image_grid(pipeline.decode(x.to(pipeline.device), tile=sampling.tile)) for x in latents]
        # The last frame is the written images: inpainting keeps the pixels outside the mask.
        write_animation([*frames[:-1], image_grid(result.images)], output.animation, output.overwrite)


def enlarged(images: Sequence["Image.Image"], side: int) -> list["Image.Image"]:
    """Images scaled by a whole factor so that no side is below `side` pixels: labels need room."""
    from PIL import ImageOps

    return [ImageOps.scale(image, ceil(side / min(image.size))) for image in images]


def write_images(
    images: Sequence["Image.Image"], out: Path, overwrite: bool, seeds: Sequence[int] | None = None
) -> None:
    """Write the images and print their paths, and the seeds that repeat them.

    Images that are written together have one number: out-2-0.png, out-2-1.png, ... where any of out-0.png, out-1.png,
    ... is there. overwrite: replace these instead.
    """
    from latentdiff.formats.files import save_png, write_new, write_png

    def name(base: Path, i: int) -> Path:
        return base if len(images) == 1 else base.with_name(f"{base.stem}-{i}{base.suffix}")

    bases: dict[Path, Path] = {}  # by the name of the first image

    def first_names() -> Iterator[Path]:
        for base in numbered(out):
            if not any(os.path.lexists(name(base, i)) for i in range(len(images))):
                bases[name(base, 0)] = base
                yield name(base, 0)

    base = out
    for i, image in enumerate(images):
        if overwrite:
            path = name(out, i)
            write_png(image, path)
        elif i == 0:
            path = write_new(first_names(), partial(save_png, image))
            base = bases[path]
        else:  # someone may have taken this name since
            path = write_new(numbered(name(base, i)), partial(save_png, image))
        print(path if seeds is None else f"{path} (seed {seeds[i]})")


def write_animation(frames: Sequence["Image.Image"], path: Path, overwrite: bool) -> None:
    """Write frames as .gif or .mp4, by the suffix of `path`, atomically, and print the path, numbered as images are."""
    from latentdiff.figures.animation import write_gif, write_mp4
    from latentdiff.formats.files import replacing, write_new

    write = partial(write_gif if path.suffix.lower() == ".gif" else write_mp4, frames)
    if overwrite:
        with replacing(path) as temporary:
            write(temporary)
        print(path)
    else:
        print(write_new(numbered(path), write))


def numbered(path: Path) -> Iterator[Path]:
    """out.png, out-2.png, out-3.png, ..."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
