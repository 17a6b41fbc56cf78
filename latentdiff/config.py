"""The validated configs: one YAML a stage, `a.b=value` overrides, and the models' diffusers config.json keys.

An unknown key, a wrong type or a value out of range is one line that names the file, the key and what would be right.
"""

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from latentdiff.diffusion.objective import Objective
from latentdiff.diffusion.samplers import SAMPLERS, get_sampler
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.timesteps import Sigmas
from latentdiff.images import MAX_SIDE
from latentdiff.printable import cut, shortened, shown
from latentdiff.recipes import no_config

MAX_CONFIG_BYTES = 200_000  # of a YAML file, which is read in about a second
# Written into exported folders: diffusers overrides the sample_size of folders from versions before 0.9.0.
DIFFUSERS_VERSION = "0.42.1"
# Stable Diffusion 1 and 2's scaling_factor, diffusers' default. ComfyUI, kohya's scripts and A1111 have it fixed.
STABLE_DIFFUSION_SCALING_FACTOR = 0.18215

ReconstructionName = Literal["mse", "l1", "huber", "charbonnier"]
AdversarialKind = Literal["hinge", "non_saturating"]
Compile = Literal["off", "blocks", "step"]

# What the linear layers of CLIP's text encoder are called; the UNet has no such names.
CLIP_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"})

Count = Annotated[int, Field(ge=1, strict=True)]
Width = Annotated[int, Field(ge=1, le=65_536, strict=True)]
Layers = Annotated[int, Field(ge=1, le=64, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE, strict=True)]
# Of images or latents: the side of a square, or (height, width). A pair of equal numbers becomes one number.
Size = Annotated[
    Side | tuple[Side, Side],
    AfterValidator(lambda size: size[0] if isinstance(size, tuple) and size[0] == size[1] else size),
]
Workers = Annotated[int, Field(ge=0, le=1024, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Colour = Annotated[int, Field(ge=0, le=255, strict=True)]


def _no_truth_value(value: Any) -> Any:
    """pydantic takes true for 1.0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value!r}")
    return value


Fraction = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0, le=1.0)]
Positive = Annotated[float, BeforeValidator(_no_truth_value), Field(gt=0.0)]
NonNegative = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0)]


def shape_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a `Size`."""
    return size if isinstance(size, tuple) else (size, size)


def size_of(shape: tuple[int, int]) -> int | tuple[int, int]:
    """The `Size` of a height and width."""
    return shape[0] if shape[0] == shape[1] else shape


def in_yaml(size: int | tuple[int, int] | None) -> str:
    """A `Size` as a config has it: 64, or [48, 80]."""
    return str(list(size) if isinstance(size, tuple) else size)


class Section(BaseModel):
    """A part of a config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,  # opening a pipeline needs few of the sections
    )


# ----------------------------------------------------------------------------------------------------------------------
# Models: the keys of diffusers' and transformers' config.json


class ModelConfig(Section):
    """Base of the model configs. fixed: further keys of diffusers, each with the one supported value."""

    diffusers_class: ClassVar[str]
    fixed: ClassVar[dict[str, Any]]

    if TYPE_CHECKING:  # fields of both subclasses
        block_out_channels: tuple[int, ...]
        norm_num_groups: int

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_built(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if key in cls.fixed:
                if value != cls.fixed[key]:
                    raise ValueError(f"{key} is {shortened(value)}, but only {cls.fixed[key]!r} is supported")
            elif not str(key).startswith("_"):
                kept[key] = value
        return kept

    @classmethod
    def from_diffusers(cls, values: dict[str, Any], place: str) -> Self:
        """Read a config.json found at `place`. Unknown keys are allowed if they are off (null, false).

        Raises ValueError that names the first problem: the file is rarely one's own to correct.
        """
        kept = {k: v for k, v in values.items() if k in cls.model_fields or k in cls.fixed or v not in (None, False)}
        return _first_problem(cls, kept, place)

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

    sample_size: Size = 32
    """Size of the training images, pixels: one number or [height, width]; left out in training: data.size."""
    in_channels: Annotated[int, Field(ge=1, le=4, strict=True)] = 3
    """Channels of the images."""
    out_channels: Annotated[int, Field(ge=1, le=4, strict=True)] = 3
    """Channels of the reconstructions; equal to in_channels."""
    latent_channels: Width = 4
    """Channels of the latents."""
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
    """Channels of each level, from full resolution down; each level but the last halves the size."""
    layers_per_block: Layers = 1
    """Residual blocks per level of the encoder; the decoder has one more."""
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    """Encoder block of each level, of one kind; left out: as many as there are levels."""
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    """Decoder block of each level, of one kind; left out: as many as there are levels."""
    norm_num_groups: Count = 32
    """Groups of each group norm; must divide every width."""
    scaling_factor: Positive = STABLE_DIFFUSION_SCALING_FACTOR
    """Factor that gives the latents unit scale; training from random weights makes this one right."""
    shift_factor: float | None = None
    """Mean subtracted from the latents before scaling; null: none."""
    force_upcast: bool = True
    """For diffusers: decode in float32 although the pipeline is in float16."""
    use_quant_conv: bool = True
    """1x1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """1x1 convolution before the decoder."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest level."""

    @model_validator(mode="before")
    @classmethod
    def _block_types(cls, values: Any) -> Any:
        """Fill in the block types if they are missing, as there is only one kind."""
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
        "cross_attention_norm": None,
    }

    sample_size: Size | None = None
    """Size of the latents, one number or [height, width]; null: data.size divided by the autoencoder's downsampling."""
    in_channels: Width = 4
    """Channels of the latents."""
    out_channels: Width = 4
    """Channels of the output; equal to in_channels."""
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
    """Channels of each level, from full resolution down; each level but the last halves the size."""
    layers_per_block: Layers = 2
    """Residual blocks per level on the way down; one more on the way up."""
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "LinearAttnDownBlock2D", "DownBlock2D"], ...]
    """Block of each level on the way down; LinearAttn: linear self-attention, not in diffusers."""
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "LinearAttnUpBlock2D", "UpBlock2D"], ...]
    """Block of each level on the way up, in the reverse order of down_block_types."""
    cross_attention_dim: Width = 1280
    """Width of the context: the text encoder's hidden_size."""
    attention_head_dim: Count | tuple[Count, ...] = 8
    """Number of attention heads, of all levels or a list with one number per level (diffusers' name for it)."""
    num_attention_heads: Count | tuple[Count, ...] | None = None
    """The same under its proper name; takes precedence over attention_head_dim."""
    transformer_layers_per_block: Layers | tuple[Layers, ...] = 1
    """Transformer blocks after each residual block, of all levels or a list."""
    use_linear_projection: bool = False
    """Linear layers instead of 1x1 convolutions around the transformer blocks (Stable Diffusion 2)."""
    upcast_attention: bool = False
    """Compute attention weights in float32."""
    norm_num_groups: Count = 32
    """Groups of each group norm; must divide every width."""
    norm_eps: Positive = 1e-5
    """Epsilon of the group norms."""
    flip_sin_to_cos: bool = True
    """Cosines before sines in the timestep embedding."""
    freq_shift: NonNegative = 0
    """Subtracted from the number of frequencies of the timestep embedding."""
    addition_embed_type: Literal["text"] | None = None
    """text: add the context, pooled by attention, to the timestep embedding; null: the context is read by
    cross-attention alone."""
    addition_embed_type_num_heads: Count = 64
    """For text: attention heads of the pooling; must divide cross_attention_dim."""

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads per level. Diffusers' `attention_head_dim` is the *number* of heads (its naming quirk)."""
        return self._per_level(self.num_attention_heads or self.attention_head_dim)

    @property
    def has_linear_attention(self) -> bool:
        """Whether a block is of the kind that only this project has."""
        return any(kind.startswith("LinearAttn") for kind in (*self.down_block_types, *self.up_block_types))

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
        if (blocks := self.layers_per_block * sum(self.transformer_depths)) > 1024:
            raise ValueError(f"layers_per_block times transformer_layers_per_block are {blocks} blocks, at most 1024")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"block_out_channels has {width}, which {heads} attention heads do not divide")
        if self.addition_embed_type == "text" and self.cross_attention_dim % self.addition_embed_type_num_heads:
            raise ValueError(
                f"addition_embed_type_num_heads {self.addition_embed_type_num_heads} does not divide "
                f"cross_attention_dim {self.cross_attention_dim}"
            )
        return self


