"""The subcommands that draw: generate, image-to-image, inpaint, interpolate, variations, grid, forward."""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from latentdiff.pipeline import LatentDiffusionPipeline, PipelineOutput
from latentdiff.commands.common import check_place, open_pipeline

# What a grid may have in its columns, and how a value of it is read.
GRID_OPTIONS: dict[str, Callable[[str], Any]] = {
    "guidance-scale": float,
    "guidance-rescale": float,
    "steps": int,
    "sampler": str,
    "sigmas": str,
    "seed": int,
}
GRID_IMAGE_SIZE = 128  # pixels, the least
STRIP_IMAGE_SIZE = 64


def add_commands(commands: Any) -> None:
    """Add the subcommands to `commands`, what argparse's add_subparsers returns."""
    parser = _add(commands, "generate", "draw images from prompts", generate)
    parser.add_argument("prompt", nargs="+", help="one or more prompts; (word:1.2) gives a word more weight")
    parser.add_argument(
        "--latents", type=Path, help='safetensors file whose tensor "latents" [images, C, h, w] is the starting noise'
    )
    _add_output(parser)
    _add_size(parser)
    _add_sampling(parser)

    parser = _add(commands, "image-to-image", "change an image after a prompt", image_to_image)
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--image", type=Path, required=True, help="image to start from")
    parser.add_argument("--strength", type=float, default=0.75, help="0 keeps the image, 1 hardly anything of it")
    _add_output(parser)
    _add_size(parser)
    _add_sampling(parser)

    parser = _add(commands, "inpaint", "repaint a part of an image", inpaint)
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--image", type=Path, required=True, help="image to repaint")
    parser.add_argument("--mask", type=Path, required=True, help="image of the same size, white where to repaint")
    parser.add_argument("--strength", type=float, default=1.0, help="how much of the old image is given up there")
    _add_output(parser)
    _add_sampling(parser)

    parser = _add(commands, "interpolate", "go from one prompt and seed to another", interpolate)
    parser.add_argument("prompt", nargs=2, help="where to start, and where to end")
    parser.add_argument("--seeds", nargs=2, type=int, default=[0, 1], metavar="SEED", help="of the two ends")
    parser.add_argument("--frames", type=int, default=8, help="images, with both ends")
    _add_output(parser, seed=False, many=False)
    _add_size(parser)
    _add_sampling(parser)

    parser = _add(commands, "variations", "draw images that resemble that of a prompt and seed", variations)
    parser.add_argument("prompt")
    parser.add_argument("--amount", type=float, default=0.3, help="0 is the image itself, 1 any other of the prompt")
    _add_output(parser)
    _add_size(parser)
    _add_sampling(parser)

    parser = _add(commands, "grid", "draw prompts with several values of an option, as a table", grid)
    parser.add_argument("prompt", nargs="+", help="a row each")
    parser.add_argument("--columns", choices=GRID_OPTIONS, default="guidance-scale", help="the option that varies")
    parser.add_argument("--values", nargs="+", metavar="VALUE", help="of the option, a column each")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="the same for all images")
    _add_size(parser)
    _add_sampling(parser)

    parser = _add(commands, "forward", "show an image with more and more noise, as in training", forward)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--timesteps", nargs="+", type=int, help="(default: eight, evenly)")
    parser.add_argument("--out", type=Path, default=Path("forward.png"), help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    _add_size(parser)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def _add(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("model", help="pipeline folder, or a model id of the hub")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.set_defaults(run_command=run)
    return parser


def _add_output(parser: argparse.ArgumentParser, *, seed: bool = True, many: bool = True) -> None:
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="PNG to write; out-0.png, ... for several")
    shown = "a frame a step" if seed else "the images as its frames"
    parser.add_argument("--animation", type=Path, help=f"also write a .gif or .mp4 (needs PyAV): {shown}")
    if seed:
        parser.add_argument(
            "--animate",
            choices=["estimate", "noisy"],
            help="what a frame of --animation shows: the estimate of the final image (the default), or the image "
            "as noisy as it is",
        )
        parser.add_argument("--seed", type=int, help="of the first image, the next ones count up (default: random)")
    if many:
        parser.add_argument("--num-images", type=int, default=1, help="images of each prompt")


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, help="pixels (default: the trained size, or that of the image)")
    parser.add_argument("--width", type=int, help="pixels (default: the trained size, or that of the image)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative-prompt", help="what to keep away from")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's own)")
    parser.add_argument("--guidance-scale", type=float, help="1 is no guidance (default: the model's own)")
    parser.add_argument("--guidance-rescale", type=float, help="0 .. 1, against overexposure")
    parser.add_argument(
        "--guidance-interval", nargs=2, type=float, metavar=("LOW", "HIGH"), help="of sigma / alpha; none outside"
    )
    parser.add_argument(
        "--sampler",
        help="ddpm, ddim, pndm, euler, euler_ancestral, heun, dpm2, dpm2_ancestral, lms, deis, dpm++2m, dpm++2m_sde, "
        "dpm++3m_sde, dpm++2s or unipc (default: the model's own)",
    )
    parser.add_argument("--sigmas", help="schedule, karras, exponential or beta (default: the model's own)")
    parser.add_argument("--eta", type=float, help="fresh noise of ddim, 0 .. 1")
    parser.add_argument("--clip-skip", type=int, default=0, help="last layers of the text encoder to leave out")
    parser.add_argument("--batch-size", type=int, help="images drawn at once (default: all)")
    parser.add_argument("--tile", type=int, help="decode in tiles of so many latent pixels, against a lack of memory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the UNet first: minutes, then faster")
    parser.add_argument("--no-progress", action="store_true")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's keyword options."""
    interval = arguments.guidance_interval
    return {
        "negative_prompt": arguments.negative_prompt,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "guidance_rescale": arguments.guidance_rescale,
        "guidance_interval": None if interval is None else tuple(interval),
        "sampler": arguments.sampler,
        "sigmas": arguments.sigmas,
        "eta": arguments.eta,
        "clip_skip": arguments.clip_skip,
        "batch_size": arguments.batch_size,
        "tile": arguments.tile,
        "progress": not arguments.no_progress,
    }


