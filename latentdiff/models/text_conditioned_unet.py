"""The UNet and, where it is trained too, the text encoder as one module."""

from torch import Tensor, nn

from latentdiff.models.pretrained_text import AnyTextEncoder
from latentdiff.models.unet import UNet


class TextConditionedUNet(nn.Module):
    """What stage 2 trains: one module to average, to save and to synchronise.

    `condition` is input_ids [B, L] if `text_encoder` is trained along, else the frozen encoder's context [B, L, D].
    """

    def __init__(self, unet: UNet, text_encoder: AnyTextEncoder | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """[B, C, h, w], [B] int64, condition -> the UNet's output [B, C, h, w]."""
        context = condition if self.text_encoder is None else self.text_encoder(condition)
        return self.unet(noisy_latents, timesteps, context)