class CLIPTextConfig(Section):
    """transformers' CLIPTextConfig keys of CLIP's text transformer. Defaults are transformers' own."""

    # Further keys of transformers, which say nothing of what the model computes: of the file, of transformers itself
    # and, from old versions, of text generation.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        "architectures attn_implementation chunk_size_feed_forward dtype id2label is_encoder_decoder label2id "
        "length_penalty max_length model_type num_beam_groups num_beams num_return_sequences output_attentions "
        "output_hidden_states problem_type repetition_penalty return_dict return_dict_in_generate temperature "
        "tie_encoder_decoder tie_word_embeddings top_k top_p torch_dtype torchscript transformers_version typical_p "
        "use_cache".split()
    )

    vocab_size: Count = 49_408
    """Number of tokens; CLIP's tokenizer has 49,408."""
    hidden_size: Width = 512
    """Width of the context."""
    intermediate_size: Width = 2048
    """Width inside the feed-forwards."""
    num_hidden_layers: Annotated[int, Field(ge=0, le=256, strict=True)] = 12
    """Transformer layers."""
    num_attention_heads: Count = 8
    """Attention heads; must divide hidden_size."""
    max_position_embeddings: Count = 77
    """Most tokens of a text, start and end included."""
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the feed-forwards: OpenAI's CLIP has quick_gelu, OpenCLIP's (Stable Diffusion 2) gelu."""
    layer_norm_eps: Positive = 1e-5
    """Added to the variance in the layer norms."""
    initializer_factor: NonNegative = 1.0
    """Factor of all standard deviations of the random weights."""
    # For other readers: they change nothing here.
    attention_dropout: Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0, le=0.0)] = 0.0
    """Dropout of attention weights, which is not supported: 0."""
    projection_dim: Annotated[int, Field(ge=0, strict=True)] | None = 512
    """Width of the space that images and texts share in a whole CLIPModel."""
    initializer_range: NonNegative = 0.02
    """Not used by CLIP's text transformer."""
    bos_token_id: Annotated[int, Field(strict=True)] | None = 49_406
    """Id of the start token."""
    eos_token_id: Annotated[int, Field(strict=True)] | list[int] | None = 49_407
    """Id of the end token."""
    pad_token_id: Annotated[int, Field(strict=True)] | None = 1
    """Id of the padding."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_counts(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if k not in cls.without_effect and not str(k).startswith("_")}

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, which num_attention_heads {self.num_attention_heads} "
                "does not divide"
            )
        return self

    @classmethod
    def from_transformers(cls, values: dict[str, Any], place: str) -> Self:
        """Read the contents of a config.json found at `place`; of a whole CLIPModel, its text part.

        Unknown keys are allowed if they are off (null, false, 0, empty).
        Raises ValueError that names the first problem.
        """
        if values.get("model_type") == "clip" or "text_config" in values:
            newer, older = values.get("text_config") or {}, values.get("text_config_dict")
            if older:  # complete and first in rank, as transformers reads it
                defaults = {name: field.default for name, field in cls.model_fields.items()}
                newer = newer | defaults | older
            values = newer
        return _first_problem(cls, {k: v for k, v in values.items() if k in cls.model_fields or v}, place)

    def to_transformers(self) -> dict[str, Any]:
        """What transformers' config.json has of it."""
        return self.model_dump(mode="json") | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}