def _size(arguments: argparse.Namespace) -> dict[str, int | None]:
    return {"height": arguments.height, "width": arguments.width}


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path} must end in .png")
    check_place("--out", path)


def _check_files(arguments: argparse.Namespace) -> None:
    _check_png(arguments.out)
    if arguments.animation is None and getattr(arguments, "animate", None) is not None:
        raise ValueError(f"--animate {arguments.animate} says what --animation shows, which is missing")
    if arguments.animation is not None and arguments.animation.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"--animation {arguments.animation} must end in .gif or .mp4")
    if arguments.animation is not None:
        check_place("--animation", arguments.animation)
        if arguments.animation.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
            raise ValueError(f'--animation {arguments.animation} needs PyAV: pip install "latentdiff[video]"')


def _read_image(option: str, path: Path) -> "Image.Image":
    from PIL import UnidentifiedImageError

    from latentdiff.images import decode

    try:
        return decode({"bytes": None, "path": str(path)})
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{option} {path} is not a readable image: {error}") from None


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


def _open(arguments: argparse.Namespace) -> "LatentDiffusionPipeline":
    pipeline = open_pipeline(arguments.model, arguments.device, arguments.dtype)
    return pipeline.compile() if arguments.compile else pipeline


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def generate(arguments: argparse.Namespace) -> None:
    """Draw the prompts and write the images."""
    _check_files(arguments)
    latents = None if arguments.latents is None else _read_latents(arguments.latents)
    pipeline = _open(arguments)
    given = _size(arguments) | {"latents": latents}
    # Seeds do not repeat images that start from other noise.
    _draw(
        arguments,
        pipeline,
        lambda **options: pipeline(arguments.prompt, **given, **options),
        tell_seeds=latents is None,
    )


def image_to_image(arguments: argparse.Namespace) -> None:
    """Draw the prompts from an image and write what comes out."""
    _check_files(arguments)
    image = _read_image("--image", arguments.image)
    pipeline = _open(arguments)
    _draw(
        arguments,
        pipeline,
        lambda **options: pipeline.image_to_image(
            arguments.prompt, image, arguments.strength, **_size(arguments), **options
        ),
    )


def inpaint(arguments: argparse.Namespace) -> None:
    """Repaint the white part of the mask and write the images."""
    _check_files(arguments)
    image, mask = _read_image("--image", arguments.image), _read_image("--mask", arguments.mask)
    pipeline = _open(arguments)
    _draw(
        arguments,
        pipeline,
        lambda **options: pipeline.inpaint(arguments.prompt, image, mask, arguments.strength, **options),
    )


def interpolate(arguments: argparse.Namespace) -> None:
    """Draw the way from one prompt and seed to another; the animation has the images as frames."""
    _check_files(arguments)
    pipeline = _open(arguments)
    output = pipeline.interpolate(
        tuple(arguments.prompt), tuple(arguments.seeds), arguments.frames, **_size(arguments), **_options(arguments)
    )
    _write(output.images, arguments.out)
    if arguments.animation is not None:
        _write_animation(output.images, arguments.animation)


def variations(arguments: argparse.Namespace) -> None:
    """Draw images near that of a prompt and seed."""
    _check_files(arguments)
    if arguments.seed is None:
        raise ValueError("--seed is missing: of the image to vary, which `latentdiff generate` tells")
    pipeline = _open(arguments)

    def draw(seed: int, num_images_per_prompt: int, **options: Any) -> "PipelineOutput":
        return pipeline.variations(
            arguments.prompt, seed, num_images_per_prompt, arguments.amount, **_size(arguments), **options
        )

    _draw(arguments, pipeline, draw, tell_seeds=False)


