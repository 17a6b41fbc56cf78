"""The discriminator of stage 1's adversarial loss: is each patch of an image real, or a reconstruction?"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = 4
SLOPE = 0.2  # of LeakyReLU below 0
INIT_STD = 0.02
MAX_WIDENING = 8  # the width doubles at each layer up to this many times the first


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The shape of a PatchDiscriminator; ValueError if it is impossible."""

    in_channels: int = 3
    width: int = 64  # channels of the first layer
    layers: int = 3  # convolutions of stride 2; 3 see patches of 70 px, 2 of 34 px, 1 of 16 px
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        for name in ("in_channels", "width", "layers", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"discriminator {name} is {getattr(self, name)}, must be at least 1")
        if 2 * self.width % self.norm_num_groups:
            raise ValueError(
                f"discriminator norm_num_groups {self.norm_num_groups} does not divide {2 * self.width} channels, "
                "twice its width"
            )

    @property
    def smallest_side(self) -> int:
        """The smallest height and width, in pixels, that give a logit: two more convolutions each take 1 off."""
        return 3 * 2**self.layers


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, app. 6.1.2): pixels [B, C, H, W] in [-1, 1] -> logits [B, 1, h', w'].

    4x4 convolutions with LeakyReLU 0.2: `layers` of stride 2, one of stride 1, one of stride 1 to the logits, so that
    h' = H / 2^layers - 2. The first and the last have no normalisation. A positive logit says that a patch is real.

    GroupNorm replaces the paper's BatchNorm, so that an image's logits depend on that image alone: statistics
    over a batch are meaningless for one image, and would differ between processes and ways to split a batch.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * min(2**layer, MAX_WIDENING) for layer in range(config.layers + 1)]
        strides = [2] * config.layers + [1]
        channels = [config.in_channels, *widths]
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(channels[i], channels[i + 1], KERNEL, stride=stride, padding=1)
                for i, stride in enumerate(strides)
            ]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(config.norm_num_groups, width) for width in widths[1:]])
        # No bias: while all logits are within (-1, 1), the hinge loss has no gradient for it, and Adam would step on
        # rounding errors. The last normalisation has one.
        self.conv_out = nn.Conv2d(widths[-1], 1, KERNEL, padding=1, bias=False)

    @classmethod
    def from_config(cls, config: DiscriminatorConfig, seed: int) -> Self:
        """Random weights that depend on `seed` alone; the global random state is neither used nor changed."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.init_weights(torch.Generator().manual_seed(seed))
        return model

    def init_weights(self, generator: torch.Generator) -> None:
        """Convolutions N(0, 0.02^2) as in the paper's app. 6.2, biases 0, weights of the normalisations 1."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Raises ValueError for images that are too small to have a logit."""
        height, width = pixels.shape[2:]
        if min(height, width) < self.config.smallest_side:
            raise ValueError(
                f"images of {height}x{width} px are too small for a discriminator of {self.config.layers} layers, "
                f"which needs {self.config.smallest_side} px: use fewer layers"
            )
        h = F.leaky_relu(self.convs[0](pixels), SLOPE)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), SLOPE)
        return self.conv_out(h)
