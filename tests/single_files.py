"""Pipelines of the structure of Stable Diffusion 1 and 2, of small widths, for single files."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tiny import perturb, tiny_text_encoder, tiny_unet, tiny_vae

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.pipeline import GenerationDefaults, LatentDiffusionPipeline

VAE = {
    "sample_size": 32,
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
CROSS, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# Four levels, two residual blocks each, attention in all but the lowest: every name of Stable Diffusion's own files.
SD1 = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 96, 96],
    "down_block_types": [CROSS, CROSS, CROSS, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP],
    "layers_per_block": 2,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
SD2 = SD1 | {
    "block_out_channels": [64, 64, 64, 128],
    "attention_head_dim": [1, 1, 1, 2],
    "cross_attention_dim": 128,
    "use_linear_projection": True,
}
TEXT_SD1 = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
TEXT_SD2 = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
}


def small_sd(layout: str = "sd1", seed: int = 0, **changes: Any) -> LatentDiffusionPipeline:
    """A pipeline of random weights, none of them zero. changes: keys of unet, vae, text, schedule; pad_token."""
    sd1 = layout == "sd1"
    text = perturb(tiny_text_encoder(seed, **(TEXT_SD1 if sd1 else TEXT_SD2) | changes.get("text", {})), seed, 0.02)
    schedule = {"prediction_type": "epsilon" if sd1 else "v_prediction"} | changes.get("schedule", {})
    return LatentDiffusionPipeline(
        tiny_vae(seed, **VAE | changes.get("vae", {})),
        tiny_unet(seed, **(SD1 if sd1 else SD2) | changes.get("unet", {})),
        text.eval(),
        CLIPTokenizer.load(pad_token=changes.get("pad_token", "<|endoftext|>" if sd1 else "!")),
        NoiseSchedule(**schedule),
        GenerationDefaults(num_inference_steps=7, guidance_scale=3.0),
    )


def contents(path: Path) -> bytes | tuple[dict[str, str], dict[str, tuple[torch.dtype, torch.Size, bytes]]]:
    """Of a file, to the bit: a safetensors file's metadata, whose order is left to chance, and tensors."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        bits = {key: (t.dtype, t.shape, t.flatten().view(torch.uint8).numpy().tobytes()) for key, t in tensors.items()}
        return file.metadata(), bits


def contents_of(folder: Path) -> dict[str, object]:
    """The same of all files in a folder, by name."""
    return {path.relative_to(folder).as_posix(): contents(path) for path in folder.rglob("*") if path.is_file()}