# ----------------------------------------------------------------------------------------------------------------------
# Training: the docstring under each key is what `--explain` and configs/reference print


EMBEDDED = "embedded"
COMPOSITIONS = "embedded:compositions"


class DataConfig(Section):
    """Captioned images and how they become pixels."""

    source: str
    """"embedded", "embedded:compositions", a folder, .zip, .tar or .parquet file(s), or a hub id; see docs/data.md."""
    objects: Count | Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """For embedded:compositions: the first so many of the 64 drawn objects, or their names; null: 24."""
    pairs: NonNegativeInt = 0
    """For embedded:compositions: training images of two objects side by side, besides those of one."""
    split: str | None = None
    """Split to train on: a sub-folder, or what a data set calls so; null: all of a folder, else "train"."""
    validation_source: str | None = None
    """Another source to validate on; null: see validation_split and holdout."""
    validation_split: str | None = None
    """Split to validate on, of validation_source or else of source; `split` null then is "train"."""
    holdout: NonNegativeInt | Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Images held out for validation when validation_source and validation_split are null: how many, or below 1 which
    fraction of all, at least one of several; 0: none."""
    limit: Count | None = None
    """Use a random subset of this many images (fixed seed); null: all."""
    validation_limit: Count | None = None
    """The same for validation_split and validation_source."""
    stream_to: str | None = None
    """Folder to keep the images of a hub data set in, at about `size`; the originals are streamed and not kept."""
    image_column: str | None = None
    """Column of the images in parquet and hub data sets; null: the one that holds images."""
    captions: Literal["auto", "column", "sidecar", "file_name", "folder", "none"] = "auto"
    """Where captions are: in metadata or a column, in a .txt beside each image, the name of file or folder; or none."""
    caption_column: str | None = None
    """Column of the captions; null: the first of text, caption, prompt, ..., label that is there."""
    constant_caption: str | None = None
    """One caption for all images, instead of their own."""
    missing_captions: Literal["refuse", "drop", "empty"] = "refuse"
    """What to do if some images have no caption: stop, leave them out, or train them with the empty caption."""
    shuffle_caption: bool = False
    """Shuffle the comma-separated parts of a caption, differently in each epoch."""
    keep_tokens: NonNegativeInt = 0
    """Parts at the start of a caption that shuffle_caption leaves in place."""
    size: Size
    """Size of the training images, pixels: one number for squares, or [height, width]."""
    buckets: bool | None = None
    """Train each image in a shape near its own, of about size x size pixels; null: if the images have several shapes
    and squares would cut away 5 % of the pixels or more."""
    min_size: Side | None = None
    """Leave out images whose shorter side has fewer pixels, with a warning; null: none."""
    crop: Literal["center", "random"] = "center"
    """Where to crop an image that was resized to cover the training size."""
    flip: Fraction = 0.0
    """Probability of a left-right flip."""
    repeat: Count = 1
    """How often one image may appear in a batch; allows batches larger than the data set."""
    background: tuple[Colour, Colour, Colour] = (255, 255, 255)
    """Colour under transparent images, RGB 0 .. 255."""
    max_unreadable: Fraction = 0.01
    """Fraction of unreadable images that is skipped with a warning; more is an error."""
    num_workers: Workers = 0
    """Decoding processes; 0: in the training process."""

    @model_validator(mode="after")
    def _compositions_need_their_source(self) -> Self:
        if self.source != COMPOSITIONS and (self.objects is not None or self.pairs):
            raise ValueError(f"objects and pairs are of source {COMPOSITIONS}, but source is {self.source!r}")
        if self.source == COMPOSITIONS and isinstance(self.size, tuple):
            raise ValueError(f"size is {in_yaml(self.size)}, must be one number: {COMPOSITIONS} draws squares")
        if self.buckets and isinstance(self.size, tuple):
            raise ValueError(f"size is {in_yaml(self.size)}, must be one number where buckets is true")
        return self

    @model_validator(mode="after")
    def _only_tables_are_streamed(self) -> Self:
        if self.stream_to is not None and self.source in (EMBEDDED, COMPOSITIONS):
            raise ValueError(f"stream_to is for data sets of the hub, but source is {self.source}")
        return self

    @model_validator(mode="after")
    def _captions_are_chosen_once(self) -> Self:
        if self.constant_caption is not None and (self.captions != "auto" or self.caption_column is not None):
            raise ValueError("constant_caption replaces all captions, so captions and caption_column must not be set")
        if self.caption_column is not None and self.captions not in ("auto", "column", "none"):
            raise ValueError(f"caption_column is {self.caption_column!r}, but captions is {self.captions}")
        if self.keep_tokens and not self.shuffle_caption:
            raise ValueError(f"keep_tokens is {self.keep_tokens}, but shuffle_caption is false")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the training images, pixels; with buckets that of the square one."""
        return shape_of(self.size)

    @property
    def has_validation_set(self) -> bool:
        """Whether there are images to validate on that are not trained on."""
        return self.validation_source is not None or self.validation_split is not None or self.holdout > 0

    @property
    def used_holdout(self) -> float:
        """holdout where it counts: 0 where there are a source or a split to validate on."""
        return 0 if self.validation_source is not None or self.validation_split is not None else self.holdout

    def held_out_of(self, images: int) -> int:
        """How many of so many images are held out."""
        if not self.used_holdout or isinstance(self.holdout, int):
            return int(self.used_holdout)
        return min(images - 1, max(1, round(self.holdout * images)))  # the only image of a set is trained on

    @property
    def training_split(self) -> str | None:
        """The split to train on; None: all of a folder, "train" of what has splits."""
        beside = self.validation_source is None and self.validation_split is not None
        return "train" if self.split is None and beside else self.split


