"""The CLIP tokenizer: text -> input_ids."""

import html
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

from latentdiff.formats.files import read_json, write_json, write_text
from latentdiff.formats.headers import MAX_JSON_BYTES, is_there, small_text
from latentdiff.printable import first_line, listed, shortened

VOCAB_SIZE = 49408
START_TOKEN, START_ID = "<|startoftext|>", 49406
END_TOKEN, END_ID = "<|endoftext|>", 49407
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    *("vocab.txt", "*.model"),  # of other tokenizers
)
_END_OF_WORD = "</w>"
# 256 bytes, the same 256 at the end of a word, and the two special tokens; every other entry is the result of a merge
_NUM_MERGES = VOCAB_SIZE - 2 * 256 - 2
_PACKAGE_VOCABULARY = Path(__file__).parents[1] / "assets" / "clip"
_WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clean_text(text: str) -> str:
    """Return `text` as CLIP was trained to see it: mojibake, HTML entities and spaces mended, lower case.

    The order is that of OpenAI's CLIP (`basic_clean`, `whitespace_clean`, `lower` in simple_tokenizer.py).
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


class CLIPTokenizer:
    """OpenAI CLIP's byte-pair tokenizer: strings to `input_ids` [B, max_length], always padded to that length.

    A row is the start token, the text, the end token, padding. A special token written out in a prompt is ordinary
    text: only the tokenizer itself places start, end and padding. Text is cleaned first, see `clean_text`.
    """

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[tuple[str, ...]], pad_token: str = END_TOKEN, max_length: int = 77
    ) -> None:
        """Build from a vocabulary (token -> id) and its merges in order; `load` reads them from files.

        Raises ValueError unless these are CLIP's 49,408 tokens and 48,894 merges, or if `pad_token` is not among them
        or `max_length` leaves no room for a token between start and end.
        """
        # transformers silently makes a two-token vocabulary of arguments that it does not know, so count
        if len(vocab) != VOCAB_SIZE or len(merges) != _NUM_MERGES:
            raise ValueError(
                f"CLIP's vocabulary has {VOCAB_SIZE} tokens and {_NUM_MERGES} merges, "
                f"got {len(vocab)} and {len(merges)}"
            )
        if (vocab.get(START_TOKEN), vocab.get(END_TOKEN)) != (START_ID, END_ID):
            raise ValueError(
                f"{START_TOKEN} and {END_TOKEN} must have the ids {START_ID} and {END_ID}, "
                f"got {vocab.get(START_TOKEN)} and {vocab.get(END_TOKEN)}"
            )
        if pad_token not in vocab:
            raise ValueError(
                f"pad token {shortened(pad_token)} is not in the vocabulary, Stable Diffusion uses {END_TOKEN} or !"
            )
        if max_length < 3:
            raise ValueError(f"max_length={max_length} has no room for start, one token and end: at least 3")
        self._vocab, self._merges, self._pad_token, self._max_length = vocab, merges, pad_token, max_length

        # No token is registered as special here, which is what keeps "<|endoftext|>" in a prompt plain text
        try:
            pairs: Any = merges  # a merge of other than two parts is refused here
            model = models.BPE(vocab=vocab, merges=pairs, end_of_word_suffix=_END_OF_WORD)
        except Exception as error:  # the library raises nothing narrower when a merge makes an unknown token
            raise ValueError(f"vocabulary and merges do not belong together: {first_line(error)}") from error
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORD_PATTERN), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    @classmethod
    def load(
        cls, folder: Path | str | None = None, max_length: int | None = None, pad_token: str | None = None
    ) -> "CLIPTokenizer":
        """Read the tokenizer of `folder`, or the one in this package if None.

        A folder holds vocab.json and merges.txt, or only tokenizer.json as transformers 5 writes it. Its pad token
        comes from special_tokens_map.json or tokenizer_config.json: Stable Diffusion 1 pads with the end token, 2 with
        "!"; `pad_token` overrides it. `max_length` is in tokens, start and end included; None means the folder's own
        limit, else 77.
        Raises ValueError if the files are missing, damaged or not CLIP's, or tokens were added to CLIP's.
        """
        folder = _PACKAGE_VOCABULARY if folder is None else Path(folder)
        if is_there(folder / "vocab.json") and is_there(folder / "merges.txt"):
            vocab = read_json(folder / "vocab.json")
            lines = small_text(folder / "merges.txt", MAX_JSON_BYTES).split("\n")
            # only the first line can be a comment: a merge may start with "#" too
            merges = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
        elif is_there(folder / "tokenizer.json"):
            model = read_json(folder / "tokenizer.json").get("model", {})
            vocab = model.get("vocab", {})
            merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
        else:
            raise ValueError(f"{folder} holds no tokenizer: need vocab.json and merges.txt, or tokenizer.json")

        settings = _read_settings(folder)
        if added := _added_tokens(folder, settings):
            raise ValueError(
                f"tokenizer in {folder} has tokens beside CLIP's own: {', '.join(map(shortened, added[:5]))}. They "
                "are not supported; open the model without them"
            )
        # a pad token may be written as {"content": "!", ...}
        stored_pad = pad_token or settings.get("pad_token") or END_TOKEN
        pad_token = str(stored_pad.get("content") if isinstance(stored_pad, dict) else stored_pad)
        if max_length is None:
            # transformers writes about 1e30 for "no limit"
            stored = settings.get("model_max_length")
            max_length = stored if isinstance(stored, int) and stored < 10**6 else 77
        try:
            return cls(vocab, [tuple(merge) for merge in merges], pad_token, max_length)
        except ValueError as error:
            read = listed([name for name in TOKENIZER_FILES if is_there(folder / name)], len(TOKENIZER_FILES))
            raise ValueError(f"tokenizer in {folder}: {error} (its files: {read})") from error

    @property
    def max_length(self) -> int:
        """Length of every row, in tokens, start and end included."""
        return self._max_length

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._vocab)

    @property
    def bos_token_id(self) -> int:
        """Id of the start token."""
        return START_ID

    @property
    def eos_token_id(self) -> int:
        """Id of the end token."""
        return END_ID

    @property
    def pad_token(self) -> str:
        """What fills a row after the end token."""
        return self._pad_token

    @property
    def pad_token_id(self) -> int:
        """Id that fills a row after the end token."""
        return self._vocab[self._pad_token]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokenize `texts` to int64 input_ids [B, max_length].

        A longer text is cut, its end token kept, and one warning for each such text says which words were lost.
        Raises ValueError if `texts` is a bare string or holds anything but strings.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is the string {texts!r:.80}, it must be a list of strings")
        room = self._max_length - 2
        rows = []
        cut: dict[str, tuple[int, str]] = {}  # the same text twice in a batch is one warning
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{position}] is {text!r:.80} ({type(text).__name__}), it must be a string")
            cleaned = clean_text(text)
            encoding = self._tokenizer.encode(cleaned)
            if len(encoding.ids) > room:
                cut[text] = len(encoding.ids) + 2, cleaned[encoding.offsets[room][0] :]
            rows.append(self.row(encoding.ids[:room]))
        for text, (num_tokens, lost) in cut.items():
            warnings.warn(
                f"prompt {text[:40]!r}... has {num_tokens} tokens, the text encoder reads {self._max_length}: "
                f"cut off {lost!r}",
                stacklevel=2,
            )
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self._max_length)

    def words(self, text: str) -> list[list[int]]:
        """Return the token ids of each word of `text` (cleaned), in order, without start, end or padding."""
        words: list[list[int]] = [[]]
        encoding = self._tokenizer.encode(clean_text(text))
        for token, token_id in zip(encoding.tokens, encoding.ids, strict=True):
            words[-1].append(token_id)
            if token.endswith(_END_OF_WORD):
                words.append([])
        assert not words[-1], "every word ends in an end-of-word token"
        return words[:-1]

    def row(self, token_ids: Sequence[int]) -> list[int]:
        """Return start, `token_ids`, end and padding: `max_length` ids, so at most `max_length` - 2 are given."""
        assert len(token_ids) <= self._max_length - 2, f"{len(token_ids)} tokens in a row of {self._max_length}"
        row = [START_ID, *token_ids, END_ID]
        return row + [self.pad_token_id] * (self._max_length - len(row))

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer so that transformers, diffusers and older readers open `folder`.

        Files: tokenizer.json and tokenizer_config.json (transformers 5), vocab.json, merges.txt and
        special_tokens_map.json (everything older). Those readers do not clean text, see `clean_text`.
        """
        import transformers  # slow, and not needed to tokenize

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        transformers.CLIPTokenizer(
            vocab=self._vocab,
            merges=self._merges,  # pyright: ignore[reportArgumentType] (pairs, as tokenizers takes them)
            pad_token=self._pad_token,
            model_max_length=self._max_length,
            split_special_tokens=True,  # also keeps "!" apart from the padding when that is "!"
        ).save_pretrained(folder)
        special_tokens = {
            "bos_token": START_TOKEN,
            "eos_token": END_TOKEN,
            "pad_token": self._pad_token,
            "unk_token": END_TOKEN,
        }
        merges = "".join(f"{left} {right}\n" for left, right in self._merges)
        write_json(special_tokens, folder / "special_tokens_map.json")
        write_json(self._vocab, folder / "vocab.json", indent=None)
        write_text("#version: 0.2\n" + merges, folder / "merges.txt")


def _added_tokens(folder: Path, settings: dict) -> list[str]:
    """The tokens that the folder's files add to CLIP's vocabulary, wherever its writer put them."""
    listed: list[Any] = []
    if is_there(folder / "added_tokens.json"):
        listed += read_json(folder / "added_tokens.json").items()
    if is_there(folder / "tokenizer.json"):
        listed += [
            (entry.get("content"), entry.get("id"))
            for entry in read_json(folder / "tokenizer.json").get("added_tokens", [])
        ]
    decoder = settings.get("added_tokens_decoder", {})
    listed += [(entry.get("content"), int(number)) for number, entry in decoder.items()]
    return sorted({str(text) for text, number in listed if not isinstance(number, int) or number >= VOCAB_SIZE})


def _read_settings(folder: Path) -> dict:
    """Return tokenizer_config.json with special_tokens_map.json on top, in transformers' order of precedence."""
    files = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
    config, special_tokens = (read_json(file) if is_there(file) else {} for file in files)
    return config if "added_tokens_decoder" in config else {**config, **special_tokens}
