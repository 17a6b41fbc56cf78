"""The CLIP text encoder: input_ids -> context."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from latentdiff.formats.diffusers_folder import check_types, read_weights
from latentdiff.formats.files import (
    read_json,
    read_safetensors_header,
    refuse_not_finite,
    write_json,
    write_safetensors,
)
from latentdiff.formats.swap import replacing_model
from latentdiff.models.layers import plain_attention_is_faster
from latentdiff.models.tokenizer import END_ID, START_ID, VOCAB_SIZE
from latentdiff.printable import first_line

if TYPE_CHECKING:
    from transformers import CLIPTextModel

TEXT_ENCODER_FILES = ("config.json", "model*", "pytorch_model*")  # what belongs to a model, in patterns
_OLD_PREFIX = "text_model."
# the weights of a whole CLIPModel that are not in its text tower
_IGNORED_KEYS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class TextEncoder(nn.Module):
    """CLIP's text transformer: input_ids [B, L] to context [B, L, D], the last hidden state after the final norm."""

    def __init__(self, model: "CLIPTextModel") -> None:
        """Wrap a transformers model; `from_config` and `from_pretrained` make one."""
        super().__init__()
        self.model = model

    @classmethod
    def from_config(cls, config: dict, seed: int, token_std: float | None = None) -> "TextEncoder":
        """Make a new encoder from `CLIPTextConfig` keys, its weights a function of `seed` alone.

        token_std: standard deviation of the token vectors; None: transformers' own, 0.02. The special ids are the
        tokenizer's and override those in `config`. The global random state is unchanged.
        Raises ValueError for an unknown key, a bad value, or a vocabulary smaller than the tokenizer's.
        """
        from transformers import CLIPTextConfig, CLIPTextModel  # slow, and imports accelerate
        from transformers.activations import ACT2FN

        unknown = sorted(set(config) - set(CLIPTextConfig().to_dict()))
        if unknown:
            raise ValueError(f"text encoder config has unknown keys {unknown}, see transformers' CLIPTextConfig")
        if config.get("hidden_act", "quick_gelu") not in ACT2FN:
            raise ValueError(
                f"text encoder config: hidden_act={config['hidden_act']!r} is unknown, CLIP's is quick_gelu"
            )
        config = {**config, "bos_token_id": START_ID, "eos_token_id": END_ID, "pad_token_id": END_ID}
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators too
            torch.default_generator.manual_seed(seed)
            try:
                model = CLIPTextModel(CLIPTextConfig(**config))
            except (StrictDataclassError, TypeError, ValueError) as error:
                raise ValueError(f"text encoder config: {' '.join(str(error).split())}") from error
        if token_std is not None:
            tokens: Any = model.get_input_embeddings().weight
            nn.init.normal_(tokens, std=token_std, generator=torch.Generator().manual_seed(seed))
        if model.config.vocab_size < VOCAB_SIZE:
            raise ValueError(f"text encoder config: vocab_size={model.config.vocab_size}, CLIP's needs {VOCAB_SIZE}")
        return cls(model)

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

        `frozen` puts the encoder in eval mode without gradients, otherwise it is in train mode. `dtype` None means
        float32, also for files of another type.

        Raises ValueError if nothing is found under that name, a file is damaged, or its tensors are not exactly those
        of the model (a CLIPModel's image tower and projections may be there).
        """
        from transformers import CLIPTextModel

        place = f"{name_or_folder}/{subfolder}" if subfolder else str(name_or_folder)
        folder = Path(place).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(f"text encoder {place!r}: the folder has no config.json")
        if folder.is_dir():
            _check_sizes(folder, variant)
        try:
            with _quiet_transformers():
                loaded: Any = CLIPTextModel.from_pretrained(
                    str(Path(name_or_folder).expanduser()) if folder.is_dir() else str(name_or_folder),
                    subfolder=subfolder or "",
                    dtype=dtype or torch.float32,
                    variant=variant,
                    attn_implementation="sdpa",  # not what a config names, which may be code to fetch
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported below, by name
                )
                model, info = loaded
        except SafetensorError as error:
            file = folder / "model.safetensors" if folder.is_dir() else place
            raise ValueError(f"{file} is damaged or cut short ({first_line(error)}), fetch it again") from error
        except (OSError, ValueError, StrictDataclassError) as error:
            where = "cannot read the folder" if folder.is_dir() else "no such folder, and not loaded from the hub"
            raise ValueError(f"text encoder {place!r}: {where} ({first_line(error)})") from error

        problems = {
            "missing": sorted(info["missing_keys"]),
            "of another shape": sorted(key for key, *_ in info["mismatched_keys"]),
            "unexpected": sorted(
                key
                for key in info["unexpected_keys"]
                if not key.startswith(_IGNORED_KEYS) and not key.endswith("position_ids")
            ),
        }
        found = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in problems.items() if keys)
        if found:
            raise ValueError(f"text encoder {place!r} has not the tensors of a CLIP text model ({found})")
        encoder = cls(model).train(not frozen)
        return encoder.requires_grad_(not frozen)

    @property
    def hidden_size(self) -> int:
        """Width D of the context."""
        return self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        """Most tokens L that a row of input_ids may have."""
        return self.model.config.max_position_embeddings

    @property
    def num_layers(self) -> int:
        """Number of transformer layers; with 0 the context is the embedded tokens, normalised."""
        return self.model.config.num_hidden_layers

    @property
    def max_clip_skip(self) -> int:
        """Most layers that may be left out: all but one."""
        return max(0, self.num_layers - 1)

    def forward(self, input_ids: Tensor, clip_skip: int = 0) -> Tensor:
        """Encode int64 input_ids [B, L], L at most `max_length`, to context [B, L, D].

        Attention is causal and sees the padding, as in Stable Diffusion: no other mask. `clip_skip` counts the last
        layers left out, as in diffusers: 1 is the penultimate layer's output, and the final norm follows all the same.
        Raises ValueError unless `clip_skip` is in 0 .. max_clip_skip.
        """
        if not isinstance(clip_skip, int) or not 0 <= clip_skip <= self.max_clip_skip:
            raise ValueError(
                f"clip_skip is {clip_skip!r}, must be an integer in 0 .. {self.max_clip_skip} "
                f"(the text encoder has {self.num_layers} layers)"
            )
        self._choose_attention(input_ids)
        if clip_skip == 0:
            return self.model(input_ids=input_ids).last_hidden_state
        hidden_states = self.model(input_ids=input_ids, output_hidden_states=True).hidden_states
        tower = getattr(self.model, "text_model", self.model)  # before transformers 5.6 the layers are one level down
        return tower.final_layer_norm(hidden_states[-1 - clip_skip])

    def _choose_attention(self, input_ids: Tensor) -> None:
        """Let transformers compute attention in the way that is faster here; both agree up to rounding.

        A model that was given another implementation, such as flash attention, keeps it.
        """
        device, dtype = input_ids.device, self.model.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        plain = plain_attention_is_faster(device, dtype, input_ids.shape[-1] ** 2, trains=trains)
        now, wanted = self.model.config._attn_implementation, "eager" if plain else "sdpa"
        if now != wanted and now in ("eager", "sdpa"):
            self.model.set_attn_implementation(wanted)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors in place of an old model, in one step, for CLIPTextModel.

        Keys carry the prefix `text_model.`: transformers >= 5.6 reads them with and without, everything older needs it.
        Raises ValueError if a weight is not finite.
        """
        folder = Path(folder)
        refuse_not_finite(self.model.state_dict(), f"the text encoder to save ({self.model.dtype})")
        tensors = {_OLD_PREFIX + key.removeprefix(_OLD_PREFIX): t for key, t in self.model.state_dict().items()}
        config = json.loads(self.model.config.to_json_string())
        config["architectures"] = ["CLIPTextModel"]
        config["dtype"] = str(self.model.dtype).removeprefix("torch.")
        with replacing_model(folder, TEXT_ENCODER_FILES, "config.json") as new:
            write_safetensors(tensors, new / "model.safetensors")
            write_json(config, new / "config.json")


def _check_sizes(folder: Path, variant: str | None) -> None:
    """Raise ValueError if the config declares another model than the files hold: before anything is built or read."""
    path = folder / "config.json"
    config = read_json(path)
    config = config.get("text_config") or config  # of a whole CLIPModel
    header = read_weights(folder, "model", variant, read_safetensors_header)
    header = {key.removeprefix(_OLD_PREFIX): tensor for key, tensor in header.items()}
    # Very old files hold the positions as a tensor; loading is in float32 unless another dtype is given.
    check_types({key: t for key, t in header.items() if not key.endswith("position_ids")}, torch.float32, str(folder))
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
            raise ValueError(f"{path} says {key} {config[key]!r:.80}, but the weights have {value}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' bar and its table of odd keys: a CLIPModel has 200 of them, and we check them ourselves."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
