"""Perceptual terms of stage 1's loss: how different two images look, beyond the error of their values.

| name      | class              | compares                                                           |
|-----------|--------------------|--------------------------------------------------------------------|
| lpips     | LPIPS              | features of VGG16, weighted as people judge (needs VGG16's weights) |
| ms_ssim   | MSSSIM             | local mean, contrast and structure, at one to five scales          |
| gradient  | GradientDifference | edges: finite differences at three scales                          |
| frequency | FocalFrequency     | Fourier coefficients, most where they differ most                  |
"""

from pathlib import Path
from typing import Self

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
        total = sum(
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


class MSSSIM(PerceptualLoss):
    """1 - multi-scale structural similarity (Wang et al. 2003), in [0, 1].

    Contrast and structure s_j is compared at every scale, the local mean too at the last. Gaussian windows of 11 px,
    sigma 1.5 px, only where they lie wholly inside; images are halved between scales by averaging 2x2 pixels.

    There are as many of the paper's five scales as have 11 px: one below 22 px, three at 64 px, five from 176 px; their
    exponents are divided by their sum. s_j enters as (1 + s_j) / 2: it can be negative, where a power is undefined and
    clamping it would leave exactly the worst reconstructions without a gradient.
    """

    name = "ms_ssim"
    WINDOW = 11
    SIGMA = 1.5
    EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of pixels is 2
    smallest_side = WINDOW

    def __init__(self) -> None:
        super().__init__()
        offsets = torch.arange(self.WINDOW) - (self.WINDOW - 1) / 2
        window = torch.exp(-offsets.square() / (2 * self.SIGMA**2))
        self.register_buffer("window", window / window.sum(), persistent=False)

    @classmethod
    def num_scales(cls, side: int) -> int:
        """How many of the five scales images with a shorter side of `side` px have."""
        return sum(side // 2**scale >= cls.WINDOW for scale in range(len(cls.EXPONENTS)))

    def distance(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        exponents = self.EXPONENTS[: self.num_scales(min(pixels.shape[2:]))]
        similarity = torch.ones(len(pixels), device=pixels.device)
        for scale, exponent in enumerate(exponents):
            if scale > 0:
                reconstruction, pixels = F.avg_pool2d(reconstruction, 2), F.avg_pool2d(pixels, 2)
            luminance, structure = self._compare(reconstruction, pixels)
            local = luminance * structure if scale == len(exponents) - 1 else structure
            similarity = similarity * ((1 + local.mean(dim=(1, 2, 3))) / 2) ** (exponent / sum(exponents))
        return 1 - similarity

    def _compare(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity of the local means, and of contrast and structure, each [B, C, h, w]."""
        mean_a, mean_b = self._blur(a), self._blur(b)
        variances = self._blur(a.square() + b.square()) - mean_a.square() - mean_b.square()
        covariance = self._blur(a * b) - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + self.C1) / (mean_a.square() + mean_b.square() + self.C1)
        return luminance, (2 * covariance + self.C2) / (variances + self.C2)

    def _blur(self, x: Tensor) -> Tensor:
        """Weighted means over the windows inside x [B, C, H, W]."""
        h = F.conv2d(x.flatten(0, 1)[:, None], self.window[None, None, :, None])
        return F.conv2d(h, self.window[None, None, None, :])[:, 0].unflatten(0, x.shape[:2])


class GradientDifference(PerceptualLoss):
    """The mean absolute error of finite differences, down plus across, at three scales (Li & Snavely 2018).

    The mean over the scales; an image is halved between them by averaging 2x2 pixels. Finite differences cannot see a
    shift of a whole channel, so the absolute error of each channel's mean is added.
    """

    name = "gradient"
    SCALES = 3
    smallest_side = 2**SCALES  # two pixels, one difference, at the last scale

    def distance(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        error = reconstruction - pixels
        total = error.mean(dim=(2, 3)).abs().mean(dim=1)
        for scale in range(self.SCALES):
            if scale > 0:
                error = F.avg_pool2d(error, 2)
            down, across = error.diff(dim=2), error.diff(dim=3)
            total = total + (down.abs().mean(dim=(1, 2, 3)) + across.abs().mean(dim=(1, 2, 3))) / self.SCALES
        return total


class FocalFrequency(PerceptualLoss):
    """Focal frequency loss with alpha 1 (Jiang et al. 2021): the mean of w(u, v) |F(u, v) - F'(u, v)|^2.

    F is the orthonormal Fourier transform of a channel; w is |F - F'| divided by its greatest value over that channel,
    and has no gradient. With w = 1 this would be the mean squared error of the pixels.
    """

    name = "frequency"
    smallest_side = 1

    def distance(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        difference = torch.view_as_real(torch.fft.fft2(reconstruction - pixels, norm="ortho"))  # [B, C, H, W, 2]
        power = difference.square().sum(dim=-1)
        magnitude = power.detach().sqrt()
        greatest = magnitude.amax(dim=(2, 3), keepdim=True)
        weight = magnitude / greatest.clamp(min=torch.finfo(greatest.dtype).tiny)  # 0 for equal images
        return (weight * power).mean(dim=(1, 2, 3))


_WITHOUT_WEIGHTS = {term.name: term for term in (MSSSIM, GradientDifference, FocalFrequency)}
PERCEPTUAL_NAMES = (LPIPS.name, *_WITHOUT_WEIGHTS)


def get_perceptual(name: str, weights: str | None = None) -> PerceptualLoss:
    """The perceptual term of that name; `weights` are LPIPS's, see `LPIPS.load`.

    Raises ValueError for an unknown name, for weights that cannot be had, or given to a term that has none.
    """
    if name == LPIPS.name:
        return LPIPS.load(weights)
    if name not in _WITHOUT_WEIGHTS:
        raise ValueError(f"perceptual term {name!r} is unknown; must be one of {', '.join(PERCEPTUAL_NAMES)}")
    if weights is not None:
        raise ValueError(f"perceptual term {name} has no weights, but {weights!r} is given; only lpips has")
    return _WITHOUT_WEIGHTS[name]()


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