class OptimizerConfig(Section):
    """The optimiser and its learning rate as a function of the step."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the hidden layers' matrices and convolutions (Jordan 2024) with adamw for everything else."""
    lr: Positive | None = None
    """Peak learning rate; null: given by lr_stages."""
    lr_schedule: Literal["constant", "linear", "cosine", "staged"] = "constant"
    """Shape of the learning rate after the warm-up."""
    lr_stages: Annotated[tuple[tuple[Positive, Count], ...], Field(min_length=1)] | None = None
    """For staged: a list of [lr, optimiser steps], one after another, instead of lr."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up from 0, optimiser steps."""
    min_lr: NonNegative = 0.0
    """Learning rate at which linear and cosine end."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.01
    """On matrices and convolutions, not on biases and norms."""
    max_grad_norm: Positive | None = 1.0
    """Global gradient norm to clip at; null: no clipping."""

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

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay per optimiser step, after a warm-up."""
    snapshot_every: Count | None = None
    """Optimiser steps between snapshots of the power-function averages; null: none."""
    snapshot_lengths: tuple[Annotated[float, Field(gt=0.0, lt=0.28)], ...] = (0.05, 0.10)
    """Lengths (sigma_rel) of the averages in a snapshot, fractions of the training; at least two."""

    @model_validator(mode="after")
    def _two_lengths(self) -> Self:
        if len(set(self.snapshot_lengths)) < 2:
            raise ValueError(f"snapshot_lengths {list(self.snapshot_lengths)} must have at least two different lengths")
        return self


class TrainConfig(Section):
    """Length, batch and precision."""

    seed: Seed = 0
    """Seed of every random number of the run."""
    steps: Count
    """Optimiser steps."""
    batch_size: Count
    """Images per optimiser step, over all processes and accumulation."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Images per forward pass of one process; null: batch_size / processes; auto: the most that fit into memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute type; auto: bf16 where the device is fast with it, else fp32."""
    weights: Literal["float32", "bf16"] = "float32"
    """What forward and backward pass compute with; bf16: the trained float32 weights, rounded once per step."""
    tf32: bool = True
    """float32 products on NVIDIA GPUs with 10-bit mantissas: faster."""
    channels_last: bool | None = None
    """Memory layout of the weights and activations; null: true on NVIDIA GPUs, which are faster with it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, less memory."""
    compile: Compile = "off"
    """torch.compile: of each kind of block, seconds at the start; or the whole step, minutes, fastest on GPUs."""
    deterministic: bool = False
    """On a GPU, only kernels that repeat bit for bit (a CPU always does)."""
    max_skipped_steps: NonNegativeInt = 20
    """Steps in a row that may be skipped for a loss or gradient that is not finite; more stop the run."""

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any) -> Any:
        if value not in (None, "auto") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"must be a number of at least 1, auto or null, got {value!r}")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # how YAML reads off

    @model_validator(mode="after")
    def _weights_fit_the_precision(self) -> Self:
        if self.weights == "bf16" and self.precision not in ("auto", "bf16"):
            raise ValueError(f"precision is {self.precision}, but weights bf16 compute in bf16; set precision to auto")
        return self

    @property
    def wanted_precision(self) -> Literal["auto", "fp32", "bf16", "fp16"]:
        """precision, which is bf16 with weights in bf16."""
        return "bf16" if self.weights == "bf16" else self.precision


class VAETrainConfig(TrainConfig):
    """Length, batch and precision of stage 1."""

    crop_size: Count | None = None
    """Side of a random square of each image to train on, pixels; null: the whole image."""
    whole_image_steps: NonNegativeInt = 0
    """Of `steps`, so many at the end on whole images, to which norms and attention adapt after crops."""


class UNetTrainConfig(TrainConfig):
    """Length, batch, precision and noise of stage 2."""

    caption_dropout: Fraction | tuple[Fraction, Fraction] = 0.1
    """Fraction of captions replaced by the unconditional prompt, for classifier-free guidance; [from, to]: linear."""
    offset_noise: NonNegative = 0.0
    """Standard deviation of a shift of each channel's noise (Guttenberg 2023); 0: none."""
    timestep_density: Literal["uniform", "logit_normal"] = "uniform"
    """How often each timestep is trained: all equally, or those in the middle more often (Esser et al. 2024)."""
    logit_mean: Annotated[float, BeforeValidator(_no_truth_value)] = 0.0
    """For logit_normal: mean of log(t / (1 - t)), t a fraction of the timesteps; above 0: more of the noisy ones."""
    logit_std: Positive = 1.0
    """For logit_normal: standard deviation of log(t / (1 - t)); the smaller, the more in the middle."""
    cache_latents: bool = True
    """Encode images (and captions) once, before training; false: at every step."""
    cache_folder: str | None = None
    """Folder of the latent cache, which several runs can share; null: in output.folder."""

    @field_validator("caption_dropout", mode="before")
    @classmethod
    def _one_or_two_fractions(cls, value: Any) -> Any:
        pair = isinstance(value, list | tuple)
        fractions = value if pair else [value]
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in fractions)
        if not numbers or (pair and len(fractions) != 2) or not all(0 <= one <= 1 for one in fractions):
            raise ValueError(f"must be a fraction in 0 .. 1, or two of them: [from, to], got {value!r}")
        return value


