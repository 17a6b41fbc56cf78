"""Any other text encoder that transformers knows (T5, BERT, SigLIP ...), frozen, with its own tokenizer.

transformers is imported when one is opened.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.formats.diffusers_folder import PIPELINE_FILE, check_types, read_files
from latentdiff.formats.files import read_json, read_safetensors_header, refuse_not_finite, write_json
from latentdiff.formats.hub import local_path
from latentdiff.formats.single_file import PADDING, read_single_file
from latentdiff.formats.swap import replacing_model
from latentdiff.formats.weight_files import find_weights
from latentdiff.models.text_encoder import TEXT_ENCODER_FILES, TextEncoder, is_clip, model_folder
from latentdiff.models.tokenizer import TOKENIZER_FILES, CLIPTokenizer
from latentdiff.printable import first_line, shortened

NO_TOKEN = -1  # in input_ids, where the tokenizer's attention mask is 0
TOKENIZER_PART = "tokenizer"  # folder in a pipeline's
MAX_TOKENS = 77  # of a caption in training, as CLIP has
# Parts that read the last hidden state, which files often lack.
_HEADS = ("pooler.", "head.")


class PretrainedTextEncoder(nn.Module):
    """A frozen text encoder of transformers: input_ids [B, L] of `PretrainedTokenizer` to context [B, L, D].

    The context is the last hidden state, and 0 where a row is padded: in cross-attention without biases such a place
    has the value 0 and the score 0, whatever the text encoder made of it.
    """

    max_clip_skip = 0

    def __init__(self, model: Any) -> None:
        """Wrap a transformers model; `from_pretrained` opens one."""
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> "PretrainedTextEncoder":
        """Load weights (safetensors only) from a local folder or a hub id.

        Of a model of text and images the text part is loaded. dtype None means float32. The encoder is in eval mode,
        without gradients. No code from the folder is run.
        Raises ValueError if nothing is found under that name, transformers knows no text encoder of that kind, a file
        is damaged, or weights are missing.
        """
        folder = model_folder(name_or_folder, subfolder, variant)
        found = find_weights(folder, "model", variant)
        if found.warning:  # transformers may choose the other ones
            raise ValueError(found.warning)
        header = read_files(found.files, read_safetensors_header)
        check_types(
            {key: t for key, t in header.items() if not key.endswith("position_ids")},
            dtype or torch.float32,
            str(folder),
        )
        try:
            with _quiet_transformers():
                model, info = _load(folder, dtype or torch.float32, variant)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
            kind = shortened(read_json(folder / "config.json").get("model_type"))
            raise ValueError(f"text encoder {folder} of the kind {kind}: {first_line(error)}") from error
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(_HEADS))
        wrong = sorted(key for key, *_ in info["mismatched_keys"])
        if missing or wrong:
            raise ValueError(
                f"text encoder {folder} does not fit {type(model).__name__}: "
                f"missing or of another shape {', '.join([*missing, *wrong][:5])}"
            )
        for head in {key.partition(".")[0] for key in info["missing_keys"]}:
            setattr(model, head, None)  # random, and not used
        return cls(model).eval().requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        """Width D of the context."""
        return self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        """Most tokens L that a row of input_ids may have."""
        return getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize

    @property
    def token_vectors(self) -> Tensor:
        """The embedding of the tokens, [vocabulary, width]."""
        return self.model.get_input_embeddings().weight

    @property
    def class_name(self) -> str:
        """transformers' name of the model."""
        return type(self.model).__name__

    def forward(self, input_ids: Tensor, clip_skip: int = 0) -> Tensor:
        """Encode int64 input_ids [B, L], NO_TOKEN where a row is padded, to context [B, L, D].

        Raises ValueError unless `clip_skip` is 0: no Stable Diffusion model leaves out layers of such an encoder.
        """
        if clip_skip != 0:
            raise ValueError(f"clip_skip is {clip_skip!r}, must be 0 with {self.class_name}: only CLIP has it")
        seen = input_ids != NO_TOKEN
        output = self.model(input_ids=input_ids.clamp_min(0), attention_mask=seen.long())
        return output.last_hidden_state.masked_fill(~seen[..., None], 0.0)

    def to_transformers(self) -> dict[str, Any]:
        """The contents of transformers' config.json that say what is computed."""
        config = json.loads(self.model.config.to_json_string())
        return {k: v for k, v in config.items() if k != "transformers_version" and not k.startswith("_")}

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors in place of an old model, in one step, as transformers does.

        Raises ValueError if a weight is not finite.
        """
        refuse_not_finite(self.model.state_dict(), f"the text encoder to save ({self.model.dtype})")
        with replacing_model(Path(folder), TEXT_ENCODER_FILES, "config.json") as new, _quiet_transformers():
            self.model.save_pretrained(new, max_shard_size="100GB")
            write_json(self.to_transformers() | {"architectures": [self.class_name]}, new / "config.json")


class PretrainedTokenizer:
    """The tokenizer of such a text encoder: strings to `input_ids` [B, max_length].

    Places that its attention mask leaves out are NO_TOKEN, so that one tensor says both.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        """Wrap a transformers tokenizer; `load` opens one. max_length: length of every row, in tokens."""
        self._tokenizer, self._max_length = tokenizer, max_length
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = max_length  # as it is saved
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def load(cls, name_or_folder: str | Path, max_length: int = sys.maxsize) -> "PretrainedTokenizer":
        """Open a folder or a hub id, of a pipeline its tokenizer. max_length: its own limit where that is less.

        No code from the folder is run. Raises ValueError if there is no tokenizer, or rows have no end.
        """
        from transformers import AutoTokenizer  # slow

        name = str(name_or_folder)
        folder = tokenizer_folder(name)
        try:
            with _quiet_transformers():
                tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise ValueError(f"tokenizer {name!r}: {first_line(error)}") from error
        length = min(max_length, tokenizer.model_max_length)
        if length > 10**6:  # transformers writes about 1e30 for "no limit"
            raise ValueError(f"tokenizer {name!r} says no model_max_length, set it in its tokenizer_config.json")
        return cls(tokenizer, length)

    @property
    def max_length(self) -> int:
        """Length of every row, in tokens."""
        return self._max_length

    @property
    def pad_token_id(self) -> int:
        """Id that stands where a row is padded: none of the vocabulary."""
        return NO_TOKEN

    @property
    def class_name(self) -> str:
        """transformers' name of the tokenizer."""
        return type(self._tokenizer).__name__

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokenize `texts` to int64 input_ids [B, max_length]; a longer text is cut, with one warning for each.

        Raises ValueError if `texts` is a bare string or holds anything but strings.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts is {shortened(texts)}, it must be a list of strings")
        if not texts:
            return torch.zeros(0, self._max_length, dtype=torch.long)
        rows = self._tokenizer(list(texts), verbose=False)["input_ids"]
        for text, row in {text: row for text, row in zip(texts, rows, strict=True)}.items():
            if len(row) > self._max_length:
                warnings.warn(
                    f"prompt {text[:40]!r}... has {len(row)} tokens, rows have {self._max_length}: it is cut",
                    stacklevel=2,
                )
        encoded = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        mask = encoded.get("attention_mask")
        return encoded["input_ids"] if mask is None else encoded["input_ids"].masked_fill(mask == 0, NO_TOKEN)

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's files, for AutoTokenizer."""
        self._tokenizer.save_pretrained(folder)


