"""The single file of Stable Diffusion 1 and 2: the names, shapes and buffers of CompVis' LDM, which most tools read.

A file holds tensors only. What they do not show is fixed by the two layouts: Stable Diffusion 1 has CLIP's text encoder
and 8 attention heads at every level, Stable Diffusion 2 OpenCLIP's and heads of width 64. A model of other choices
can't be told apart in such a file, and other tools would draw wrong images from it, so it is refused.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentdiff.config import STABLE_DIFFUSION_SCALING_FACTOR, AutoencoderKLConfig, UNetConfig
from latentdiff.diffusion.schedule import BETAS, NoiseSchedule
from latentdiff.formats.diffusers_folder import WEIGHTS_STEM, read_config, read_files
from latentdiff.formats.files import read_json, read_safetensors, read_safetensors_header, refuse_not_finite
from latentdiff.formats.headers import read_tensor_file
from latentdiff.formats.ldm_names import open_clip_names, renamed, unet_names, vae_names
from latentdiff.formats.scheduler_config import read_schedule
from latentdiff.formats.weight_files import find_weights
from latentdiff.printable import listed, shown

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
METADATA = "latentdiff"  # in the file's header: the small files of the folder that it was written from
FOLDER_FILES = (
    *("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"),
    *("vae/latent_preview.json", "generation_config.json", "trained_on.json"),
)
TOKENS = 77  # that every tool gives the text encoder
HEADS, HEAD_WIDTH, GROUPS = 8, 64, 32  # of Stable Diffusion 1; of Stable Diffusion 2 and both text encoders; of both
MAX_LEVELS = 16
Layout = Literal["sd1", "sd2"]
NAMES: dict[Layout, str] = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2"}
# What a file is taken for that doesn't say it, as diffusers does.
PREDICTIONS: dict[Layout, Literal["epsilon", "v_prediction"]] = {"sd1": "epsilon", "sd2": "v_prediction"}
PADDING: dict[Layout, str] = {"sd1": "<|endoftext|>", "sd2": "!"}
_ACTIVATIONS: dict[str, Layout] = {"quick_gelu": "sd1", "gelu": "sd2"}
# Of Stable Diffusion's own folders.
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_MODELSPEC = {"epsilon": "epsilon", "v_prediction": "v"}
_SCHEDULE = NoiseSchedule()
# Keys in whose place a user should learn what the file is.
_OTHER_MODELS = {
    "conditioner.": "it is of Stable Diffusion XL",
    f"{UNET}label_emb.": "its UNet has class conditioning",
    f"{UNET}add_embedding.": "its UNet has class conditioning",
    "control_model.": "it is a ControlNet",
    f"{UNET}double_blocks.": "it is of Flux",
    f"{UNET}joint_blocks.": "it is of Stable Diffusion 3",
    **dict.fromkeys(
        ("lora_", "unet.", "text_encoder.", "base_model.model."),
        "it is a LoRA, not a whole model: open the model and add it (load_lora_weights, or --lora)",
    ),
}


@dataclass(frozen=True)
class SingleFile:
    """What a file holds: the configs of its parts, and what it says beside them.

    text_encoder: keys of transformers' CLIPTextConfig. prediction_type: None if the file doesn't say it.
    folder: small files of the folder that it was written from, by name; empty if another tool wrote it.
    """

    path: Path
    layout: Layout
    unet: UNetConfig
    vae: AutoencoderKLConfig
    text_encoder: dict[str, Any]
    prediction_type: str | None
    folder: dict[str, Any]

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each part, in diffusers' and transformers' names: unet, vae, text_encoder.

        Neither averages (`model_ema.`), nor buffers, nor the last block of OpenCLIP are among them.
        """
        tensors = read_safetensors(self.path, wanted=lambda key: key.startswith((UNET, VAE, CLIP, OPEN_CLIP)))
        return _to_folder(tensors, self)

    def scheduler_config(self, prediction_type: str | None = None) -> dict[str, Any]:
        """The contents of the folder's scheduler_config.json; of a file of another tool, Stable Diffusion's own.

        prediction_type: None: what the file says, else epsilon for Stable Diffusion 1 and v_prediction for 2.
        """
        prediction = prediction_type or self.prediction_type or PREDICTIONS[self.layout]
        config = self.folder.get("scheduler/scheduler_config.json")
        if config is None:
            name = "PNDMScheduler" if self.layout == "sd1" and prediction == "epsilon" else "DDIMScheduler"
            config = {"_class_name": name, **_SCHEDULER}
        return config | {"prediction_type": prediction}


