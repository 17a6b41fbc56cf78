"""The models that stage 2 starts from: the latent space of stage 1, or pixel space, and the text encoder.

And the pipeline that they are in a checkpoint, with the averaged weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from latentdiff.config import (
    AutoencoderKLConfig,
    LoRAConfig,
    TextConfig,
    UNetConfig,
    UNetTrainingConfig,
    UNetValidationConfig,
    in_yaml,
    load_config,
    size_of,
    stage_of,
    validated,
)
from latentdiff.evaluation.autoencoder import refuse_unfit
from latentdiff.formats.diffusers_folder import autoencoder_folder
from latentdiff.formats.files import check_fit, load_strictly, read_safetensors, refuse_not_finite
from latentdiff.formats.lora import LORA_FILE, LoRA, write_lora
from latentdiff.images import IMAGE_MODES
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.lora import adaptable_layers, attach_new, low_rank_changes, matching_layers
from latentdiff.models.pixel_space import Autoencoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.pretrained_text import (
    MAX_TOKENS,
    AnyTextEncoder,
    PretrainedTokenizer,
    Tokenizer,
    open_text_encoder,
)
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline import GenerationDefaults, LatentDiffusionPipeline
from latentdiff.pipeline.trained_on import MAX_WORDS, TrainedOn, words_of
from latentdiff.printable import shown
from latentdiff.randomness import Stream, seed_for
from latentdiff.training.checkpoint import list_checkpoints
from latentdiff.training.ema import trainable
from latentdiff.training.model_card import without_private_paths
from latentdiff.training.run_folder import has_model

CheckpointWeights = Literal["ema", "model"]  # of a checkpoint's files
ADAPTER = "default"  # what the adapter that is trained is called


def open_latent_space(config: UNetTrainingConfig) -> tuple[UNetTrainingConfig, Autoencoder]:
    """The autoencoder of stage 1, frozen, or pixel space where `vae` is null; and the config with what follows from it.

    These are the UNet's channels and `model.sample_size`, unless they are given.
    ValueError if it is missing or does not fit the UNet or the image size.
    """
    if config.vae is None:
        vae, place = _pixel_space(config), "pixel space"
    else:
        vae, place = _frozen_autoencoder(config.vae, config.allow_unfit_vae), f"the autoencoder in {config.vae}"
    return with_latent_space(config, vae.config, place), vae


def with_latent_space(
    config: UNetTrainingConfig, vae: AutoencoderKLConfig | PixelSpaceConfig, place: str
) -> UNetTrainingConfig:
    """The config with what follows from an autoencoder's; ValueError, with `place`, if it does not fit."""
    f, size = vae.downsampling, in_yaml(config.data.size)
    height, width = config.data.shape
    latents = size_of((height // f, width // f))
    channels = vae.latent_channels
    derived = {"in_channels": channels, "out_channels": channels, "sample_size": latents}
    missing = {key: value for key, value in derived.items() if key not in config.model.model_fields_set}
    config = _with_model(config, missing)
    for key in ("in_channels", "out_channels"):
        if getattr(config.model, key) != channels:
            raise ValueError(f"model.{key} is {getattr(config.model, key)}, but {place} has {channels} latent channels")
    if any(side % (f * config.model.downsampling) for side in config.data.shape):
        raise ValueError(
            f"data.size is {size}, must be a multiple of {f * config.model.downsampling}: the downsampling {f} of "
            f"{place} times the UNet's {config.model.downsampling}"
        )
    if config.model.sample_size != latents:
        raise ValueError(
            f"model.sample_size is {in_yaml(config.model.sample_size)}, must be the latents' size {in_yaml(latents)} "
            f"(data.size {size} / {f})"
        )
    return config


def for_text_encoder(config: UNetTrainingConfig, text_encoder: AnyTextEncoder) -> UNetTrainingConfig:
    """The config with the text encoder's width as the UNet's `cross_attention_dim`, unless that is given."""
    if "cross_attention_dim" in config.model.model_fields_set:
        return config
    return _with_model(config, {"cross_attention_dim": text_encoder.hidden_size})


def _with_model(config: UNetTrainingConfig, values: Mapping[str, Any]) -> UNetTrainingConfig:
    """The config with other values of `model`; these alone count as given."""
    given = config.model.model_dump(mode="json", include=config.model.model_fields_set)
    model = validated(UNetConfig, given | dict(values), "model")
    return config.model_copy(update={"model": model})


def _pixel_space(config: UNetTrainingConfig) -> PixelSpace:
    if config.model.in_channels not in IMAGE_MODES:
        raise ValueError(
            f"model.in_channels is {config.model.in_channels}, must be the channels of images where vae is null: "
            + ", ".join(f"{channels} ({mode})" for channels, mode in IMAGE_MODES.items())
        )
    return PixelSpace(config.model.in_channels)


def _frozen_autoencoder(vae: str, allow_unfit: bool) -> AutoencoderKL:
    folder = Path(vae).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"vae {vae!r} is not a folder; train it first with train_vae.py, or give the folder of a downloaded one"
        )
    if (folder / "config.yaml").is_file() and not has_model(folder):
        raise ValueError(f"stage 1 in {vae} has not finished; run python train_vae.py {folder / 'config.yaml'} first")
    refuse_unfit(folder, accept=allow_unfit)
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder(folder)).requires_grad_(False)
    refuse_not_finite(autoencoder.state_dict(), f"the autoencoder in {folder}")
    return autoencoder


