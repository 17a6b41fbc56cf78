"""The validated configs: one YAML a stage, `a.b=value` overrides, and the models' diffusers config.json keys.

An unknown key, a wrong type or a value out of range is one line that names the file, the key and what would be right.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

# Written into exported folders: diffusers overrides the sample_size of folders from versions before 0.9.0.
DIFFUSERS_VERSION = "0.42.1"

Count = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Colour = Annotated[int, Field(ge=0, le=255, strict=True)]


def _no_truth_value(value: Any) -> Any:
    """pydantic takes true for 1.0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value!r}")
    return value


Share = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0, le=1.0)]
Positive = Annotated[float, BeforeValidator(_no_truth_value), Field(gt=0.0)]
NonNegative = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0)]


class Section(BaseModel):
    """A part of a config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


# ----------------------------------------------------------------------------------------------------------------------
# Models: the keys of diffusers' config.json


class ModelConfig(Section):
    """Base of the model configs. `fixed` lists diffusers' further keys and the one value of each that is built here."""

    diffusers_class: ClassVar[str]
    fixed: ClassVar[dict[str, Any]]

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_built(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if key in cls.fixed:
                if value != cls.fixed[key]:
                    raise ValueError(f"{key} is {value!r}, but only {cls.fixed[key]!r} is supported")
            elif not str(key).startswith("_"):
                kept[key] = value
        return kept

    @classmethod
    def from_diffusers(cls, values: dict[str, Any], place: str) -> Self:
        """Read the contents of a config.json found at `place`. Keys that say nothing (null, false) may be unknown."""
        kept = {k: v for k, v in values.items() if k in cls.model_fields or k in cls.fixed or v not in (None, False)}
        return validated(cls, kept, place)

    def to_diffusers(self) -> dict[str, Any]:
        """The full contents of diffusers' config.json."""
        head = {"_class_name": self.diffusers_class, "_diffusers_version": DIFFUSERS_VERSION}
        return head | self.fixed | self.model_dump(mode="json")

    def _check_widths(self) -> None:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {width}, which norm_num_groups {self.norm_num_groups} does not divide"
                )

    @property
    def downsampling(self) -> int:
        """Factor by which the lowest level is smaller than the input: a power of two."""
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderKLConfig(ModelConfig):
    """Diffusers' AutoencoderKL keys. Defaults are diffusers' own, which old files rely on (`scaling_factor`)."""

    diffusers_class = "AutoencoderKL"
    fixed = {"act_fn": "silu", "latents_mean": None, "latents_std": None}

    sample_size: Count = 32
    in_channels: Annotated[int, Field(ge=1, le=4)] = 3
    out_channels: Annotated[int, Field(ge=1, le=4)] = 3
    latent_channels: Count = 4
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1)]
    layers_per_block: Count = 1
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...]
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...]
    norm_num_groups: Count = 32
    scaling_factor: Positive = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="before")
    @classmethod
    def _block_types(cls, values: Any) -> Any:
        """The block types, of which there is one kind, may be left out."""
        if isinstance(values, dict) and isinstance(values.get("block_out_channels"), Sequence):
            levels = len(values["block_out_channels"])
            kinds = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
            values = {key: kind * levels for key, kind in kinds.items()} | values
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_widths()
        for key in ("down_block_types", "up_block_types"):
            if len(getattr(self, key)) != len(self.block_out_channels):
                raise ValueError(
                    f"{key} has {len(getattr(self, key))} entries, block_out_channels has "
                    f"{len(self.block_out_channels)}"
                )
        return self


