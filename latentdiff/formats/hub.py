"""Files from the hub."""

from collections.abc import Sequence
from pathlib import Path

from latentdiff.formats.weight_files import index_names, single_name
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


def hub_files(name: str) -> list[str] | None:
    """The names of a hub repository's files; None if it cannot be reached, or is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().list_repo_files(name)
    except (HFValidationError, HfHubHTTPError, ConnectionError, OSError):
        return None


def weight_patterns(stem: str, variant: str | None) -> list[str]:
    """Glob patterns of a model's safetensors: one file, or shards with their index, in both namings of variants."""
    shard = f"{stem}-?????-of-?????.safetensors"
    if variant is not None:
        shard = f"{stem}.{variant}-?????-of-?????.safetensors"
    patterns = [single_name(stem, variant), shard, *index_names(stem, variant)]
    return patterns if variant is None else [*patterns, f"{stem}-?????-of-?????.{variant}.safetensors"]