AnyTextEncoder = TextEncoder | PretrainedTextEncoder
Tokenizer = CLIPTokenizer | PretrainedTokenizer


def open_text_encoder(name: str | Path, dtype: torch.dtype | None = None, variant: str | None = None) -> AnyTextEncoder:
    """A frozen text encoder of any kind: of a folder, of a pipeline's folder or single file, or of a hub id of either.

    dtype: None means float32. Raises ValueError as its class does.
    """
    path = Path(name).expanduser()
    if path.is_file():
        file = read_single_file(path)
        place = f"{path}, its text encoder"
        return TextEncoder.from_weights(
            file.text_encoder, file.weights()["text_encoder"], place, dtype or torch.float32
        )
    folder = model_folder(name, None, variant)
    if is_clip(read_json(folder / "config.json")):
        return TextEncoder.from_pretrained(folder, frozen=True, dtype=dtype, variant=variant)
    return PretrainedTextEncoder.from_pretrained(folder, dtype=dtype, variant=variant)


def open_tokenizer(name: str | Path, text_encoder: AnyTextEncoder, max_length: int = sys.maxsize) -> Tokenizer:
    """The tokenizer of what `open_text_encoder` opened under that name; rows have the tokens that the encoder reads.

    That of a CLIP text encoder alone is the package's. max_length: a limit for other kinds than CLIP, in tokens.
    Raises ValueError if there is none, or it is damaged.
    """
    if not isinstance(text_encoder, TextEncoder):
        return PretrainedTokenizer.load(name, min(max_length, text_encoder.max_length))
    path = Path(name).expanduser()
    if path.is_file():
        pad_token = PADDING[read_single_file(path).layout]
        return CLIPTokenizer.load(max_length=text_encoder.max_length, pad_token=pad_token)
    folder = tokenizer_folder(name)
    is_pipeline = folder.name == TOKENIZER_PART and (folder.parent / PIPELINE_FILE).is_file()
    return CLIPTokenizer.load(folder if is_pipeline else None, max_length=text_encoder.max_length)


def tokenizer_folder(name: str | Path) -> Path:
    """The local folder of a tokenizer, which is fetched from the hub unless it is a folder; of a pipeline, its own."""
    wanted = [inside + file for inside in ("", f"{TOKENIZER_PART}/") for file in ("config.json", *TOKENIZER_FILES)]
    folder = local_path(name, [PIPELINE_FILE, *wanted], "tokenizer")
    return folder / TOKENIZER_PART if (folder / PIPELINE_FILE).is_file() else folder


def _load(folder: Path, dtype: torch.dtype, variant: str | None) -> tuple[Any, dict[str, Any]]:
    """transformers' model, and what it says of the loading."""
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto: Any = AutoModelForTextEncoding
    if type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
        if config.is_encoder_decoder:
            raise ValueError("transformers has no text encoder of it alone")
        config = config.get_text_config()
        # AutoModel does not have the text parts of models of text and images.
        auto = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", AutoModel)
    return auto.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        variant=variant,
        attn_implementation="eager",  # not what a config names, which may be code to fetch
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported above, by name
    )


@contextmanager
def quiet(*loggings: Any) -> Iterator[None]:
    """Without the bars and notes of libraries. loggings: their `utils.logging`, of transformers or diffusers."""
    with ExitStack() as stack:
        for logging in loggings:
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' bars and its table of odd keys, which we check ourselves."""
    from transformers.utils import logging

    with quiet(logging):
        yield