class UNetConfig(ModelConfig):
    """Diffusers' UNet2DConditionModel keys, for the Stable Diffusion 1 and 2 structures.

    One kind of block is our own, which diffusers refuses: LinearAttn{Down,Up}Block2D, where self-attention is linear.
    """

    diffusers_class = "UNet2DConditionModel"
    fixed = {
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "mid_block_scale_factor": 1,
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "dropout": 0.0,
        "addition_embed_type_num_heads": 64,
        "cross_attention_norm": None,
    }

    sample_size: Count | None = None
    in_channels: Count = 4
    out_channels: Count = 4
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1)]
    layers_per_block: Count = 2
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "LinearAttnDownBlock2D", "DownBlock2D"], ...]
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "LinearAttnUpBlock2D", "UpBlock2D"], ...]
    cross_attention_dim: Count = 1280
    attention_head_dim: Count | tuple[Count, ...] = 8
    num_attention_heads: Count | tuple[Count, ...] | None = None
    transformer_layers_per_block: Count | tuple[Count, ...] = 1
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: Count = 32
    norm_eps: Positive = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: NonNegative = 0

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads per level. Diffusers' `attention_head_dim` is the *number* of heads (its naming quirk)."""
        return self._per_level(self.num_attention_heads or self.attention_head_dim)

    @property
    def transformer_depths(self) -> tuple[int, ...]:
        """Transformer blocks per level."""
        return self._per_level(self.transformer_layers_per_block)

    @property
    def embedding_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]

    def _per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_widths()
        levels = len(self.block_out_channels)
        for key, value in [
            ("down_block_types", self.down_block_types),
            ("up_block_types", self.up_block_types),
            ("attention_head_dim", self.heads),
            ("transformer_layers_per_block", self.transformer_depths),
        ]:
            if len(value) != levels:
                raise ValueError(f"{key} has {len(value)} entries, block_out_channels has {levels}")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"block_out_channels has {width}, which {heads} attention heads do not divide")
        return self


# ----------------------------------------------------------------------------------------------------------------------
# Training


class DataConfig(Section):
    """Captioned pictures and how they become pixels."""

    source: str  # "embedded", a folder with metadata.jsonl, parquet file(s), or a `datasets` id on the hub
    split: str = "train"  # split to train on
    validation_split: str | None = None  # split to validate on; null: hold pictures out of `split`
    holdout: NonNegativeInt = 0  # pictures held out for validation when validation_split is null
    limit: Count | None = None  # use only this many pictures, drawn once; null: all
    image_column: str = "image"
    caption_column: str | None = "text"  # null: no captions
    size: Count  # height and width of the training pictures, pixels
    crop: Literal["center", "random"] = "center"  # where to cut the square after resizing the shorter side to `size`
    flip: Share = 0.0  # probability of a left-right flip
    repeat: Count = 1  # times that a picture may come in a batch, which may then be larger than the set
    background: tuple[Colour, Colour, Colour] = (255, 255, 255)  # under transparency, RGB
    max_unreadable: Share = 0.01  # share of unreadable pictures that is skipped; more stops the run
    num_workers: NonNegativeInt = 0  # decoding processes; 0: in the training process


class OptimizerConfig(Section):
    """AdamW and its learning rate as a function of the step."""

    lr: Positive | None = None  # null: lr_stages says it
    lr_schedule: Literal["constant", "linear", "cosine", "staged"] = "constant"
    lr_stages: Annotated[tuple[tuple[Positive, Count], ...], Field(min_length=1)] | None = None  # (lr, steps), in turn
    warmup_steps: NonNegativeInt = 0  # linear from 0, optimiser steps
    final_lr: NonNegative = 0.0  # where linear and cosine end
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01  # on matrices and convolutions, not on biases and norms
    max_grad_norm: Positive | None = 1.0  # global gradient norm to clip at; null: off

    @model_validator(mode="after")
    def _rate_is_given_once(self) -> Self:
        if self.lr_schedule == "staged":
            if self.lr is not None or self.lr_stages is None:
                raise ValueError("lr_schedule staged takes lr_stages, a list of [lr, steps], and no lr")
        elif self.lr is None or self.lr_stages is not None:
            raise ValueError(f"lr_schedule {self.lr_schedule} takes lr, and no lr_stages")
        return self