# ----------------------------------------------------------------------------------------------------------------------
# What such a file can say


def layout_of(
    unet: UNetConfig,
    vae: AutoencoderKLConfig,
    text_encoder: Mapping[str, Any],
    schedule: NoiseSchedule,
    padding: str | None = None,
) -> Layout:
    """The layout that names a model; ValueError, which says why not, if it is neither Stable Diffusion 1's nor 2's.

    text_encoder: the contents of its config.json. padding: the tokenizer's pad token; None: as the layout has it.
    """
    layout: Layout | None = _ACTIVATIONS.get(str(text_encoder.get("hidden_act", "quick_gelu")))
    reason = "its text encoder is not of CLIP" if layout is None else None
    if layout is not None:
        reason = next(_unnamed(unet, vae, text_encoder, schedule, padding, layout), None)
    if layout is None or reason is not None:
        raise ValueError(f"no single file names this model: {reason}; the diffusers folder does")
    return layout


def _unnamed(
    unet: UNetConfig,
    vae: AutoencoderKLConfig,
    text: Mapping[str, Any],
    schedule: NoiseSchedule,
    padding: str | None,
    layout: Layout,
) -> Iterator[str]:
    """What other tools could not see in the file, and would take for something else."""
    name = NAMES[layout]
    if unet.has_linear_attention:
        yield "its UNet has linear attention"
    attention = [kind != "DownBlock2D" for kind in unet.down_block_types]
    if attention[::-1] != [kind != "UpBlock2D" for kind in unet.up_block_types]:
        yield f"the attention of up_block_types {list(unet.up_block_types)} is not that of down_block_types, reversed"
    if unet.addition_embed_type is not None:
        yield f"addition_embed_type is {unet.addition_embed_type}"
    wanted = tuple(width // HEAD_WIDTH if unet.use_linear_projection else HEADS for width in unet.block_out_channels)
    used = [*attention[:-1], True]  # the lowest level's heads are the middle block's too
    if any(one != other for one, other, it in zip(unet.heads, wanted, used, strict=True) if it):
        rule = f"heads of width {HEAD_WIDTH}" if unet.use_linear_projection else f"{HEADS} at every level"
        yield f"it has {list(unet.heads)} attention heads, which are {rule} there"
    if len(set(unet.transformer_depths)) > 1:
        yield f"transformer_layers_per_block is {list(unet.transformer_depths)}, one number there"
    fixed = {"norm_num_groups": GROUPS, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0.0}
    yield from (
        f"{key} is {getattr(unet, key)}, {value} there" for key, value in fixed.items() if getattr(unet, key) != value
    )
    fixed = {
        "norm_num_groups": GROUPS,
        "scaling_factor": STABLE_DIFFUSION_SCALING_FACTOR,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }
    yield from (
        f"the autoencoder's {key} is {getattr(vae, key)}, {value} there"
        for key, value in fixed.items()
        if getattr(vae, key) != value
    )
    if vae.shift_factor:
        yield f"the autoencoder's shift_factor is {vae.shift_factor}, 0 there"
    if text.get("num_attention_heads") != max(1, text["hidden_size"] // HEAD_WIDTH):
        yield f"its text encoder has {text.get('num_attention_heads')} heads, which are of width {HEAD_WIDTH} there"
    if text.get("max_position_embeddings") != TOKENS:
        yield f"its text encoder reads {text.get('max_position_embeddings')} tokens, {TOKENS} there"
    if text.get("layer_norm_eps", 1e-5) != 1e-5:
        yield f"its text encoder's layer_norm_eps is {text['layer_norm_eps']}, 1e-05 there"
    if text["num_hidden_layers"] < 1:
        yield "its text encoder has no layers"
    if padding is not None and padding != PADDING[layout]:
        yield f"its tokenizer pads with {shown(padding)}, with {shown(PADDING[layout])} in {name}"
    if schedule.prediction_type not in _MODELSPEC:
        yield f"its prediction_type is {schedule.prediction_type}, epsilon or v_prediction there"
    for key in BETAS:
        if getattr(schedule, key) != getattr(_SCHEDULE, key):
            yield f"its schedule's {key} is {getattr(schedule, key)}, {getattr(_SCHEDULE, key)} there"


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def from_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], Layout]:
    """The tensors, the metadata and the layout of the single file of a pipeline's folder.

    Raises ValueError, which says why, if no single file names the model, or a weight is not finite.
    """
    files = {name: read_json(folder / name) for name in FOLDER_FILES if (folder / name).is_file()}
    if "vae/config.json" not in files:
        raise ValueError("no single file names this model: it is in pixel space; the diffusers folder does")
    text = files["text_encoder/config.json"]
    if text.get("architectures") != ["CLIPTextModel"]:
        raise ValueError("no single file names this model: its text encoder is not of CLIP; the diffusers folder does")
    place = str(folder)
    unet = UNetConfig.from_diffusers(read_config(folder / "unet/config.json", UNetConfig.diffusers_class), place)
    vae = AutoencoderKLConfig.from_diffusers(read_config(folder / "vae/config.json", "AutoencoderKL"), place)
    schedule = read_schedule(files["scheduler/scheduler_config.json"])
    padding = read_json(folder / "tokenizer/special_tokens_map.json").get("pad_token")
    layout = layout_of(unet, vae, text, schedule, padding)

    tensors = _prefixed(_weights(folder / "unet", WEIGHTS_STEM), unet_names(unet), UNET)
    for key, tensor in _prefixed(_weights(folder / "vae", WEIGHTS_STEM), vae_names(vae), VAE).items():
        # LDM's attention layers are 1x1 convolutions.
        tensors[key] = tensor[:, :, None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor
    encoder = {k.removeprefix("text_model."): t for k, t in _weights(folder / "text_encoder", "model").items()}
    if layout == "sd1":
        tensors |= {f"{CLIP}text_model.{key}": tensor for key, tensor in encoder.items()}
        tensors[f"{CLIP}text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    else:
        tensors |= _to_open_clip(encoder, text["num_hidden_layers"])
    refuse_not_finite(tensors, "the model")
    tensors |= schedule_buffers(schedule)
    return tensors, _metadata(files, layout, unet, vae, schedule), layout


def _weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a model's folder, without a variant."""
    return read_files(find_weights(folder, stem).files, read_safetensors)


def _prefixed(weights: Mapping[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    named = {key: renamed(key, names) for key in weights}
    assert None not in named.values(), f"no names for {[key for key, name in named.items() if name is None]}"
    return {f"{prefix}{named[key]}": tensor for key, tensor in weights.items()}


def _to_open_clip(encoder: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The text encoder in OpenCLIP's names, as Stable Diffusion 2 has it: with a last block that nothing reads.

    The context is the output of the last block but one, after the final norm. A copy of that block stands in for the
    last one, the identity and CLIP's first temperature for the projection and the scale of the logits.
    """
    names = open_clip_names(layers)
    tensors = {"positional_embedding": encoder["embeddings.position_embedding.weight"]}
    for key, tensor in encoder.items():
        if (name := renamed(key, names)) is not None:
            tensors[name] = tensor
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [encoder[f"encoder.layers.{i}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    last = f"transformer.resblocks.{layers - 1}."
    copies = {
        f"transformer.resblocks.{layers}.{key.removeprefix(last)}": tensor.clone()
        for key, tensor in tensors.items()
        if key.startswith(last)
    }
    width = tensors["positional_embedding"]
    tensors |= copies
    tensors["text_projection"] = torch.eye(width.shape[1], dtype=width.dtype)
    tensors["logit_scale"] = torch.tensor(1 / 0.07).log().to(width.dtype)
    return {f"{OPEN_CLIP}{key}": tensor for key, tensor in tensors.items()}


def schedule_buffers(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The buffers in which LDM keeps a schedule, [T] float32 each (`register_schedule` of its ddpm.py)."""
    cumprod = schedule.alphas_cumprod.double()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), cumprod[:-1]])
    betas = 1 - cumprod / previous
    variance = betas * (1 - previous) / (1 - cumprod)
    buffers = {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - cumprod).log(),
        "sqrt_recip_alphas_cumprod": cumprod.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / cumprod - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - cumprod),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - cumprod),
    }
    return {name: tensor.float() for name, tensor in buffers.items()}


