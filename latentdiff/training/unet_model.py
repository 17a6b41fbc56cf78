"""The models that stage 2 starts from: the latent space of stage 1, or pixel space, and the text encoder.

And the pipeline that they are in a checkpoint, with the averaged weights.
"""

import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from latentdiff.config import (
    AutoencoderKLConfig,
    TextConfig,
    UNetConfig,
    UNetTrainingConfig,
    UNetValidationConfig,
    in_yaml,
    load_config,
    refuse_other_model,
    size_of,
    stage_of,
    validated,
)
from latentdiff.diffusion.schedule import BETAS
from latentdiff.evaluation.autoencoder import refuse_unfit
from latentdiff.formats.files import check_fit, load_strictly, read_safetensors, refuse_not_finite
from latentdiff.images import IMAGE_MODES
from latentdiff.models.autoencoder import AutoencoderKL, open_autoencoder
from latentdiff.models.initial_model import InitialModel, open_initial_unet, read_initial_model
from latentdiff.models.pixel_space import Autoencoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.pretrained_text import (
    MAX_TOKENS,
    AnyTextEncoder,
    Tokenizer,
    open_text_encoder,
    open_tokenizer,
)
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.pipeline import GenerationDefaults, LatentDiffusionPipeline
from latentdiff.pipeline.trained_on import MAX_WORDS, TrainedOn, words_of
from latentdiff.training.adapters import trained_network
from latentdiff.training.checkpoint import list_checkpoints
from latentdiff.training.ema import load_trained
from latentdiff.training.run_folder import has_model

