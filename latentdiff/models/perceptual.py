"""Perceptual terms of stage 1's loss, which compare more than the values of single pixels; and MS-SSIM as a metric.

| name    | class  | compares                                                                           |
|---------|--------|------------------------------------------------------------------------------------|
| lpips   | LPIPS  | features of VGG16, weighted to agree with human judgements (needs VGG16's weights) |
| ms_ssim | MSSSIM | local mean, contrast and structure, at one to five scales                          |
"""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from latentdiff.formats.files import load_strictly, read_safetensors

# torchvision's ImageNet weights of VGG16, the ones LPIPS was fitted to, as safetensors
VGG16_HUB_ID = "timm/vgg16.tv_in1k"
_VGG16_FILES = ("vgg16.safetensors", "model.safetensors")
_ASSETS = Path(__file__).parents[1] / "assets" / "lpips"


class PerceptualLoss(nn.Module):
    """A distance of images: (reconstruction, pixels) -> [B], 0 for equal images, in float32 also under autocast.

    A subclass computes `distance`. Its gradient is finite for all images, equal ones included, and image i of a
    batch has the value it has alone. reconstruction, pixels: [B, C, H, W] in [-1, 1], C in 1 .. 4; a reconstruction may
    leave that range and is not clamped, so that it is always pulled back.
    Raises ValueError for more channels, and for images smaller than `smallest_side`.
    """

    name: str
    smallest_side: int  # height and width in pixels

    def forward(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        assert reconstruction.shape == pixels.shape, f"{list(reconstruction.shape)} compared to {list(pixels.shape)}"
        channels, height, width = pixels.shape[1:]
        if not 1 <= channels <= 4:
            raise ValueError(f"perceptual term {self.name}: images have {channels} channels, must be 1 to 4")
        if min(height, width) < self.smallest_side:
            raise ValueError(
                f"perceptual term {self.name}: images of {height}x{width} px are too small, it needs "
                f"{self.smallest_side} px"
            )
        with torch.autocast(pixels.device.type, enabled=False):
            return self.distance(reconstruction.float(), pixels.float())

    def distance(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        raise NotImplementedError


class LPIPS(PerceptualLoss):
    """Learned perceptual image patch similarity on VGG16, version 0.1 (Zhang et al. 2018, eq. 1).

    The squared distance of unit-length features, weighted per channel, mean over positions, summed over five stages.
    Its weights are frozen; gradients pass through them to the reconstruction.

    Channels: the first three are red, green and blue, if there are as many. Each further one, or each of one or two, is
    a grey image of its own; the value is the mean over these images.
    """

    name = "lpips"
    smallest_side = 16  # four poolings come before the last stage
    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and number of 3x3 convolutions
    # ImageNet's mean and standard deviation of red, green and blue, for values in [0, 1]
    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)
    EPS = 1e-8  # keeps the length of a feature, and its gradient, off 0 where no unit is active

    def __init__(self) -> None:
        super().__init__()
        # Numbered as torchvision's `vgg16().features`. (Importing that takes longer than importing torch.)
        layers: list[nn.Module] = []
        in_channels = 3
        for width, num_convs in self.STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(num_convs):
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList([torch.empty(width) for width, _ in self.STAGES])
        # ImageNet's numbers for pixels in [-1, 1]. On the CPU always: no file has them to fill a meta tensor from.
        mean, std = (torch.tensor(values, device="cpu")[:, None, None] for values in (self.MEAN, self.STD))
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", 2 * mean - 1, persistent=False)
        self.register_buffer("scale", 2 * std, persistent=False)

    @classmethod
    def load(cls, weights: str | Path | None = None) -> Self:
        """LPIPS with VGG16's weights from a safetensors file, a folder of it or a hub id; None: `timm/vgg16.tv_in1k`.

        The tensors have torchvision's names (`features.0.weight`, ...); those of the classifier are not needed. A
        folder holds vgg16.safetensors or model.safetensors. The weights of the heads come with this package.
        Raises ValueError if there is no such file, or if it does not hold VGG16.
        """
        path = _vgg16_file(str(weights or VGG16_HUB_ID))
        features = {key: value.float() for key, value in read_safetensors(path).items() if key.startswith("features.")}
        with torch.device("meta"):
            model = cls()
        load_strictly(model, features | read_safetensors(_ASSETS / "vgg16_heads.safetensors"), str(path))
        return model.eval().requires_grad_(False)

    def distance(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        stages = zip(self.heads, self._stages(reconstruction), self._stages(pixels), strict=True)
        total: Any = sum(
            ((self._unit(ours) - self._unit(theirs)).square() * head[:, None, None]).sum(dim=1).mean(dim=(1, 2))
            for head, ours, theirs in stages
        )
        return total.unflatten(0, (len(pixels), -1)).mean(dim=1)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels [..., 3, H, W] in [-1, 1] as VGG16 was trained to see them: ImageNet's mean is 0, its deviation 1."""
        return (pixels - self.shift) / self.scale

    def _stages(self, pixels: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, each [B * K, width, h, w], K images of `_as_colour`."""
        h = self.normalized(_as_colour(pixels)).flatten(0, 1)
        stages = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                stages.append(h)
            h = layer(h)
        return [*stages, h]

    def _unit(self, features: Tensor) -> Tensor:
        """Features [B, C, h, w] with length 1 along C at every position."""
        return features / (features.square().sum(dim=1, keepdim=True) + self.EPS).sqrt()


MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, from the finest scale to the coarsest
MS_SSIM_WINDOW = 11  # pixels
_SIGMA = 1.5  # of the Gaussian window, in pixels
_C1, _C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of pixels is 2


def ms_ssim_scales(side: int) -> int:
    """How many of the five scales images with a shorter side of `side` px have; 0 if they are too small for one.

    Images have 11 px at the coarsest scale: one scale from 11 px, two from 22 px, three from 44 px, five from 176 px.
    """
    return sum(side // 2**scale >= MS_SSIM_WINDOW for scale in range(len(MS_SSIM_EXPONENTS)))


def ms_ssim(reconstruction: Tensor, pixels: Tensor, *, shifted: bool) -> Tensor:
    """Multi-scale structural similarity (Wang et al. 2003, eq. 7) of [B, C, H, W] in [-1, 1] -> [B], 1 if equal.

    Contrast and structure s_j are compared at every scale, the local mean only at the last. Gaussian windows of 11 px,
    sigma 1.5 px, only where they lie wholly inside; images are halved between scales by averaging 2x2 pixels. There are
    `ms_ssim_scales` scales, and their exponents are divided by their sum.

    shifted: for s_j below 0, where a power is undefined. False: 0 is used instead, as is usual for the metric. True:
        (1 + s_j) / 2 is used for every s_j, so that the worst reconstructions have a gradient too, as a loss needs.
    """
    num_scales = ms_ssim_scales(min(pixels.shape[2:]))
    assert num_scales > 0, f"images of {list(pixels.shape[2:])} px, MS-SSIM needs {MS_SSIM_WINDOW} px"
    exponents = MS_SSIM_EXPONENTS[:num_scales]
    window = _gaussian_window(pixels)
    similarity = torch.ones(len(pixels), device=pixels.device)
    for scale, exponent in enumerate(exponents):
        if scale > 0:
            reconstruction, pixels = F.avg_pool2d(reconstruction, 2), F.avg_pool2d(pixels, 2)
        luminance, structure = _local_similarity(reconstruction, pixels, window)
        local = luminance * structure if scale == num_scales - 1 else structure
        s = local.mean(dim=(1, 2, 3))
        similarity = similarity * ((1 + s) / 2 if shifted else s.relu()) ** (exponent / sum(exponents))
    return similarity


def _gaussian_window(like: Tensor) -> Tensor:
    """Weights [11] with the sum 1, on the device and in the dtype of `like`."""
    offsets = torch.arange(MS_SSIM_WINDOW, device="cpu") - (MS_SSIM_WINDOW - 1) / 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    return (window / window.sum()).to(like, non_blocking=True)


def _local_similarity(a: Tensor, b: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of the local means, and of contrast and structure, each [B, C, h, w]."""
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    variances = _blur(a.square() + b.square(), window) - mean_a.square() - mean_b.square()
    covariance = _blur(a * b, window) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    return luminance, (2 * covariance + _C2) / (variances + _C2)


def _blur(x: Tensor, window: Tensor) -> Tensor:
    """Weighted means over the windows inside x [B, C, H, W]."""
    h = F.conv2d(x.flatten(0, 1)[:, None], window[None, None, :, None])
    return F.conv2d(h, window[None, None, None, :])[:, 0].unflatten(0, x.shape[:2])


class MSSSIM(PerceptualLoss):
    """1 - multi-scale structural similarity, shifted so that it has a gradient everywhere (`ms_ssim`), in [0, 1]."""

    name = "ms_ssim"
    smallest_side = MS_SSIM_WINDOW

    def distance(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        return 1 - ms_ssim(reconstruction, pixels, shifted=True)


PERCEPTUAL_NAMES = (LPIPS.name, MSSSIM.name)


def get_perceptual(name: str, weights: str | None = None) -> PerceptualLoss:
    """The perceptual term of that name; `weights` are LPIPS's, see `LPIPS.load`.

    Raises ValueError for an unknown name, for weights that cannot be loaded, and for weights of a term that has none.
    """
    if name == LPIPS.name:
        return LPIPS.load(weights)
    if name != MSSSIM.name:
        raise ValueError(f"perceptual term {name!r} is unknown; must be one of {', '.join(PERCEPTUAL_NAMES)}")
    if weights is not None:
        raise ValueError(f"perceptual term {name} has no weights, but {weights!r} is given; only lpips has weights")
    return MSSSIM()


def _as_colour(pixels: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, K, 3, H, W]: the colour image if C is 3 or more, every other channel as a grey one."""
    num_colour = 3 if pixels.shape[1] >= 3 else 0
    images = [pixels[:, :3]] if num_colour else []
    images += [grey[:, None].expand(-1, 3, -1, -1) for grey in pixels[:, num_colour:].unbind(1)]
    return torch.stack(images, dim=1)


def _vgg16_file(weights: str) -> Path:
    """The safetensors file that a path, a folder or a hub id means; ValueError if there is none."""
    advice = f"for how to make one see {_ASSETS / 'README.md'}"
    path = Path(weights).expanduser()
    if path.is_dir():
        for name in _VGG16_FILES:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"lpips: folder {path} has neither {' nor '.join(_VGG16_FILES)}; {advice}")
    if path.suffix == ".safetensors":
        return path
    if path.is_file():
        raise ValueError(f"lpips: {path} is not a safetensors file, the only kind that is read; {advice}")
    try:
        return Path(hf_hub_download(weights, "model.safetensors"))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"lpips: VGG16's weights {weights!r} are neither a file, nor a folder, nor a model that could be reached "
            f"on the hub ({reason}); give a safetensors file instead ({advice}) or another perceptual term"
        ) from None
