"""The names of modules in CompVis' LDM and in OpenCLIP, by those of diffusers and transformers.

Modules inside of a named one, and weight and bias, are called the same on both sides.
"""

from collections.abc import Mapping

from latentdiff.config import AutoencoderKLConfig, UNetConfig


def unet_names(config: UNetConfig) -> dict[str, str]:
    """LDM's names of the UNet's modules, after its prefix, by diffusers' names."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        **_resnet("mid_block.resnets.0", "middle_block.0"),
        "mid_block.attentions.0": "middle_block.1",
        **_resnet("mid_block.resnets.1", "middle_block.2"),
    }
    top = len(config.block_out_channels) - 1
    n = 1
    for i, kind in enumerate(config.down_block_types):
        for j in range(config.layers_per_block):
            names |= _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            if kind != "DownBlock2D":
                names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i < top:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i, kind in enumerate(config.up_block_types):
        attention = kind != "UpBlock2D"
        for j in range(config.layers_per_block + 1):
            names |= _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            if attention:
                names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        if i < top:
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{1 + attention}.conv"
    return names


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    layers = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return {f"{ours}.{layer}": f"{theirs}.{name}" for layer, name in layers.items()}


def vae_names(config: AutoencoderKLConfig) -> dict[str, str]:
    """The same of the autoencoder."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for j in range(2):
            names |= _vae_resnet(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}")
        for layer, name in attention.items():
            names[f"{half}.mid_block.attentions.0.{layer}"] = f"{half}.mid.attn_1.{name}"
    top = len(config.block_out_channels) - 1
    for i in range(top + 1):
        for j in range(config.layers_per_block):
            names |= _vae_resnet(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}")
        for j in range(config.layers_per_block + 1):
            names |= _vae_resnet(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{top - i}.block.{j}")
        if i < top:
            names[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
            names[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{top - i}.upsample.conv"
    return names


def _vae_resnet(ours: str, theirs: str) -> dict[str, str]:
    layers = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
    return {f"{ours}.{layer}": f"{theirs}.{name}" for layer, name in layers.items()}


def open_clip_names(layers: int) -> dict[str, str]:
    """OpenCLIP's names of the text encoder's modules by transformers'; without queries, keys and values: one tensor."""
    names = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    block = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for i in range(layers):
        for layer, name in block.items():
            names[f"encoder.layers.{i}.{layer}"] = f"transformer.resblocks.{i}.{name}"
    return names


def renamed(key: str, names: Mapping[str, str]) -> str | None:
    """The key with its module's other name; None if that is not known."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if (name := names.get(".".join(parts[:length]))) is not None:
            return ".".join([name, *parts[length:]])
    return None
