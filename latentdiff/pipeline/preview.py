"""Coarse, cheap images of latents: a linear map to colours; and the forward process as a strip."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.formats.diffusers_folder import PREVIEW_FILE
from latentdiff.formats.files import read_json, write_json
from latentdiff.images import to_images
from latentdiff.models.eval_mode import eval_mode

if TYPE_CHECKING:
    from latentdiff.models.pixel_space import Autoencoder
    from latentdiff.pipeline.pipeline import LatentDiffusionPipeline


# ----------------------------------------------------------------------------------------------------------------------
# The forward process


def forward_strip(
    schedule: NoiseSchedule, clean: Tensor, timesteps: Sequence[int], generator: torch.Generator
) -> Tensor:
    """One image at growing noise levels: `clean` latents or pixels [C, h, w] -> [len(timesteps), C, h, w].

    All have the same noise (Ho et al. 2020, eq. 4), from `generator` on its device.
    timesteps: each 0 .. T-1. Raises ValueError for others, or for none.
    """
    last = schedule.num_train_timesteps - 1
    if not timesteps:
        raise ValueError("timesteps is empty, must name at least one")
    for timestep in timesteps:
        if not 0 <= timestep <= last:
            raise ValueError(f"timestep {timestep} is not one of the schedule's 0 .. {last}")
    noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(clean)
    shape = (len(timesteps), *clean.shape)
    return schedule.add_noise(
        clean.expand(shape), noise.expand(shape), torch.tensor(timesteps, device=clean.device, dtype=torch.int64)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Previews of latents


@dataclass(frozen=True, eq=False)
class LatentPreview:
    """Colours directly from latents by one linear map: far cheaper than decoding, and coarser.

    weights [3, C] and bias [3], float32: pixels in [-1, 1] = weights @ latents + bias.
    factor: pixels per latent pixel, along a side. r_squared: fraction of the variance of the downscaled pixels that it
        explains.
    """

    weights: Tensor
    bias: Tensor
    factor: int
    r_squared: float

    @classmethod
    def fit(cls, latents: Tensor, pixels: Tensor) -> Self:
        """Least squares from unit-scale latents [N, C, h, w] to pixels [N, 3, H, W], averaged to h x w, in float64.

        Raises ValueError if the shapes do not fit, or all pixels have one colour.
        """
        factor = _factor(latents, pixels)
        x = latents.detach().cpu().double().movedim(1, -1).flatten(0, 2)  # [N * h * w, C]
        y = F.avg_pool2d(pixels.detach().cpu().double(), factor).movedim(1, -1).flatten(0, 2)
        total = (y - y.mean(dim=0)).square().sum()
        if total == 0:
            raise ValueError("all pixels have one colour, from which no preview can be fitted")
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        solution = torch.linalg.lstsq(torch.cat([x, ones], dim=1), y, driver="gelsd").solution  # [C + 1, 3]
        residual = (x @ solution[:-1] + solution[-1] - y).square().sum()
        return cls(solution[:-1].T.float().contiguous(), solution[-1].float(), factor, 1 - (residual / total).item())

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Unit-scale latents [B, C, h, w] -> B images of f * h x f * w, smoothly enlarged.

        Raises ValueError for latents of another number of channels.
        """
        if latents.shape[1] != self.weights.shape[1]:
            raise ValueError(f"latents have {latents.shape[1]} channels, the preview takes {self.weights.shape[1]}")
        weights, bias = self.weights.to(latents.device), self.bias.to(latents.device)
        colours = F.conv2d(latents.detach().float(), weights[:, :, None, None], bias)  # [B, 3, h, w]
        return to_images(F.interpolate(colours, scale_factor=self.factor, mode="bilinear", align_corners=False))

    def save(self, folder: Path) -> None:
        """Write `latent_preview.json` into `folder`, atomically."""
        values = {
            "weights": self.weights.tolist(),
            "bias": self.bias.tolist(),
            "factor": self.factor,
            "r_squared": self.r_squared,
        }
        write_json(values, Path(folder) / PREVIEW_FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `latent_preview.json`; ValueError if it is missing, or not as `save` writes it."""
        path = Path(folder) / PREVIEW_FILE
        values = read_json(path)
        try:
            weights = torch.tensor(values["weights"], dtype=torch.float32)
            bias = torch.tensor(values["bias"], dtype=torch.float32)
            factor, r_squared = int(values["factor"]), float(values["r_squared"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a latent preview ({type(error).__name__}: {error})") from None
        fits = weights.ndim == 2 and len(weights) == 3 and bias.shape == (3,)
        if not fits or factor < 1 or not (weights.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"{path} must hold finite weights [3, C], a bias [3] and a factor of at least 1")
        return cls(weights, bias, factor, r_squared)


def _factor(latents: Tensor, pixels: Tensor) -> int:
    """Pixels per latent pixel, along a side; ValueError if the two do not belong together."""
    count, height, width = latents.shape[0], *latents.shape[2:]
    factor = pixels.shape[2] // height
    if factor < 1 or pixels.shape != (count, 3, factor * height, factor * width):
        raise ValueError(
            f"pixels {list(pixels.shape)} do not fit latents {list(latents.shape)}: they must be [{count}, 3, "
            f"f * {height}, f * {width}]"
        )
    return factor


def fit_preview(vae: "Autoencoder", batches: Iterable[Tensor]) -> LatentPreview:
    """The preview of an autoencoder's latents (posterior means), fitted to batches of pixels [b, 3, H, W] in [-1, 1].

    A few dozen images are enough: every latent pixel is an equation for the C + 1 unknowns of a colour.
    Raises ValueError if there is no batch, and as `vae.encode` and `LatentPreview.fit` do.
    """
    latents, pixels = [], []
    with torch.no_grad(), eval_mode(vae):
        for batch in batches:
            latents.append(vae.sample(vae.encode(batch.to(vae.device, vae.dtype))).float().cpu())
            pixels.append(batch.float().cpu())
    if not latents:
        raise ValueError("fitting a preview needs at least one batch of images")
    return LatentPreview.fit(torch.cat(latents), torch.cat(pixels))


def latent_preview(pipeline: "LatentDiffusionPipeline") -> LatentPreview:
    """A linear map from latents to colours, with which a callback can show x0; fitted to the pipeline's autoencoder.

    The folder's own if `latentdiff evaluate-vae` has written one, else one fitted to 16 images of the embedded set, and
    kept; their side is the trained size's shorter one, at most 256 pixels. Raises ValueError if the autoencoder does
    not take RGB.
    """
    from latentdiff.config import EMBEDDED, DataConfig
    from latentdiff.data.captioned_images import open_images  # imports `datasets`

    if pipeline.preview is not None:
        return pipeline.preview
    channels = pipeline.vae.config.in_channels
    if channels != 3:
        raise ValueError(f"a preview needs an autoencoder of RGB images, this one has {channels} channels")
    size = min(min(pipeline.latent_shape(None, None)[1:]) * pipeline.vae.config.downsampling, 256)
    images, _ = open_images(DataConfig(source=EMBEDDED, size=size, holdout=0), 3, seed=0, progress=False)
    pipeline.preview = fit_preview(pipeline.vae, [pixels for _, pixels in images.some(16).batches(4)])
    return pipeline.preview