def _metadata(
    files: Mapping[str, Any], layout: Layout, unet: UNetConfig, vae: AutoencoderKLConfig, schedule: NoiseSchedule
) -> dict[str, str]:
    """What the tensors do not say: in Stability's ModelSpec, and for ourselves the folder's small files."""
    version = "v1" if layout == "sd1" else "v2-512" if schedule.prediction_type == "epsilon" else "v2-768-v"
    size = unet.sample_size or 64
    height, width = size if isinstance(size, tuple) else (size, size)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{version}",
        "modelspec.prediction_type": _MODELSPEC[schedule.prediction_type],
        "modelspec.resolution": f"{width * vae.downsampling}x{height * vae.downsampling}",
        METADATA: json.dumps(files, ensure_ascii=False),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_single_file(path: Path) -> SingleFile:
    """What a file holds, by its header: no weights are read.

    Raises ValueError for other kinds of files, for one with keys that are of no part, and for models of other shapes.
    """
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(
            f'{shown(path)} is pickled, which may run code when it is opened; convert it: python -c "import torch, '
            "safetensors.torch as s; m = torch.load('FILE', weights_only=True); s.save_file({k: v.contiguous() for "
            "k, v in m.get('state_dict', m).items() if hasattr(v, 'shape')}, 'FILE.safetensors')\""
        )
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{shown(path)} is no .safetensors file, and no folder")
    header, metadata = read_safetensors_header(path), read_tensor_file(path).metadata
    for prefix, reason in _OTHER_MODELS.items():
        if any(key.startswith(prefix) for key in header):
            raise ValueError(f"{shown(path)} can't be opened: {reason}")
    if not any(key.startswith(UNET) for key in header):
        raise ValueError(f"{shown(path)} is no single file of Stable Diffusion: no tensor's name begins with {UNET}")
    folder = _folder_files(path, metadata)
    try:
        layout, unet, vae, text = _configs(header, folder, str(path))
        prediction = _prediction(folder, metadata)
        named: dict[str, Any] = {"prediction_type": prediction} if prediction else {}
        found = layout_of(unet, vae, text, NoiseSchedule(**named))
        if found != layout:
            raise ValueError(f"the text encoder's hidden_act is {text['hidden_act']}, which is not {NAMES[layout]}'s")
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{shown(path)} is no whole Stable Diffusion model: it lacks {shown(str(error.args[0]))}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from None
    file = SingleFile(path, layout, unet, vae, text, prediction, folder)
    if unknown := _unknown(header, file):
        raise ValueError(f"{shown(path)} has keys that are of no part of {NAMES[layout]}: {listed(unknown, 5)}")
    _check_buffers(path, header)
    return file