class OutputConfig(Section):
    """Where a run lives and how often it is saved."""

    folder: str
    """Folder of the run."""
    checkpoint_every: Count
    """Optimiser steps between checkpoints."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every: Count | None = None
    """Keep checkpoints at multiples of this many optimiser steps permanently; null: none."""
    publish: Literal["best", "last"] | None = None
    """Weights of the final model: those of the best step, by validation/loss (stage 1: validation/mse), or of the last;
    null: best with a validation set and no adversarial loss, else last."""


class LoggingConfig(Section):
    """What is logged while training."""

    every: Count = 10
    """Optimiser steps between lines of metrics.jsonl."""
    progress: bool = True
    """Show a progress bar."""
    log_with: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers to log to, besides metrics.jsonl."""


class VAELossConfig(Section):
    """Reconstruction + kl_weight * KL (+ perceptual + adversarial), each from its start step on."""

    reconstruction: ReconstructionName = "mse"
    """Reconstruction error, mean over pixel values in [-1, 1]."""
    learned_logvar: bool = False
    """Learn the log-variance of the reconstruction error (one number), which weights it against the other terms."""
    kl_weight: NonNegative
    """Weight of the KL per pixel value: nats summed over an image's latents / (channels * H * W)."""
    kl_start: NonNegativeInt = 0
    """Optimiser step from which the KL counts."""
    perceptual: Literal["ms_ssim", "lpips"] | None = None
    """Perceptual term; lpips needs VGG16's weights."""
    perceptual_weight: NonNegative = 1.0
    """Weight of the perceptual term."""
    perceptual_start: NonNegativeInt = 0
    """Optimiser step from which the perceptual term counts."""
    perceptual_weights: str | None = None
    """For lpips: safetensors file, folder or hub id of VGG16's weights; null: timm/vgg16.tv_in1k."""
    adversarial: AdversarialKind | None = None
    """Adversarial loss of a patch discriminator."""
    adversarial_weight: NonNegative = 0.5
    """Weight of the adversarial term."""
    adversarial_start: NonNegativeInt = 1000
    """Optimiser step from which the adversarial term counts and the discriminator is trained."""
    adversarial_adaptive: bool = True
    """Scale its gradient to that of the reconstruction at the decoder's last layer (Esser et al. 2021, eq. 7)."""
    adversarial_margin: NonNegative = 0.1
    """Fraction by which the reconstruction may get worse before the adversarial term is paused."""
    discriminator_width: Count = 64
    """Channels of the discriminator's first layer."""
    discriminator_layers: Count = 3
    """Discriminator layers of stride 2; 3 see patches of 70 px, 2 of 34 px."""
    discriminator_lr_factor: Positive = 1.0
    """Learning rate of the discriminator, as a multiple of optimizer.lr."""

    @property
    def complete_at(self) -> int:
        """Finished steps from which the weights were trained with every term of the loss."""
        starts = [
            self.kl_start if self.kl_weight > 0 else 0,
            self.perceptual_start if self.perceptual is not None else 0,
            self.adversarial_start if self.adversarial is not None else 0,
        ]
        return max(start + 1 if start > 0 else 0 for start in starts)


class VAEValidationConfig(Section):
    """Validation on held-out images."""

    every: Count
    """Optimiser steps between validations and sample grids."""
    images: Count = 8
    """Images in the sample grid."""
    batch_size: Count = 16
    """Images per forward pass."""


def _known_sampler(name: str) -> str:
    return get_sampler(name).name


class UNetValidationConfig(Section):
    """Validation loss on held-out images, and sample grids."""

    every: Count
    """Optimiser steps between validation losses."""
    bins: Count = 10
    """Timestep bins; the validation loss is reported for each."""
    max_images: Count | None = None
    """Use at most this many held-out images for the validation loss; null: all."""
    batch_size: Count = 16
    """Images per forward pass."""
    sample_every: Count
    """Optimiser steps between sample grids."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Prompts of the sample grids."""
    num_samples: Count | None = None
    """Images in a sample grid, cycling through the prompts from grid to grid; null: one per prompt."""
    sampler: Annotated[str, AfterValidator(_known_sampler), Field(json_schema_extra={"enum": list(SAMPLERS)})] = "ddim"
    """Sampler of the sample grids, and default of the saved pipeline."""
    sigmas: Sigmas = "schedule"
    """Spacing of the sampling steps: the schedule's own, or by sigma."""
    num_inference_steps: Count = 50
    """Sampling steps."""
    guidance_scale: NonNegative = 5.0
    """Classifier-free guidance scale; 1: no guidance."""
    seed: Seed = 0
    """Seed of the first sample; the next ones count up."""


