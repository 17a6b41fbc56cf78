"""Who is told what is found in a data source while it is opened. Training stops at the first problem."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image


class Watcher:
    """Stops at the first problem, as training does. One that collects them (`latentdiff inspect`) overrides it."""

    def refuse(self, message: str) -> None:
        """What training refuses. Raises ValueError; where a subclass returns, what is meant is left out."""
        raise ValueError(message)

    def warn(self, message: str) -> None:
        """What training goes on after, with a warning."""
        warnings.warn(message, stacklevel=3)

    def unreadable(self, files: Sequence[str]) -> None:
        """All files that cannot be read, or that are not there, each with the cause."""

    def look(self, digest: str, content: bytes, image: Image.Image) -> None:
        """A file that was read, its digest and the decoded image; called by several threads."""

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """A ValueError of the block is a problem like those of `refuse`."""
        try:
            yield
        except ValueError as error:
            self.refuse(str(error))


STRICT = Watcher()