def grid(arguments: argparse.Namespace) -> None:
    """Draw each prompt with each value of one option and write the table."""
    _check_png(arguments.out)
    if not arguments.values:
        raise ValueError(f"--values is missing: the values of {arguments.columns}, a column each")
    option = arguments.columns.replace("-", "_")
    try:
        values = [GRID_OPTIONS[arguments.columns](value) for value in arguments.values]
    except ValueError as error:
        raise ValueError(f"--values of {arguments.columns}: {error}") from None
    from latentdiff.figures.grids import labelled_grid
    from latentdiff.formats.files import write_png

    pipeline = _open(arguments)
    cells = []
    for value in values:
        cells.append(_size(arguments) | _options(arguments) | {"seed": [arguments.seed] * len(arguments.prompt)})
        if option == "seed":
            cells[-1]["seed"] = [value] * len(arguments.prompt)
        else:
            cells[-1]["num_inference_steps" if option == "steps" else option] = value
        pipeline.check(arguments.prompt, **cells[-1])
    columns = [_enlarged(pipeline(arguments.prompt, **options).images, GRID_IMAGE_SIZE) for options in cells]
    rows = [list(row) for row in zip(*columns, strict=True)]
    labels = [f"{arguments.columns} {value}" for value in values]
    write_png(labelled_grid(rows, arguments.prompt, labels), arguments.out)
    print(f"{arguments.out} (seed {arguments.seed})" if option != "seed" else arguments.out)


def forward(arguments: argparse.Namespace) -> None:
    """Write a strip of an image's noisy latents, decoded, at growing timesteps."""
    _check_png(arguments.out)
    image = _read_image("--image", arguments.image)
    import torch

    from latentdiff.figures.grids import labelled_grid
    from latentdiff.formats.files import write_png
    from latentdiff.pipeline.preview import forward_strip

    pipeline = open_pipeline(arguments.model, arguments.device)
    total = pipeline.schedule.num_train_timesteps
    timesteps = arguments.timesteps or torch.linspace(0, total - 1, 8).round().long().tolist()
    for t in timesteps:
        if not 0 <= t < total:
            raise ValueError(f"--timesteps has {t}, must be in 0 .. {total - 1}")
    (latents,) = pipeline.encode([image], **_size(arguments)).cpu()
    strip = forward_strip(pipeline.schedule, latents, timesteps, torch.Generator().manual_seed(arguments.seed))
    images = _enlarged(pipeline.decode(strip.to(pipeline.device), batch_size=1), STRIP_IMAGE_SIZE)
    write_png(labelled_grid([images], [""], [f"t = {t}" for t in timesteps]), arguments.out)
    print(arguments.out)


# ----------------------------------------------------------------------------------------------------------------------
# Output


def _draw(
    arguments: argparse.Namespace,
    pipeline: "LatentDiffusionPipeline",
    draw: Callable[..., "PipelineOutput"],
    *,
    tell_seeds: bool = True,
) -> None:
    """Draw, then write the images and, if it is wanted, the animation: nothing is written before all is drawn."""
    seen: list[Tensor] = []
    watch = None
    if arguments.animation is not None:
        if arguments.batch_size is not None:
            raise ValueError("--animation shows all images at once: leave out --batch-size")
        noisy = arguments.animate == "noisy"
        watch = lambda step, timestep, latents, x0: seen.append((latents if noisy else x0).cpu())  # noqa: E731
    options = _options(arguments) | {"callback": watch}
    output = draw(seed=arguments.seed, num_images_per_prompt=arguments.num_images, **options)
    _write(output.images, arguments.out, output.seeds if tell_seeds else None)
    if arguments.animation is not None:
        from latentdiff.figures.grids import image_grid

        frames = [image_grid(pipeline.decode(x.to(pipeline.device), tile=arguments.tile)) for x in seen]
        # The last one as it was written: repainting keeps pixels outside the mask.
        _write_animation([*frames[:-1], image_grid(output.images)], arguments.animation)


def _enlarged(images: Sequence["Image.Image"], side: int) -> list["Image.Image"]:
    """Small images a whole number of times as large, so that no side is below `side`: labels need room."""
    from PIL import ImageOps

    return [ImageOps.scale(image, ceil(side / min(image.size))) for image in images]


def _write(images: Sequence["Image.Image"], out: Path, seeds: Sequence[int] | None = None) -> None:
    """Write the images, and tell the seeds that repeat them."""
    from latentdiff.formats.files import write_png

    for i, image in enumerate(images):
        path = out if len(images) == 1 else out.with_name(f"{out.stem}-{i}{out.suffix}")
        write_png(image, path)
        print(path if seeds is None else f"{path} (seed {seeds[i]})")


def _write_animation(frames: Sequence["Image.Image"], path: Path) -> None:
    from latentdiff.figures.animation import write_animation

    write_animation(frames, path)
    print(path)
