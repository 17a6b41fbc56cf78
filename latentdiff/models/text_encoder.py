"""The CLIP text encoder: input_ids -> context."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import CLIPTextConfig, validated
from latentdiff.formats.diffusers_folder import PIPELINE_FILE, check_types, read_files
from latentdiff.formats.files import (
    check_fit,
    load_strictly,
    read_json,
    read_safetensors,
    read_safetensors_header,
    refuse_foreign_keys,
    refuse_not_finite,
    write_json,
    write_safetensors,
)
from latentdiff.formats.hub import local_path, model_patterns
from latentdiff.formats.swap import replacing_model
from latentdiff.formats.weight_files import find_weights
from latentdiff.models.clip_text import CLIPTextTransformer
from latentdiff.models.tokenizer import END_ID, START_ID, VOCAB_SIZE
from latentdiff.printable import shortened, shown_path

TEXT_ENCODER_FILES = ("config.json", "model*", "pytorch_model*")  # what belongs to a model, in patterns
PART = "text_encoder"  # folder in a pipeline's
_PREFIX = "text_model."
# the weights of a whole CLIPModel that are not in its text tower
_IGNORED_KEYS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class TextEncoder(nn.Module):
    """CLIP's text transformer: input_ids [B, L] to context [B, L, D], the last hidden state after the final norm.

    Files and state-dict keys are those of transformers' CLIPTextModel.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.model = CLIPTextTransformer(config)

    @classmethod
    def from_config(cls, config: dict[str, Any], seed: int, token_std: float | None = None) -> "TextEncoder":
        """Make a new encoder from `CLIPTextConfig` keys, its weights a function of `seed` alone.

        token_std: standard deviation of the token vectors; None: CLIP's own, 0.02. The special ids are the tokenizer's
        and override those in `config`. The global random state is neither used nor changed.
        Raises ValueError for an unknown key, a bad value, or a vocabulary smaller than the tokenizer's.
        """
        with torch.device("meta"):
            encoder = cls(config_to_train(config))
        encoder.to_empty(device="cpu")
        encoder.model.init_weights(torch.Generator().manual_seed(seed))
        if token_std is not None:
            nn.init.normal_(encoder.token_vectors, std=token_std, generator=torch.Generator().manual_seed(seed))
        return encoder

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        frozen: bool,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> "TextEncoder":
        """Load weights (safetensors only) from a local folder or a hub id, of a text encoder or a whole CLIPModel.

        Of a pipeline its text encoder is taken.
        `frozen` puts the encoder in eval mode without gradients, otherwise it is in train mode. `dtype` None means
        float32, also for files of another type.

        Warns and raises ValueError as `FolderModel.from_pretrained`, or if nothing is found under that name. The image
        tower and projections of a CLIPModel may be there.
        """
        folder = model_folder(name_or_folder, subfolder, variant)
        values = read_json(folder / "config.json")
        if not is_clip(values):
            raise ValueError(
                f"{folder / 'config.json'} describes a {values['model_type']!r:.80}, not a CLIP text model"
            )
        # Before anything is built or read: config and header may declare tensors as large as they like.
        found = find_weights(folder, "model", variant)
        if found.warning:
            warnings.warn(found.warning, stacklevel=2)
        place, dtype = str(found.place), dtype or torch.float32
        header = _text_tower(read_files(found.files, read_safetensors_header))
        refuse_foreign_keys(header, place)
        check_types(header, dtype, place)
        _check_sizes(values.get("text_config") or values, header, folder / "config.json", found.place)
        config = CLIPTextConfig.from_transformers(values, str(folder / "config.json"))
        with torch.device("meta"):
            encoder = cls(config)
        check_fit(encoder.model.state_dict(), header, place)
        weights = _text_tower(read_files(found.files, partial(read_safetensors, dtype=dtype)))
        load_strictly(encoder.model, weights, place)
        return encoder.train(not frozen).requires_grad_(not frozen)

    @classmethod
    def from_weights(
        cls, config: dict[str, Any], weights: Mapping[str, Tensor], place: str, dtype: torch.dtype
    ) -> "TextEncoder":
        """A frozen encoder, in eval mode, of `CLIPTextConfig` keys and weights without prefix.

        place: where both are from, for messages. Raises ValueError as `from_config`, or if the weights do not fit.
        """
        try:
            parsed = config_to_train(config)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        with torch.device("meta"):
            encoder = cls(parsed)
        load_strictly(encoder.model, {key: tensor.to(dtype) for key, tensor in weights.items()}, place)
        return encoder.eval().requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        """Width D of the context."""
        return self.config.hidden_size

    @property
    def max_length(self) -> int:
        """Most tokens L that a row of input_ids may have."""
        return self.config.max_position_embeddings

    @property
    def num_layers(self) -> int:
        """Number of transformer layers; with 0 the context is the embedded tokens, normalised."""
        return self.config.num_hidden_layers

    @property
    def max_clip_skip(self) -> int:
        """Most layers that may be left out: all but one."""
        return max(0, self.num_layers - 1)

    @property
    def token_vectors(self) -> Tensor:
        """The embedding of the tokens, [vocabulary, D]."""
        return self.model.embeddings.token_embedding.weight

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Trade compute for memory: recompute each layer in the backward pass."""
        self.model.encoder.gradient_checkpointing = enabled

    def forward(self, input_ids: Tensor, clip_skip: int = 0) -> Tensor:
        """Encode int64 input_ids [B, L], L at most `max_length`, to context [B, L, D].

        Attention is causal and sees the padding, as in Stable Diffusion: no other mask. `clip_skip` counts the last
        layers left out, as in diffusers: 1 is the penultimate layer's output, and the final norm follows all the same.
        Raises ValueError unless `clip_skip` is in 0 .. max_clip_skip, or if the rows are too long.
        """
        if not isinstance(clip_skip, int) or not 0 <= clip_skip <= self.max_clip_skip:
            raise ValueError(
                f"clip_skip is {clip_skip!r}, must be an integer in 0 .. {self.max_clip_skip} "
                f"(the text encoder has {self.num_layers} layers)"
            )
        if input_ids.shape[-1] > self.max_length:
            raise ValueError(f"input_ids have {input_ids.shape[-1]} tokens, the text encoder reads {self.max_length}")
        return self.model(input_ids, clip_skip)

    def to_transformers(self) -> dict[str, Any]:
        """The contents of transformers' config.json."""
        dtype = str(self.token_vectors.dtype).removeprefix("torch.")
        return dict(sorted({**self.config.to_transformers(), "dtype": dtype}.items()))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors in place of an old model, in one step, for CLIPTextModel.

        Keys carry the prefix `text_model.`: transformers >= 5.6 reads them with and without, everything older needs it.
        Raises ValueError if a weight is not finite.
        """
        weights = self.model.state_dict()
        refuse_not_finite(weights, f"the text encoder to save ({self.token_vectors.dtype})")
        with replacing_model(Path(folder), TEXT_ENCODER_FILES, "config.json") as new:
            write_safetensors({_PREFIX + key: tensor for key, tensor in weights.items()}, new / "model.safetensors")
            write_json(self.to_transformers(), new / "config.json")


def config_to_train(config: dict[str, Any]) -> CLIPTextConfig:
    """The config of a new encoder for the package's tokenizer; ValueError as `TextEncoder.from_config`."""
    special = {"bos_token_id": START_ID, "eos_token_id": END_ID, "pad_token_id": END_ID}
    parsed = validated(CLIPTextConfig, {**config, **special}, "text encoder config")
    if parsed.vocab_size < VOCAB_SIZE:
        raise ValueError(f"text encoder config: vocab_size={parsed.vocab_size}, CLIP's needs {VOCAB_SIZE}")
    return parsed


