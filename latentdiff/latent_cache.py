"""Posterior moments of all training pictures, so that stage 2 does not encode the same pictures every epoch."""

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from latentdiff.data import CaptionedPictures, Key
from latentdiff.models.autoencoder import AutoencoderKL


class LatentCache(Dataset):
    """Moments [N, F, 2C, h, w] in memory: F = 1, or 2 where pictures are also seen flipped.

    It stores the posterior's moments, not a draw from it, so each epoch draws latents afresh.
    """

    def __init__(self, pictures: CaptionedPictures, moments: Tensor) -> None:
        assert len(pictures) == len(moments)
        self.pictures = pictures
        self.moments = moments

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, key: Key) -> dict[str, Tensor | Key]:
        flipped = self.pictures.view(key["index"], key["epoch"]).flip
        return {"moments": self.moments[key["index"], int(flipped)], "key": key}

    @classmethod
    @torch.no_grad()
    def encode(cls, vae: AutoencoderKL, pictures: CaptionedPictures, batch_size: int, progress: bool) -> "LatentCache":
        """Encode every picture once, on the device of `vae`. ValueError for random crops: each is another picture."""
        if pictures.config.crop != "center":
            raise ValueError("data.crop random cannot be cached; set train.cache_latents=false or data.crop=center")
        parts = []
        bar = tqdm(total=len(pictures), desc="encode", unit="picture", disable=not progress, leave=False)
        for indices, pixels in pictures.batches(batch_size):
            views = [pixels, pixels.flip(3)] if pictures.config.flip else [pixels]
            parts.append(torch.stack([vae.encode(view.to(vae.device)).float().cpu() for view in views], dim=1))
            bar.update(len(indices))
        bar.close()
        moments = torch.cat(parts)
        if not moments.isfinite().all():
            raise ValueError("the autoencoder gave latents that are not finite; its folder is not usable")
        return cls(pictures, moments)


@torch.no_grad()
def encode_means(vae: AutoencoderKL, pictures: CaptionedPictures, batch_size: int) -> Tensor:
    """The posterior means of all pictures as unit-scale latents [N, C, h, w], on the device of `vae`."""
    parts = [vae.sample(vae.encode(pixels.to(vae.device))) for _, pixels in pictures.batches(batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, device=vae.device)