class TextConfig(Section):
    """The text encoder: a frozen pretrained one, or a small one that is trained together with the UNet."""

    pretrained: str | None = None
    """Folder or hub id of a text model, kept frozen: CLIP, or another one that transformers knows, such as T5; or
    folder, single file or hub id of a pipeline, for its own."""
    config: dict[str, Any] | None = None
    """transformers' CLIPTextConfig keys of one that is trained, from random weights or those of init_from."""
    token_std: Positive | None = None
    """Standard deviation of the random token vectors; null: CLIP's 0.02."""
    pad_token: str | None = None
    """With config: what fills a row of tokens after the end; null: <|endoftext|>, as in Stable Diffusion 1 (2: !)."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError("give either pretrained (a folder or hub id) or config (of one to train), not both")
        if self.token_std is not None and self.config is None:
            raise ValueError("token_std is of random token vectors, but those of pretrained are given")
        if self.pad_token is not None and self.config is None:
            raise ValueError("pad_token is of a text encoder that is trained, but pretrained has its own tokenizer")
        tokens = (self.config or {}).get("max_position_embeddings", 77)
        if isinstance(tokens, int) and tokens < 3:
            raise ValueError(
                f"config.max_position_embeddings is {tokens}, must be at least 3 tokens: start, one of the caption, end"
            )
        return self


class LoRAConfig(Section):
    """LoRA: train small adapters on the model of init_from, which itself stays as it is (Hu et al. 2021)."""

    rank: Annotated[int, Field(ge=1, le=1024, strict=True)] | None = None
    """Rank of the change of a layer's weight, such as 8: what it can learn, and the size of the file; null: no LoRA."""
    alpha: Positive | None = None
    """The change is multiplied by alpha / rank; null: by 1."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers with adapters: names, or ends of names, of linear layers and convolutions of the UNet and, with q_proj,
    k_proj, v_proj, out_proj, fc1 or fc2, of the text encoder."""

    @property
    def used_alpha(self) -> float:
        """alpha, or the rank where it is null."""
        assert self.rank is not None
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def text_targets(self) -> tuple[str, ...]:
        """Those of the text encoder."""
        return tuple(target for target in self.targets if target.rpartition(".")[2] in CLIP_LAYERS)


def _plain_numbers(kind: type) -> BeforeValidator:
    """For a dataclass section: pydantic would take true for 1 and "3" for 3."""

    def check(values: Any) -> Any:
        for key in fields(kind) if isinstance(values, dict) else ():
            value = values.get(key.name, key.default)
            if key.type in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{key.name} is {value!r}, must be a number")
            if key.type is int and not isinstance(value, int):
                raise ValueError(f"{key.name} is {value!r}, must be an integer")
        return values

    return BeforeValidator(check)


def _check_publish(output: OutputConfig, data: DataConfig) -> None:
    if output.publish == "best" and not data.has_validation_set:
        raise ValueError(
            "output.publish is best, which needs a validation set: set data.holdout or data.validation_split, or leave "
            "it null"
        )


class VAETrainingConfig(Section):
    """Stage 1: the autoencoder (`latentdiff train-vae`)."""

    data: DataConfig
    model: AutoencoderKLConfig
    init_from: str | None = None
    """Autoencoder to start from: its folder, or folder, single file or hub id of a pipeline; null: random weights."""
    freeze_encoder: bool = False
    """Train the decoder alone, so that the latents stay what they were; needs init_from."""
    loss: VAELossConfig
    optimizer: OptimizerConfig
    train: VAETrainConfig
    ema: EMAConfig = EMAConfig()
    validation: VAEValidationConfig
    logging: LoggingConfig = LoggingConfig()
    output: OutputConfig

    @model_validator(mode="before")
    @classmethod
    def _of_the_images(cls, values: Any) -> Any:
        """model.sample_size is data.size, unless it is given."""
        data, model = (values.get(key) for key in ("data", "model")) if isinstance(values, dict) else (None, None)
        size = data.get("size") if isinstance(data, dict) else None
        sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
        if isinstance(model, dict) and all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
            return values | {"model": {"sample_size": size} | model}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        f = self.model.downsampling
        size = in_yaml(self.data.size)
        if any(side % f for side in self.data.shape):
            raise ValueError(f"data.size {size} is not divisible by {f}, the model's downsampling")
        if self.model.sample_size != self.data.size:
            raise ValueError(
                f"model.sample_size is {in_yaml(self.model.sample_size)}, must be data.size {size}, or left out"
            )
        if self.train.compile == "step" and self.loss.adversarial is not None:
            raise ValueError(
                "train.compile step does not work with loss.adversarial, whose weight needs gradients of the last "
                "layer alone; set it to blocks"
            )
        if self.model.in_channels != self.model.out_channels:
            raise ValueError(
                f"model.in_channels {self.model.in_channels} and model.out_channels {self.model.out_channels} differ"
            )
        if self.freeze_encoder and self.init_from is None:
            raise ValueError("freeze_encoder needs init_from, the autoencoder whose latents are kept")
        crop = self.train.crop_size
        if crop is not None and (crop % f or crop > min(self.data.shape)):
            raise ValueError(f"train.crop_size is {crop}, must be a multiple of {f} and at most data.size {size}")
        whole = self.train.whole_image_steps
        if whole and (crop is None or whole > self.train.steps):
            raise ValueError(
                f"train.whole_image_steps is {whole}, must be 0 without train.crop_size, and at most train.steps "
                f"{self.train.steps}"
            )
        _check_publish(self.output, self.data)
        return self

    @property
    def publishes_best(self) -> bool:
        """Whether the weights with the lowest MSE on the held-out images become the final model.

        The MSE does not see the sharpness that an adversarial loss is for, so with one the default is the last step.
        """
        if self.output.publish is None:
            return self.data.has_validation_set and self.loss.adversarial is None
        return self.output.publish == "best"