class EMAConfig(Section):
    """The average of the weights that is validated and published, and the snapshots for `latentdiff ema`."""

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999  # after its warm-up
    snapshot_every: Count | None = None  # optimiser steps between snapshots of the power-function averages; null: none
    snapshot_lengths: tuple[Annotated[float, Field(gt=0.0, lt=0.28)], ...] = (0.05, 0.10)  # shares of the training

    @model_validator(mode="after")
    def _two_lengths(self) -> Self:
        if len(set(self.snapshot_lengths)) < 2:
            raise ValueError(f"snapshot_lengths {list(self.snapshot_lengths)} must have at least two different lengths")
        return self


class TrainConfig(Section):
    """Length, batch and precision."""

    seed: Seed = 0
    steps: Count  # optimiser steps
    batch_size: Count  # pictures an optimiser step, over all processes and accumulation
    # Pictures a forward pass of one process; null: batch_size / processes; auto: the most that fit into memory.
    micro_batch_size: Count | Literal["auto"] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device has it
    tf32: bool = True  # float32 products on NVIDIA GPUs with 10-bit mantissas: faster
    channels_last: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile: a slow first step, then faster ones
    deterministic: bool = False  # on a GPU: only kernels that repeat bit for bit (on a CPU they always do)
    max_skipped_steps: NonNegativeInt = 20  # in a row, for a loss or gradient that is not finite; more stops the run

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any) -> Any:
        if value not in (None, "auto") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"must be a number of at least 1, auto or null, got {value!r}")
        return value


class VAETrainConfig(TrainConfig):
    """Stage 1's further keys."""

    crop_size: Count | None = None  # pixels of a random square of each picture that is trained on; null: all of it


class UNetTrainConfig(TrainConfig):
    """Stage 2's further keys."""

    cache_latents: bool = True  # encode pictures (and captions) once, before training; false: again at every step
    cache_folder: str | None = None  # where caches are kept, for several runs to share; null: in output.folder


class OutputConfig(Section):
    """Where a run lives and how often it is saved."""

    folder: str
    checkpoint_every: Count  # optimiser steps
    keep: Count = 2  # newest checkpoints that are kept
    keep_every: Count | None = None  # optimiser steps; checkpoints at multiples of it are kept for good; null: none


class LoggingConfig(Section):
    every: Count = 10  # optimiser steps between lines of metrics.jsonl
    progress: bool = True  # tqdm bar
    log_with: tuple[Literal["tensorboard", "wandb"], ...] = ()  # trackers, besides metrics.jsonl


class VAELossConfig(Section):
    """Stage 1: reconstruction + kl_weight * KL (+ perceptual, adversarial), each from its start step on."""

    reconstruction: Literal["mse", "l1", "huber", "charbonnier"] = "mse"
    learned_variance: bool = False  # the reconstruction error's scale is learned (one number), against the other terms
    kl_weight: NonNegative  # of the KL per pixel value: nats summed over a picture's latents / (channels * H * W)
    kl_start: NonNegativeInt = 0  # optimiser step
    perceptual: Literal["ms_ssim", "gradient", "frequency", "lpips"] | None = None
    perceptual_weight: NonNegative = 1.0
    perceptual_start: NonNegativeInt = 0
    perceptual_weights: str | None = None  # of lpips: folder or hub id of VGG16's weights; null: where users have them
    adversarial: Literal["hinge", "non_saturating"] | None = None
    adversarial_weight: NonNegative = 0.5
    adversarial_start: NonNegativeInt = 1000
    adversarial_adaptive: bool = True  # balance its gradient with the reconstruction's at the decoder's last layer
    adversarial_margin: NonNegative = 0.1  # share by which reconstruction may get worse before it is held
    discriminator_width: Count = 64
    discriminator_layers: Count = 3
    discriminator_lr_factor: Positive = 1.0  # of optimizer.lr


class VAEValidationConfig(Section):
    every: Count  # optimiser steps between validations and sample grids
    pictures: Count = 8  # pictures in the sample grid
    batch_size: Count = 16


