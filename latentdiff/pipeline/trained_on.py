"""What a model was trained on, in its folder: so that generating can warn of what it has never seen."""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from latentdiff.formats.files import from_json, read_json, write_json
from latentdiff.formats.headers import is_there
from latentdiff.pipeline.options import Request
from latentdiff.printable import listed, shown

TRAINED_ON_FILE = "trained_on.json"
MAX_WORDS = 20_000  # more are as good as all
LISTED = 5  # words in a warning
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class TrainedOn:
    """What stage 2 has seen. Raises ValueError for values of other types.

    captions: whether prompts mean anything. unconditional: whether the empty prompt was trained (caption dropout),
    which guidance needs. words: of all captions, in small letters and sorted; None where they are not known, are too
    many, or the text encoder had been trained on others before.
    """

    captions: bool
    unconditional: bool
    words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("captions", "unconditional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false")
        if self.words is not None and not (
            isinstance(self.words, tuple) and all(isinstance(word, str) for word in self.words)
        ):
            raise ValueError("words must be a list of texts, or null")

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What the folder's file says, None without one; ValueError if it is damaged."""
        path = folder / TRAINED_ON_FILE
        if not is_there(path):
            return None
        values = read_json(path)
        if isinstance(values.get("words"), list):
            values["words"] = tuple(values["words"])
        return from_json(cls, values, path)

    def save(self, folder: Path) -> None:
        """Write the folder's file."""
        write_json(asdict(self), folder / TRAINED_ON_FILE)

    def warn(self, request: Request, rows: int) -> None:
        """Warn of what a request asks for that training never showed. rows: of tokens, in its longest prompt."""
        if request.options.prompt_embeds is not None:
            return
        texts = [*request.prompts, *(request.negatives if request.guidance.wanted else [])]
        for problem in self._problems(texts, request.guidance.wanted, rows):
            warnings.warn(problem, stacklevel=5)

    def _problems(self, texts: Sequence[str], guided: bool, rows: int) -> Iterable[str]:
        if not self.captions:
            if any(texts):
                yield "this model was trained without captions: prompts change its images in no meaningful way"
            return
        if not self.unconditional and (guided or not all(texts)):
            yield (
                "this model was trained without caption dropout, so it doesn't know the empty prompt, which guidance "
                "needs: use guidance_scale 1 and a prompt"
            )
        if rows > 1:
            yield f"the longest prompt needs {rows} rows of tokens, the model was trained on captions of one"
        known = frozenset(self.words or ())
        if self.words is not None and (unseen := [word for word in words_of(texts) if word not in known]):
            yield f"not in any caption that this model was trained on: {listed([*map(shown, unseen)], LISTED)}"


def words_of(texts: Iterable[str]) -> list[str]:
    """The different words of texts in small letters, in order.

    Scripts without capitals are left out: in some of them, words have no spaces between them.
    """
    found = (word.lower() for text in texts for word in _WORD.findall(text))
    return [word for word in dict.fromkeys(found) if word != word.upper()]