class UNetTrainingConfig(Section):
    """Stage 2: the text-conditioned UNet (`latentdiff train-unet`)."""

    vae: str | None
    """The autoencoder: folder of stage 1; folder, single file or hub id of a pipeline; null: none, pixel space."""
    allow_unfit_vae: bool = False
    """Train even if the autoencoder's own report calls it unfit for stage 2."""
    init_from: str | None = None
    """Folder, single file or hub id of a pipeline to train on from: its UNet, and its text encoder, frozen without
    `text`, trained with `text.config`. Keys of model, diffusion and text.config not given are its own; null: none."""
    data: DataConfig
    model: UNetConfig
    text: TextConfig
    lora: LoRAConfig = LoRAConfig()
    diffusion: Annotated[NoiseSchedule, _plain_numbers(NoiseSchedule)] = NoiseSchedule()
    loss: Annotated[Objective, _plain_numbers(Objective)] = Objective()
    optimizer: OptimizerConfig
    train: UNetTrainConfig
    ema: EMAConfig = EMAConfig()
    validation: UNetValidationConfig
    logging: LoggingConfig = LoggingConfig()
    output: OutputConfig

    @property
    def is_pixel_space(self) -> bool:
        """Whether the UNet works on the images themselves, without an autoencoder."""
        return self.vae is None

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder, or an adapter of it, is trained with the UNet."""
        return bool(self.lora.text_targets) if self.trains_adapters else self.text.pretrained is None

    @property
    def trains_adapters(self) -> bool:
        """Whether LoRA adapters are trained, and nothing else."""
        return self.lora.rank is not None

    @property
    def publishes_best(self) -> bool:
        """Whether the weights with the lowest validation loss become the final model."""
        if self.output.publish is None:
            return self.data.has_validation_set
        return self.output.publish == "best"

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, values: Any) -> Any:
        """What follows from other keys, unless it is given; what the autoencoder decides: see `open_latent_space`."""
        sections = {key: values.get(key) for key in ("data", "model", "text")} if isinstance(values, dict) else {}
        data, model, text = (section if isinstance(section, dict) else {} for section in sections.values())
        config, derived = text.get("config"), {}
        if isinstance(config, dict) and "hidden_size" in config:
            derived["cross_attention_dim"] = config["hidden_size"]
        if values.get("vae", "") is None:
            derived |= {"sample_size": data["size"]} if "size" in data else {}
            derived |= {"in_channels": 3, "out_channels": 3} if not {"in_channels", "out_channels"} & {*model} else {}
        return values | {"model": derived | model} if model else values

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
        self._check_lora()
        self._check_guidance()
        _check_publish(self.output, self.data)
        return self

    def _check_lora(self) -> None:
        if not self.trains_adapters:
            return
        if self.init_from is None:
            raise ValueError("lora.rank needs init_from, the model that the adapters are for")
        if self.text.pretrained != self.init_from:
            given = "text.config" if self.text.pretrained is None else f"text.pretrained {self.text.pretrained}"
            raise ValueError(
                f"{given} is given, but the adapters of lora.rank are used with the text encoder of init_from: leave "
                "text out"
            )

    def _check_guidance(self) -> None:
        """Guidance needs both a conditional and a trained unconditional prediction."""
        scale = self.validation.guidance_scale
        if scale == 1:
            return
        if self.data.captions == "none":
            raise ValueError(f"validation.guidance_scale is {scale}, must be 1 without captions (data.captions)")
        if self.train.caption_dropout in (0, (0, 0)):
            raise ValueError(
                f"validation.guidance_scale is {scale}, which needs the unconditional prompt, but it is never "
                "trained with train.caption_dropout 0: must be 1, or the dropout above 0"
            )
        if self.train.caption_dropout in (1, (1, 1)):
            raise ValueError(
                f"validation.guidance_scale is {scale}, which needs captions, but train.caption_dropout "
                "1 drops them all: must be 1, or the dropout below 1"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Reading

AnySection = TypeVar("AnySection", bound=Section)


def refuse_other_model(config: Section, other: Section, section: str, place: str, besides: Collection[str]) -> None:
    """Raise ValueError if a model's config is not that of the weights it is to get. besides: keys that may differ."""
    for key, value in config.model_dump(exclude={*besides}).items():
        if getattr(other, key) != value:
            raise ValueError(f"{section}.{key} is {value}, but {place} has {getattr(other, key)}")


