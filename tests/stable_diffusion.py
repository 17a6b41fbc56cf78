"""The small files of Stable Diffusion 1.5's folder, without its weights."""

from pathlib import Path

from tiny import SD1_SCHEDULER

from latentdiff.formats.files import write_json

CROSS, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
FILES = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [CROSS, CROSS, CROSS, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    },
    "text_encoder/config.json": {
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
    },
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", **SD1_SCHEDULER},
}


def write_sd15(folder: Path) -> Path:
    """Write them into a folder, which is enough to read a config that starts from it."""
    for name, values in FILES.items():
        write_json(values, folder / name)
    return folder