def _folder_files(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The small files that our own writer put into the header."""
    if METADATA not in metadata:
        return {}
    try:
        files = json.loads(metadata[METADATA])
    except (ValueError, RecursionError):
        files = None
    if not isinstance(files, dict) or not all(
        name in FOLDER_FILES and isinstance(v, dict) for name, v in files.items()
    ):
        raise ValueError(f"{shown(path)}: its metadata {METADATA} is not as this project writes it")
    return files


def _prediction(folder: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    said = folder.get("scheduler/scheduler_config.json", {}).get("prediction_type")
    by_modelspec = {value: key for key, value in _MODELSPEC.items()}
    return said or by_modelspec.get(metadata.get("modelspec.prediction_type", ""))


def _configs(
    header: Mapping[str, Tensor], folder: Mapping[str, Any], place: str
) -> tuple[Layout, UNetConfig, AutoencoderKLConfig, dict[str, Any]]:
    """The layout and the configs by the tensors' shapes; where our writer left the configs, those."""
    shapes = {_with_text_model(key): tuple(tensor.shape) for key, tensor in header.items()}
    layout: Layout = "sd2" if f"{OPEN_CLIP}positional_embedding" in shapes else "sd1"
    text = _infer_text_encoder(shapes, layout)
    unet, vae = _infer_unet(_under(shapes, UNET)), _infer_vae(_under(shapes, VAE))
    if folder:
        unet, vae = folder.get("unet/config.json", unet), folder.get("vae/config.json", vae)
        said = folder.get("text_encoder/config.json", {})
        text |= {key: said[key] for key in _TEXT_KEYS if key in said}
    return layout, UNetConfig.from_diffusers(unet, place), AutoencoderKLConfig.from_diffusers(vae, place), text


def _under(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _with_text_model(key: str) -> str:
    """Some tools leave out `text_model.`, as the newest transformers do."""
    rest = key.removeprefix(CLIP)
    return f"{CLIP}text_model.{rest}" if rest.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def _infer_unet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The UNet's config by the shapes of its tensors, in LDM's names; KeyError where one is missing."""
    levels: list[list[int]] = [[]]  # the numbers of each level's input blocks
    n = 1
    while f"input_blocks.{n}.0.op.weight" in shapes or f"input_blocks.{n}.0.in_layers.2.weight" in shapes:
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(n)
        n += 1
    layers = len(levels[0])
    if len(levels) > MAX_LEVELS or layers == 0 or any(len(level) != layers for level in levels):
        raise ValueError(
            f"its UNet's levels have {[len(level) for level in levels]} residual blocks, must be of one number"
        )
    attention = [f"input_blocks.{level[0]}.1.norm.weight" in shapes for level in levels]
    up = [f"output_blocks.{i * (layers + 1)}.1.norm.weight" in shapes for i in range(len(levels))]
    middle = "middle_block.1."
    depth = 0
    while f"{middle}transformer_blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    widths = [shapes[f"input_blocks.{level[0]}.0.in_layers.2.weight"][0] for level in levels]
    linear = len(shapes[f"{middle}proj_in.weight"]) == 2
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if it else "DownBlock2D" for it in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if it else "UpBlock2D" for it in up],
        "cross_attention_dim": shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in widths] if linear else HEADS,
        "transformer_layers_per_block": depth,
        "use_linear_projection": linear,
    }


def _infer_vae(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The autoencoder's config by the shapes of its tensors, in LDM's names; KeyError where one is missing."""
    levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": _count(shapes, "encoder.down.0.block.{}.conv1.weight"),
    }


# Of CLIPTextConfig: what neither the shapes nor the layout says, and no context depends on.
_TEXT_KEYS = ("projection_dim", "attention_dropout", "initializer_factor", "initializer_range")


def _infer_text_encoder(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Any]:
    """The text encoder's config by the shapes of its tensors; KeyError where one is missing."""
    if layout == "sd1":
        prefix = f"{CLIP}text_model."
        position, token = "embeddings.position_embedding.weight", "embeddings.token_embedding.weight"
        hidden, out = "encoder.layers.{}.mlp.fc1.weight", "encoder.layers.{}.self_attn.out_proj.weight"
    else:
        prefix = OPEN_CLIP
        position, token = "positional_embedding", "token_embedding.weight"
        hidden, out = "transformer.resblocks.{}.mlp.c_fc.weight", "transformer.resblocks.{}.attn.out_proj.weight"
    tokens, width = shapes[prefix + position]
    blocks = _count(shapes, prefix + hidden)
    intermediate = shapes[prefix + hidden.format(0)][0]
    # Before a model of these sizes is made: that every block has them.
    for i in range(blocks):
        for name, shape in ((hidden, (intermediate, width)), (out, (width, width))):
            if (found := shapes[key := prefix + name.format(i)]) != shape:
                raise ValueError(f"{key} is {list(found)}, must be {list(shape)}")
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks - (layout == "sd2"),  # the last one is not used there
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": tokens,
        "vocab_size": shapes[prefix + token][0],
        "hidden_act": next(name for name, it in _ACTIVATIONS.items() if it == layout),
    }