CheckpointWeights = Literal["ema", "model"]  # of a checkpoint's files
# Of CLIPTextConfig: what no context depends on.
NOT_COMPUTED = {"attention_dropout", "projection_dim", "initializer_factor", "initializer_range"}
NOT_COMPUTED |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def open_latent_space(config: UNetTrainingConfig) -> tuple[UNetTrainingConfig, Autoencoder]:
    """The autoencoder of stage 1, frozen, or pixel space where `vae` is null; and the config with what follows from it.

    These are the UNet's channels and `model.sample_size`, unless they are given and not null.
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
    given = {key for key in config.model.model_fields_set if getattr(config.model, key) is not None}
    missing = {key: value for key, value in derived.items() if key not in given}
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
    """The config with the text encoder's width as the UNet's `cross_attention_dim`; ValueError if another is given."""
    if "cross_attention_dim" in config.model.model_fields_set:
        if config.model.cross_attention_dim != text_encoder.hidden_size:
            raise ValueError(
                f"model.cross_attention_dim is {config.model.cross_attention_dim}, but the text encoder "
                f"{config.text.pretrained or 'of text.config'} has the width {text_encoder.hidden_size}"
            )
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
    if (folder / "config.yaml").is_file() and not has_model(folder):
        command = shlex.join(["latentdiff", "train-vae", str(folder / "config.yaml")])
        raise ValueError(f"stage 1 in {vae} has not finished; run {command} first")
    if folder.is_dir():
        refuse_unfit(folder, accept=allow_unfit)
    autoencoder = open_autoencoder(vae, "vae", torch.float32).requires_grad_(False)
    refuse_not_finite(autoencoder.state_dict(), f"the autoencoder in {vae}")
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
    if config.pretrained is not None:
        return open_tokenizer(config.pretrained, text_encoder, MAX_TOKENS)
    return CLIPTokenizer.load(max_length=text_encoder.max_length, pad_token=config.pad_token)


def start_from(config: UNetTrainingConfig, vae: Autoencoder, unet: UNet, text_encoder: AnyTextEncoder) -> list[str]:
    """Give the UNet, and a text encoder that is trained, the weights in `init_from`; lines that say what was taken.

    That is a pipeline's folder, single file or hub id, perhaps of images of another size; null: nothing is done.
    Warns if its latents have another scale than those of `vae`. Raises ValueError if there is none, its models are not
    the config's or not finite, or its UNet predicts something else: such weights would be none to start from. With LoRA
    also if its noise schedule is another one, as the adapters are used with the model's own.
    """
    name = config.init_from
    if name is None:
        return []
    initial = read_initial_model(name, config.diffusion.prediction_type)
    if initial.schedule.prediction_type != config.diffusion.prediction_type:
        raise ValueError(
            f"diffusion.prediction_type is {config.diffusion.prediction_type}, but the UNet in {name} predicts "
            f"{initial.schedule.prediction_type}; leave it out"
        )
    if config.trains_adapters:
        _refuse_another_schedule(config, initial)
    refuse_other_model(config.model, initial.unet, "model", f"the UNet in {name}", {"sample_size"})
    _give(unet, open_initial_unet(name), f"the UNet in {name}")
    if config.text.pretrained is None:
        assert isinstance(text_encoder, TextEncoder), "all others are pretrained"
        place = f"the text encoder in {name}"
        refuse_other_model(text_encoder.config, initial.clip, "text.config", place, NOT_COMPUTED)
        _give(text_encoder, open_text_encoder(name), place)
    if initial.vae is not None and isinstance(vae, AutoencoderKL):
        _warn_of_another_scale(config, initial.vae, vae.config)
    return _what_is_taken(config, initial, vae)


def _refuse_another_schedule(config: UNetTrainingConfig, initial: InitialModel) -> None:
    for key in BETAS:
        ours, theirs = getattr(config.diffusion, key), getattr(initial.schedule, key)
        if ours != theirs:
            raise ValueError(
                f"diffusion.{key} is {ours}, but the model in {config.init_from} has {theirs}, with which the LoRA "
                "will be used; leave it out"
            )


def _warn_of_another_scale(config: UNetTrainingConfig, before: AutoencoderKLConfig, now: AutoencoderKLConfig) -> None:
    scales = [(one.scaling_factor, one.shift_factor or 0.0) for one in (before, now)]
    if scales[0] != scales[1]:
        (old, old_shift), (new, new_shift) = scales
        warnings.warn(
            f"the UNet in {config.init_from} was trained on latents of scaling_factor {old:g} and shift_factor "
            f"{old_shift:g}, those of vae {config.vae} have {new:g} and {new_shift:g}: it has to learn them anew",
            stacklevel=3,
        )


def _what_is_taken(config: UNetTrainingConfig, initial: InitialModel, vae: Autoencoder) -> list[str]:
    """Lines on what a training starts from, and on what it changes of the noise schedule."""
    name, before, now = config.init_from, initial.schedule, config.diffusion
    text = f"the text encoder of {config.text.pretrained}, frozen"
    if config.text.pretrained is None:
        text = "its text encoder, trained on"
    elif config.text.pretrained == name:
        text = "its text encoder, frozen"
    widths = "-".join(map(str, config.model.block_out_channels))
    said = "" if initial.says_prediction else " (the file does not say it)"
    scale = f"; latents scaled by {vae.config.scaling_factor:g}" if isinstance(vae, AutoencoderKL) else ""
    betas = "" if now.beta_schedule == "cosine" else f" {now.beta_start:g} .. {now.beta_end:g}"
    snr = ", zero terminal SNR" if now.rescale_betas_zero_snr else ""
    return [
        f"starts from {name}: UNet of {widths} channels that predicts {now.prediction_type}{said}; {text}; noise "
        f"schedule {now.beta_schedule}{betas}, {now.num_train_timesteps:,} timesteps{snr}{scale}",
        *(
            f"diffusion.{key} is {getattr(now, key)}, in {name} it is {getattr(before, key)}"
            for key in asdict(before)
            if getattr(now, key) != getattr(before, key)
        ),
    ]


def _give(model: nn.Module, source: nn.Module, place: str) -> None:
    """Copy the weights of another model of the same kind."""
    weights = source.state_dict()
    check_fit(model.state_dict(), weights, place)
    refuse_not_finite(weights, place)
    model.load_state_dict(weights)


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
        before = TrainedOn.load(read_initial_model(config.init_from, config.diffusion.prediction_type).path)
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
        assert config.init_from is not None
        _give(unet, open_initial_unet(config.init_from), f"the UNet in {config.init_from}")
    network = trained_network(config, unet, text_encoder)
    path = checkpoint / f"{weights}.safetensors"
    given = read_safetensors(path)
    if config.trains_adapters:
        load_trained(network, given, str(path))
    else:
        load_strictly(network, given, str(path))
    network.eval()
    tokenizer = build_tokenizer(config.text, text_encoder)
    defaults = generation_defaults(config.validation)
    known = TrainedOn.load(checkpoint.resolve().parents[1])
    return LatentDiffusionPipeline(vae, unet, text_encoder, tokenizer, config.diffusion, defaults, trained_on=known)