def load_config(
    kind: type[AnySection],
    path: str | Path,
    overrides: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> AnySection:
    """Read a YAML config and apply `a.b=value` overrides (values are YAML too).

    complete(values): the values with those that follow from other files, where they are not given.
    Raises ValueError with one line per problem: file missing or not YAML, unknown key, wrong type, value out of range.
    """
    values = _read_yaml(Path(path))
    _refuse_other_stage(kind, values, path)
    for override in overrides:
        _apply_override(values, override)
    return validated(kind, values if complete is None else complete(values), str(path))


class _DataAlone(Section):
    """A config that has nothing but data."""

    data: DataConfig


def load_data_config(source: str, size: int, overrides: Sequence[str] = ()) -> DataConfig:
    """The data section of a source without a config file, with `data.key=value` overrides; ValueError as above."""
    values: dict[str, Any] = {"data": {"source": source, "size": size}}
    for override in overrides:
        _apply_override(values, override)
    return validated(_DataAlone, values, "override").data


def _refuse_other_stage(kind: type[Section], values: Mapping[str, Any], path: str | Path) -> None:
    """One line instead of one for each key."""
    loss = values.get("loss")
    if kind is VAETrainingConfig and "vae" in values:
        raise ValueError(f"config {path} is one of stage 2 (it has the key vae): give it to latentdiff train-unet")
    if kind is UNetTrainingConfig and "vae" not in values and isinstance(loss, dict) and "kl_weight" in loss:
        raise ValueError(
            f"config {path} is one of stage 1 (it has the key loss.kl_weight): give it to latentdiff train-vae"
        )


def stage_of(path: str | Path) -> Literal["vae", "unet"]:
    """Which stage a config file is of: only stage 2 has the key `vae`, the autoencoder it trains on.

    Raises ValueError if the file is missing or not YAML.
    """
    return "unet" if "vae" in _read_yaml(Path(path)) else "vae"


def load_run_config(
    path: str | Path, complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> "VAETrainingConfig | UNetTrainingConfig":
    """Read the config.yaml of a run of either stage; complete: of stage 2. ValueError as `load_config`."""
    if stage_of(path) == "vae":
        return load_config(VAETrainingConfig, path)
    return load_config(UNetTrainingConfig, path, complete=complete)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(no_config(path))
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise ValueError(f"config {path} has {size:,} bytes, must have at most {MAX_CONFIG_BYTES:,}")
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {path} must hold sections such as data, model and train, not {shortened(values)}")
    return values


def _parse_yaml(text: str) -> Any:
    """A YAML value; YAMLError for what is not one, is nested too deeply, or grows without bounds through aliases."""
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # such as the date 2026-99-99
        raise yaml.YAMLError(str(error)) from None
    left, unread = MAX_CONFIG_BYTES, [value]
    while unread:
        part = unread.pop()
        unread.extend(
            [*part.keys(), *part.values()] if isinstance(part, dict) else part if isinstance(part, list) else []
        )
        left -= 1
        if left < len(unread):
            raise yaml.YAMLError("its aliases repeat too much")
    return value


def validated(kind: type[AnySection], values: dict[str, Any], place: str) -> AnySection:
    """Build a config section; raises one ValueError with a line per problem, each starting with `place`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"{place}: {cut(_explain(kind, problem))}" for problem in _one_for_each_value(error.errors())]
        raise ValueError("\n".join(lines)) from None


def _first_problem(kind: type[AnySection], values: dict[str, Any], place: str) -> AnySection:
    """As `validated`, but the ValueError has one line: the first problem, and how many more there are."""
    try:
        return validated(kind, values, place)
    except ValueError as error:
        first, *others = str(error).split("\n")
        raise ValueError(cut(first) + (f" (and {len(others)} more)" if others else "")) from None


UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's names


def _one_for_each_value(problems: Sequence[Any]) -> list[dict[str, Any]]:
    """pydantic's error dicts; of a value that may be a number or a list, only that of the kind which was given."""
    chosen: dict[tuple[str | int, ...], dict[str, Any]] = {}
    for problem in problems:
        # The last part of an unknown key is the user's own, whatever it looks like.
        known = problem["loc"][:-1] if problem["type"] in UNKNOWN_KEY else problem["loc"]
        kinds = [i for i, part in enumerate(known) if isinstance(part, str) and not part.isidentifier()]
        path = problem["loc"][: kinds[0]] if kinds else problem["loc"]
        rest = [part for part in problem["loc"][len(path) :] if isinstance(part, int)]
        of_a_list = bool(kinds) and "tuple" in problem["loc"][kinds[0]]
        fits = of_a_list == (bool(rest) or isinstance(problem["input"], list | tuple))
        if path not in chosen or fits:
            chosen[path] = {**problem, "loc": (*path, *rest)}
    return list(chosen.values())


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
        values[key] = _parse_yaml(text)
    except yaml.YAMLError:
        raise ValueError(f"override {shortened(override)}: {shortened(text)} is not a YAML value") from None


def _explain(kind: type[Section], problem: Mapping[str, Any]) -> str:
    """One line for one of pydantic's error dicts."""
    where = ".".join(shown(part) for part in problem["loc"])
    if problem["type"] in UNKNOWN_KEY:
        known = _keys_at(kind, problem["loc"][:-1])
        close = _meant(kind, str(problem["loc"][-1]), known)
        hint = f"did you mean {close}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if problem["type"] == "missing":
        return f"key {where} is missing"
    if problem["type"] in ("model_type", "dataclass_type"):
        return f"{where}: must be a section with the keys {', '.join(_keys_at(kind, problem['loc']))}, {_got(problem)}"
    message = problem["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    if problem["type"] == "value_error":
        # A dataclass section names its own field first: "huber_delta is 0, ...".
        own_field = len(problem["loc"]) == 1 and message.partition(" ")[0] in _keys_at(kind, problem["loc"])
        return f"{where}{'.' if own_field else ': '}{message}" if where else message
    return f"{where}: {message}, {_got(problem)}"


def _got(problem: Mapping[str, Any]) -> str:
    return f"got {shortened(problem['input'])}"


# Names in diffusers' training scripts.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "lr_scheduler": "optimizer.lr_schedule",
    "resolution": "data.size",
    "dataset_name": "data.source",
    "train_data_dir": "data.source",
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "max_train_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "mixed_precision": "train.precision",
    "output_dir": "output.folder",
    "checkpointing_steps": "output.checkpoint_every",
    "report_to": "logging.log_with",
    "snr_gamma": "loss.min_snr_gamma",
}


def _meant(kind: type[Section], name: str, known: Sequence[str]) -> str | None:
    """The key that an unknown one of a section may mean: of that section, or with its path that of another."""
    paths = [f"{section}.{key}" for section in kind.model_fields for key in _keys_at(kind, (section,))]
    keys = {path.rpartition(".")[2]: path for path in reversed(paths)}
    if name in keys:  # "lr" is nearer to optimizer.lr than to lora
        return keys[name]
    if close := difflib.get_close_matches(name, known, n=1):
        return close[0]
    if ELSEWHERE.get(name) in paths:
        return ELSEWHERE[name]
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.8)
    return keys[close[0]] if close else None


def _keys_at(kind: Any, location: Sequence[int | str]) -> list[str]:
    for part in location:
        kind = kind.model_fields[str(part)].annotation
    if is_dataclass(kind):
        return [field.name for field in fields(kind)]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