def _count(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """How many there are of a numbered key."""
    n = 0
    while name.format(n) in shapes:
        n += 1
    return n


def _unknown(header: Mapping[str, Tensor], file: SingleFile) -> list[str]:
    """Keys that are neither of a part, nor an average, nor a buffer."""
    ema = {"model_ema.decay", "model_ema.num_updates"}
    # LDM's names of the averages: the parameters' without their dots.
    ema |= {f"model_ema.{key.removeprefix('model.').replace('.', '')}" for key in header if key.startswith(UNET)}
    buffers = {*schedule_buffers(_SCHEDULE), "logvar", "lvlb_weights", "scale_factor"}
    known = ema | buffers | set(_names(header, file))
    return sorted(key for key in header if key not in known)


def _names(keys: Iterable[str], file: SingleFile) -> dict[str, tuple[str, str]]:
    """Each key of a part, with the part and the name there. "" for what is not read, `qkv` for what is three in one."""
    unet, vae = ({v: k for k, v in names.items()} for names in (unet_names(file.unet), vae_names(file.vae)))
    layers = file.text_encoder["num_hidden_layers"]
    clip = {v: k for k, v in open_clip_names(layers).items()}
    unused = (f"transformer.resblocks.{layers}.", "text_projection", "logit_scale", "attn_mask")
    names: dict[str, tuple[str, str]] = {}
    for key in keys:
        place: tuple[str, str | None] = ("", None)
        full = _with_text_model(key)
        if key.startswith(UNET):
            place = "unet", renamed(key.removeprefix(UNET), unet)
        elif key.startswith(VAE):
            place = "vae", renamed(key.removeprefix(VAE), vae)
        elif full.startswith(f"{CLIP}text_model.") and file.layout == "sd1":
            name = full.removeprefix(f"{CLIP}text_model.")
            place = "text_encoder", "" if name == "embeddings.position_ids" else name
        elif key.startswith(OPEN_CLIP) and file.layout == "sd2":
            name = key.removeprefix(OPEN_CLIP)
            if name.startswith(unused):
                place = "text_encoder", ""
            elif name == "positional_embedding":
                place = "text_encoder", "embeddings.position_embedding.weight"
            elif (block := name.removesuffix("weight").removesuffix("bias")).endswith(".attn.in_proj_"):
                layer = block.removeprefix("transformer.resblocks.").removesuffix(".attn.in_proj_")
                place = "text_encoder", f"encoder.layers.{layer}.self_attn.qkv_proj.{name.rpartition('_')[2]}"
            else:
                place = "text_encoder", renamed(name, clip)
        if place[1] is not None:
            names[key] = place[0], place[1]
    return names


def _to_folder(tensors: Mapping[str, Tensor], file: SingleFile) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "vae": {}, "text_encoder": {}}
    for key, (part, name) in _names(tensors, file).items():
        tensor = tensors[key]
        if part == "vae" and ".attentions." in name and tensor.ndim > 2:
            tensor = tensor.flatten(1)  # a 1x1 convolution, here a linear layer
        if ".qkv_proj." in name:
            pieces = tensor.chunk(3)
            for which, piece in zip("qkv", pieces, strict=True):
                parts[part][name.replace(".qkv_proj.", f".{which}_proj.")] = piece.clone()
        elif name:
            parts[part][name] = tensor
    return parts


def _check_buffers(path: Path, header: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the file's schedule or scale is not Stable Diffusion's; it may be in half precision."""
    checked: dict[str, tuple[Callable[[], Tensor], str]] = {
        "alphas_cumprod": (lambda: schedule_buffers(_SCHEDULE)["alphas_cumprod"], "its noise schedule"),
        "scale_factor": (lambda: torch.tensor(STABLE_DIFFUSION_SCALING_FACTOR), "its latents' scale"),
    }
    for key, (expected, what) in checked.items():
        if key in header:
            value, wanted = read_safetensors(path, wanted=lambda name, key=key: name == key)[key], expected()
            tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(value.dtype, 1e-4)
            if value.shape != wanted.shape or not torch.allclose(value.float(), wanted, rtol=tolerance, atol=1e-6):
                raise ValueError(f"{shown(path)} can't be opened: {what} ({key}) is not Stable Diffusion's")