class UNetValidationConfig(Section):
    every: Count  # optimiser steps between validation losses
    bins: Count = 10  # of the timesteps, for each of which the validation loss is told
    max_pictures: Count | None = None  # held-out pictures that the loss is measured on; null: all
    batch_size: Count = 16
    sample_every: Count  # optimiser steps between sample grids
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    # Pictures in a sample grid, going round the prompts; if there are fewer, the next grid goes on where one ended.
    num_samples: Count | None = None  # null: one of each prompt
    sampler: Literal[
        "ddpm",
        "ddim",
        "euler",
        "euler_ancestral",
        "lcm",
        "heun",
        "dpm2",
        "dpm2_ancestral",
        "dpm++2s",
        "pndm",
        "lms",
        "deis",
        "dpm++2m",
        "dpm++2m_sde",
        "dpm++3m_sde",
        "unipc",
    ] = "ddim"
    sigmas: Literal["schedule", "karras", "exponential", "beta"] = "schedule"
    num_inference_steps: Count = 50
    guidance_scale: NonNegative = 5.0
    seed: Seed = 0


class TextConfig(Section):
    """The text encoder: a frozen pretrained one, or a small one that is trained together with the UNet."""

    pretrained: str | None = None  # folder or hub id of a CLIP text model, kept frozen
    config: dict[str, Any] | None = None  # CLIPTextConfig keys of one that is trained from random weights

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError("give either pretrained (a folder or hub id) or config (of one to train), not both")
        tokens = (self.config or {}).get("max_position_embeddings", 77)
        if isinstance(tokens, int) and tokens < 3:
            raise ValueError(
                f"config.max_position_embeddings is {tokens}, must be at least 3 tokens: start, one of the caption, end"
            )
        return self


class DiffusionConfig(Section):
    """The noise schedule, in the keys of diffusers' scheduler_config.json, offset noise and caption dropout."""

    num_train_timesteps: Count = 1000
    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: Positive = 0.00085
    beta_end: Positive = 0.012
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "trailing"
    steps_offset: NonNegativeInt = 1  # of leading spacing; 1 is what diffusers assumes
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    offset_noise: NonNegative = 0.0  # standard deviation of a shift of each channel's noise in training; 0: none
    # Share of captions replaced by the empty one, for classifier-free guidance; [from, to]: linear over the steps.
    caption_dropout: Share | tuple[Share, Share] = 0.1

    @field_validator("caption_dropout", mode="before")
    @classmethod
    def _one_or_two_shares(cls, value: Any) -> Any:
        pair = isinstance(value, list | tuple)
        shares = value if pair else [value]
        numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
        if not numbers or (pair and len(shares) != 2) or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"must be a share in 0 .. 1, or two of them: [from, to], got {value!r}")
        return value


class UNetLossConfig(Section):
    """Stage 2: the error of the network's output, and how much each noise level counts (`diffusion.Objective`)."""

    error: Literal["mse", "l1", "huber"] = "mse"
    huber_delta: Positive = 1.0  # where huber turns from a square into a line
    weighting: Literal["constant", "min_snr", "p2"] = "constant"
    min_snr_gamma: Positive = 5.0
    p2_gamma: NonNegative = 1.0


class VAETrainingConfig(Section):
    """All of train_vae.py's config."""

    data: DataConfig
    model: AutoencoderKLConfig
    start_from: str | None = None  # folder of an autoencoder to go on from instead of random weights
    trained_part: Literal["all", "decoder"] = "all"  # decoder: the latents stay what they were; needs start_from
    loss: VAELossConfig
    optimizer: OptimizerConfig
    train: VAETrainConfig
    ema: EMAConfig = EMAConfig()
    validation: VAEValidationConfig
    logging: LoggingConfig = LoggingConfig()
    output: OutputConfig

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        f = self.model.downsampling
        if self.data.size % f:
            raise ValueError(f"data.size {self.data.size} is not divisible by {f}, the model's downsampling")
        if self.model.in_channels != self.model.out_channels:
            raise ValueError(
                f"model.in_channels {self.model.in_channels} and model.out_channels {self.model.out_channels} differ"
            )
        if self.trained_part == "decoder" and self.start_from is None:
            raise ValueError("trained_part decoder needs start_from, the autoencoder whose latents are to stay")
        crop = self.train.crop_size
        if crop is not None and (crop % f or crop > self.data.size):
            raise ValueError(
                f"train.crop_size is {crop}, must be a multiple of {f} and at most data.size {self.data.size}"
            )
        return self