def build_text_encoder(config: TextConfig, seed: int) -> AnyTextEncoder:
    """The frozen pretrained text encoder, or a new one to train."""
    if config.pretrained is not None:
        encoder = open_text_encoder(config.pretrained)
        refuse_not_finite(encoder.state_dict(), f"the text encoder {config.pretrained}")
        return encoder
    assert config.config is not None, "the config has one of the two"
    return TextEncoder.from_config(config.config, seed, config.token_std)


def build_tokenizer(config: TextConfig, text_encoder: AnyTextEncoder) -> Tokenizer:
    """The tokenizer of a text encoder: CLIP's, which is in the package, or a pretrained one's own."""
    if isinstance(text_encoder, TextEncoder):
        return CLIPTokenizer.load(max_length=text_encoder.max_length)
    assert config.pretrained is not None, "all others are pretrained"
    return PretrainedTokenizer.load(config.pretrained, max_length=min(MAX_TOKENS, text_encoder.max_length))


def start_from(config: UNetTrainingConfig, unet: UNet, text_encoder: AnyTextEncoder) -> None:
    """Give the UNet, and a text encoder that is trained, the weights in `init_from`, if there is one.

    That is a pipeline's folder or single file, perhaps of images of another size. Raises ValueError if it is neither,
    its models are not the config's or not finite, or its UNet predicts something else; with `lora` also if its text
    encoder or noise schedule is another one, as the adapters are used with the model's own.
    """
    if config.init_from is None:
        return
    folder = Path(config.init_from).expanduser()
    if folder.is_file():
        given = LatentDiffusionPipeline.from_single_file(folder, dtype=torch.float32)
    elif has_model(folder):
        given = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    else:
        raise ValueError(
            f"init_from {config.init_from!r} is not the folder of a pipeline or of a finished run, nor a single file"
        )
    if given.adapters:
        raise ValueError(
            f"init_from {config.init_from!r} is a LoRA: latentdiff export makes a pipeline of it to start from"
        )
    if given.schedule.prediction_type != config.diffusion.prediction_type:
        raise ValueError(
            f"diffusion.prediction_type is {config.diffusion.prediction_type}, but the UNet in {folder} predicts "
            f"{given.schedule.prediction_type}"
        )
    for key, value in config.model.model_dump(exclude={"sample_size"}).items():
        if getattr(given.unet.config, key) != value:
            raise ValueError(f"model.{key} is {value}, but the UNet in {folder} has {getattr(given.unet.config, key)}")
    parts: list[tuple[nn.Module, nn.Module, str]] = [(unet, given.unet, "UNet")]
    if config.text.pretrained is None:
        parts.append((text_encoder, given.text_encoder, "text encoder"))
    for model, source, name in parts:
        weights = source.state_dict()
        check_fit(model.state_dict(), weights, f"the {name} in {folder}")
        refuse_not_finite(weights, f"the {name} in {folder}")
        model.load_state_dict(weights)
    if config.trains_adapters:
        _check_base(config, given, text_encoder)


def _check_base(config: UNetTrainingConfig, base: LatentDiffusionPipeline, text_encoder: AnyTextEncoder) -> None:
    if not torch.equal(base.schedule.alphas_cumprod, config.diffusion.alphas_cumprod):
        keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")
        key = next(key for key in keys if getattr(base.schedule, key) != getattr(config.diffusion, key))
        raise ValueError(
            f"diffusion.{key} is {getattr(config.diffusion, key)}, but the model in {config.init_from} has "
            f"{getattr(base.schedule, key)}, with which the LoRA will be used"
        )
    ours, theirs = text_encoder.state_dict(), base.text_encoder.state_dict()
    # Saved in other types, the same weights differ by rounding.
    if ours.keys() != theirs.keys() or not all(
        ours[key].shape == theirs[key].shape
        and torch.allclose(ours[key].cpu().float(), theirs[key].float(), rtol=0.01, atol=1e-3)
        for key in ours
    ):
        raise ValueError(
            f"text.pretrained {config.text.pretrained} is another text encoder than that of the model in "
            f"{config.init_from}, with which the LoRA will be used"
        )


def trained_network(config: UNetTrainingConfig, unet: UNet, text_encoder: AnyTextEncoder) -> TextConditionedUNet:
    """What stage 2 trains: all of the UNet, and of a text encoder that is not frozen; with `lora` new adapters alone.

    Raises ValueError if no layer has a name of lora.targets.
    """
    if config.trains_adapters:
        attach_adapters(config.lora, config.train.seed, unet, text_encoder)
    return TextConditionedUNet(unet, text_encoder if config.trains_text_encoder else None)


