"""Files from the hub."""

from collections.abc import Sequence
from pathlib import Path

from latentdiff.printable import first_line


def hub_snapshot(name: str, wanted: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The local folder of a hub repository's files that fit the glob patterns, fetched unless they are there.

    Raises ValueError if it is no repository, or cannot be reached.
    """
    from huggingface_hub import snapshot_download  # slow, and not needed for a folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=list(ignored)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(first_line(error)) from None


def weight_patterns(stem: str, variant: str | None) -> list[str]:
    """Glob patterns of a model's safetensors: one file, or shards with their index."""
    name = stem if variant is None else f"{stem}.{variant}"
    return [f"{name}.safetensors", f"{name}-0*.safetensors", f"{stem}.safetensors.index*.json"]