def is_clip(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a CLIP text model or a whole CLIPModel."""
    return config.get("model_type", "clip") in ("clip", "clip_text_model")


def model_folder(name_or_folder: str | Path, subfolder: str | None, variant: str | None) -> Path:
    """The local folder of a text encoder, which is fetched from the hub unless it is a folder; of a pipeline, its own.

    Raises ValueError if there is none, or it has no config.json.
    """
    places = (subfolder,) if subfolder else ("", PART)
    wanted = [pattern for place in places for pattern in model_patterns("model", variant, place)]
    folder = local_path(name_or_folder, [PIPELINE_FILE, *wanted], "text encoder")
    if subfolder or (folder / PIPELINE_FILE).is_file():
        folder /= subfolder or PART
    if not (folder / "config.json").is_file():
        raise ValueError(f"text encoder {str(name_or_folder)!r}: {shown_path(folder)} has no config.json")
    return folder


def _text_tower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text part of a file's tensors, without prefix; very old files hold the positions as a tensor."""
    return {
        key.removeprefix(_PREFIX): tensor
        for key, tensor in tensors.items()
        if not key.startswith(_IGNORED_KEYS) and not key.endswith("position_ids")
    }


def _check_sizes(config: dict[str, Any], header: dict[str, Tensor], path: Path, weights: Path) -> None:
    """Raise ValueError if the config declares other sizes than the files hold."""
    layers = {key.split(".")[2] for key in header if key.startswith("encoder.layers.")}
    shapes = {
        "vocab_size": ("embeddings.token_embedding.weight", 0),
        "hidden_size": ("embeddings.token_embedding.weight", 1),
        "max_position_embeddings": ("embeddings.position_embedding.weight", 0),
        "intermediate_size": ("encoder.layers.0.mlp.fc1.weight", 0),
    }
    found = {key: header[name].shape[axis] for key, (name, axis) in shapes.items() if name in header}
    found["num_hidden_layers"] = len(layers)
    for key, value in found.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{path} says {key} {shortened(config[key])}, but the weights have {value} ({weights.name})"
            )