def attach_adapters(config: LoRAConfig, seed: int, unet: UNet, text_encoder: AnyTextEncoder) -> None:
    """Freeze both and add the adapters to train; ValueError if no layer has a name of lora.targets."""
    text_targets = config.text_targets
    if text_targets and not isinstance(text_encoder, TextEncoder):
        raise ValueError(f"lora.targets has {text_targets[0]}, but only a CLIP text encoder can have adapters")
    unet_targets = tuple(target for target in config.targets if target not in text_targets)
    parts: list[tuple[nn.Module, tuple[str, ...], str, Stream]] = [(unet, unet_targets, "UNet", Stream.INIT)]
    if isinstance(text_encoder, TextEncoder):
        parts.append((text_encoder.model, text_targets, "text encoder", Stream.TEXT_INIT))
    for network, targets, name, stream in parts:
        network.requires_grad_(False)
        for target in targets:
            if not matching_layers(network, [target]):
                ends = sorted({layer.rpartition(".")[2] for layer in adaptable_layers(network)} - {"0", "2"})
                raise ValueError(
                    f"lora.targets has {shown(target)}, which is no layer of the {name}; such are {', '.join(ends)}"
                )
        if targets:
            generator = torch.Generator().manual_seed(seed_for(seed, stream))
            assert config.rank is not None
            layers = matching_layers(network, targets)
            attach_new(network, ADAPTER, layers, config.rank, config.used_alpha, generator)


def save_adapters(config: UNetTrainingConfig, network: TextConditionedUNet, folder: Path) -> None:
    """Write the trained adapters as diffusers' file; ValueError if a number is not finite."""
    text = network.text_encoder.model if isinstance(network.text_encoder, TextEncoder) else None
    changes = {} if text is None else low_rank_changes(text, ADAPTER)
    base = without_private_paths({"base": config.init_from})["base"]
    write_lora(LoRA(low_rank_changes(network.unet, ADAPTER), changes, base), folder / LORA_FILE)


def generation_defaults(validation: UNetValidationConfig) -> GenerationDefaults:
    """How the sample grids are generated, which is the default of the saved pipeline too."""
    return GenerationDefaults(
        **validation.model_dump(include={"num_inference_steps", "guidance_scale", "sampler", "sigmas"})
    )


def trained_on(config: UNetTrainingConfig, captions: Sequence[str]) -> TrainedOn:
    """What a run of this config shows a model."""
    dropout = config.train.caption_dropout
    fractions = dropout if isinstance(dropout, tuple) else (dropout,)
    words = words_of(captions) if config.text.pretrained is None or config.trains_adapters else None
    if words is not None and config.init_from is not None:
        before = TrainedOn.load(Path(config.init_from).expanduser())
        words = None if before is None or before.words is None else [*{*before.words, *words}]
    return TrainedOn(
        captions=any(captions) and min(fractions) < 1,
        unconditional=max(fractions) > 0 or not all(captions),
        words=None if words is None or len(words) > MAX_WORDS else tuple(sorted(words)),
    )


def unfinished_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to open in place of a pipeline: the folder itself, or the newest of a run without a pipeline.

    None if the folder is neither.
    """
    if (folder / "manifest.json").is_file():
        return folder
    if (folder / "config.yaml").is_file() and not has_model(folder):
        return next(reversed(list_checkpoints(folder)), None)
    return None


def open_checkpoint(checkpoint: Path, weights: CheckpointWeights = "ema") -> LatentDiffusionPipeline:
    """The pipeline of a checkpoint in its run's folder; ValueError if it is of stage 1, or as `checkpoint_pipeline`."""
    path = checkpoint.resolve().parents[1] / "config.yaml"
    if stage_of(path) != "unet":
        raise ValueError(f"{checkpoint} is a checkpoint of stage 1, which generates no images")
    config = load_config(UNetTrainingConfig, path)
    return checkpoint_pipeline(config, checkpoint, open_latent_space(config)[1], weights)


def checkpoint_pipeline(
    config: UNetTrainingConfig, checkpoint: Path, vae: Autoencoder, weights: CheckpointWeights = "ema"
) -> LatentDiffusionPipeline:
    """The pipeline of a checkpoint, of a finished run or of one that still trains.

    vae: that of the run (`open_latent_space`). weights: the averaged ones, or those that are trained ("model").
    Raises ValueError if the weights are missing or of another model.
    """
    text_encoder = build_text_encoder(config.text, seed=0)
    unet = UNet.from_config(config.model, seed=0)
    if config.trains_adapters:
        start_from(config, unet, text_encoder)
    network = trained_network(config, unet, text_encoder)
    path = checkpoint / f"{weights}.safetensors"
    given = read_safetensors(path)
    if config.trains_adapters:
        check_fit(trainable(network), given, str(path))
        network.load_state_dict(given, strict=False)
    else:
        load_strictly(network, given, str(path))
    network.eval()
    tokenizer = build_tokenizer(config.text, text_encoder)
    defaults = generation_defaults(config.validation)
    known = TrainedOn.load(checkpoint.resolve().parents[1])
    return LatentDiffusionPipeline(vae, unet, text_encoder, tokenizer, config.diffusion, defaults, trained_on=known)
