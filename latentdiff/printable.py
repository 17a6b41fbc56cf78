"""Text from files and from users as it is printed: one line, no control characters, no endless values."""

import reprlib
from collections.abc import Sequence

MAX_LINE = 400  # characters
MAX_REASON = 200  # characters of another error's message in a line
MAX_TEXT = 100  # characters of a name, or of a text in a value
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = MAX_TEXT


def printable(text: str) -> str:
    """`text` with everything but its line breaks that a terminal would obey, or not show, escaped."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def shortened(value: object) -> str:
    """A value as Python writes it, without the middle of long texts and the end of long lists."""
    return _SHORT.repr(value)


def shown(name: object) -> str:
    """A name as it stands, if it is one that can be read; else in quotes, escaped and shortened."""
    text = str(name)
    return text if text.isprintable() and 0 < len(text) <= MAX_TEXT else shortened(text)


def shown_path(path: object) -> str:
    """A path as it stands, if it can be read; escaped if not, and without its middle if it is very long."""
    return cut(printable(str(path)).replace("\n", "\\n"), MAX_REASON)


def listed(names: Sequence[str], at_most: int = 5) -> str:
    """The first names, with commas between them."""
    return ", ".join(names[:at_most]) + (", ..." if len(names) > at_most else "")


def images_of(count: int, kind: str = "") -> str:
    """Such as "1 image" and "1,200 training images"."""
    return f"{count:,} {kind}{' ' if kind else ''}image{'' if count == 1 else 's'}"


def cut(line: str, at_most: int = MAX_LINE) -> str:
    """A line without the middle of what makes it very long."""
    return line if len(line) <= at_most else f"{line[: at_most - 60]} ... {line[-55:]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return cut((str(error).strip() or type(error).__name__).splitlines()[0], MAX_REASON)