class UNetTrainingConfig(Section):
    """All of train_unet.py's config."""

    vae: str | None  # folder of stage 1 (or a pipeline folder with one in vae/); null: pixel space, no autoencoder
    unfit_vae: Literal["refuse", "accept"] = "refuse"  # if its own report finds it unfit
    data: DataConfig
    model: UNetConfig
    text: TextConfig
    diffusion: DiffusionConfig
    loss: UNetLossConfig = UNetLossConfig()
    optimizer: OptimizerConfig
    train: UNetTrainConfig
    ema: EMAConfig = EMAConfig()
    validation: UNetValidationConfig
    logging: LoggingConfig = LoggingConfig()
    output: OutputConfig

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        hidden = (self.text.config or {}).get("hidden_size", self.model.cross_attention_dim)
        if hidden != self.model.cross_attention_dim:
            raise ValueError(
                f"text.config.hidden_size {hidden} is not model.cross_attention_dim {self.model.cross_attention_dim}"
            )
        if self.validation.num_inference_steps > self.diffusion.num_train_timesteps:
            raise ValueError(
                f"validation.num_inference_steps {self.validation.num_inference_steps} is more than "
                f"diffusion.num_train_timesteps {self.diffusion.num_train_timesteps}"
            )
        if self.loss.weighting != "constant" and self.diffusion.rescale_betas_zero_snr:
            raise ValueError(
                f"loss.weighting {self.loss.weighting} gives pure noise no weight, so with "
                "diffusion.rescale_betas_zero_snr the first step of sampling would be untrained; must be constant"
            )
        self._check_guidance()
        return self

    def _check_guidance(self) -> None:
        """Guidance needs a prompt's branch and a trained empty one."""
        scale = self.validation.guidance_scale
        if scale == 1:
            return
        if self.data.caption_column is None:
            raise ValueError(f"validation.guidance_scale is {scale}, must be 1 without captions (data.caption_column)")
        if self.diffusion.caption_dropout in (0, (0, 0)):
            raise ValueError(
                f"validation.guidance_scale is {scale}, which needs the empty caption, but it is never trained with "
                "diffusion.caption_dropout 0: must be 1, or the dropout above 0"
            )
        if self.diffusion.caption_dropout in (1, (1, 1)):
            raise ValueError(
                f"validation.guidance_scale is {scale}, which needs captions, but diffusion.caption_dropout "
                "1 drops them all: must be 1, or the dropout below 1"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Reading

AnySection = TypeVar("AnySection", bound=Section)


def load_config(kind: type[AnySection], path: str | Path, overrides: Sequence[str] = ()) -> AnySection:
    """Read a YAML config and apply `a.b=value` overrides (values are YAML too).

    Raises ValueError with one line a problem: file missing or not YAML, unknown key, wrong type, value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {path} must hold sections such as data, model and train, not {values!r}")
    for override in overrides:
        _apply_override(values, override)
    return validated(kind, values, str(path))


def validated(kind: type[AnySection], values: dict[str, Any], place: str) -> AnySection:
    """Build a config section; all problems come in one ValueError, a line each, starting with `place`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"{place}: {_explain(kind, problem)}" for problem in error.errors()]
        raise ValueError("\n".join(lines)) from None


def to_yaml(config: Section) -> str:
    """A config as YAML with every key, so that the file alone repeats the run."""
    # Through JSON, so that tuples become plain lists.
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: {text!r} is not a YAML value") from None


def _explain(kind: type[Section], problem: dict[str, Any]) -> str:
    """One line for one of pydantic's error dicts."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(kind, problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if problem["type"] == "missing":
        return f"key {where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, got {problem['input']!r}"


def _keys_at(kind: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        kind = kind.model_fields[str(part)].annotation
    return list(kind.model_fields)
