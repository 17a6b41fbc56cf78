"""Components of a few thousand weights, for the tests: every part is real, only small. Images are 16x16 pixels."""

import functools

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff.config import AutoencoderKLConfig, UNetConfig
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline import LatentDiffusionPipeline

# The keys of diffusers' config.json; latents of an image are [4, 8, 8].
VAE = {
    "sample_size": 16,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.7,
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT_ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# scheduler_config.json of Stable Diffusion 1.5
SD1_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def perturb(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Add Gaussian noise to every parameter, so that none is zero and no branch is silent; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Unit Gaussian numbers that depend on `seed` alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def tiny_vae(seed: int = 0, **changes: object) -> AutoencoderKL:
    """An autoencoder of random weights, none of them zero; `changes` are config keys."""
    config = AutoencoderKLConfig.from_diffusers({**VAE, **changes}, "tiny VAE")
    return perturb(AutoencoderKL.from_config(config, seed), seed).eval()


def tiny_unet(seed: int = 0, **changes: object) -> UNet:
    """A UNet of random weights, none of them zero; `changes` are config keys."""
    return perturb(UNet.from_config(UNetConfig.from_diffusers({**UNET, **changes}, "tiny UNet"), seed), seed).eval()


def tiny_text_encoder(seed: int = 0, **changes: object) -> TextEncoder:
    """A text encoder of random weights with CLIP's full vocabulary; `changes` are config keys."""
    return TextEncoder.from_config({**TEXT_ENCODER, **changes}, seed).eval()


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """The package's tokenizer, read once."""
    return CLIPTokenizer.load()


def tiny_pipeline(seed: int = 0, **schedule: object) -> LatentDiffusionPipeline:
    """A whole pipeline of random weights; `schedule` are fields of NoiseSchedule."""
    return LatentDiffusionPipeline(
        tiny_vae(seed),
        tiny_unet(seed),
        tiny_text_encoder(seed),
        tokenizer(),
        NoiseSchedule(**{"steps_offset": 1} | schedule),
    )


class LargestOutput(TorchDispatchMode):
    """Notes how large the tensors get that the operators under it return."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result
