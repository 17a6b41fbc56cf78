"""`latentdiff forward-process`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.commands.common import DeviceOption, open_pipeline, with_option_groups
from latentdiff.commands.sampling import Model, Out, Overwrite, Size, check_png, enlarged, read_image, write_images

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentdiff.models.pixel_space import Autoencoder

MIN_IMAGE_SIZE = 64  # pixels


@with_option_groups
def forward_process(
    model: Model,
    size: Size,
    image: Annotated[
        Path | None, typer.Option(help="Image to add noise to (default: the first one that the model was trained on).")
    ] = None,
    timesteps: Annotated[
        list[int] | None, typer.Option(metavar="T...", help="Timesteps (default: eight, evenly spaced).")
    ] = None,
    out: Out = Path("forward.png"),
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: DeviceOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Show an image with more and more noise, as the UNet sees it in training."""
    check_png(out)
    given = None if image is None else read_image("--image", image)
    import torch

    from latentdiff.figures.grids import labelled_grid
    from latentdiff.pipeline.preview import forward_strip

    pipeline = open_pipeline(model, device)
    start = given or _first_training_image(model, pipeline.vae)
    total = pipeline.schedule.num_train_timesteps
    chosen: list[int] = timesteps or torch.linspace(0, total - 1, 8).round().long().tolist()
    for t in chosen:
        if not 0 <= t < total:
            raise ValueError(f"--timesteps has {t}, must be in 0 .. {total - 1}")
    (latents,) = pipeline.encode([start], **size.options()).cpu()
    strip = forward_strip(pipeline.schedule, latents, chosen, torch.Generator().manual_seed(seed))
    images = enlarged(pipeline.decode(strip.to(pipeline.device), batch_size=1), MIN_IMAGE_SIZE)
    write_images([labelled_grid([images], [""], [f"t = {t}" for t in chosen])], out, overwrite)


def _first_training_image(model: str, vae: "Autoencoder") -> "Image":
    """As the model sees it; ValueError if the folder does not say what it was trained on, or that is not there."""
    from latentdiff.config import UNetTrainingConfig, load_config
    from latentdiff.data.captioned_images import open_run_images
    from latentdiff.images import to_images

    path = Path(model) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"--image is needed: {model} has no config.yaml that names its training images")
    config = load_config(UNetTrainingConfig, path)
    images, _ = open_run_images(config, vae.config, progress=False)
    return to_images(images.pixels(0)[None])[0]
