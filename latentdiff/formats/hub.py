"""What a user names: a folder or a file here, or a repository of the hub."""

import os
from collections.abc import Sequence
from pathlib import Path

from latentdiff.formats.weight_files import index_names, single_name
from latentdiff.printable import first_line, shortened


def local_path(name: str | Path, wanted: Sequence[str], what: str, hint: str = "") -> Path:
    """The folder or file of that name, or else the local folder of a hub repository's files that fit glob patterns.

    A name such as saved/mine is not looked for on the hub if there is a folder `saved` here.
    what: stands before the name in messages; hint: after them.
    Raises ValueError, with the name as it was given, if there is neither.
    """
    text = str(name)
    place = os.path.expanduser(text)
    if os.path.exists(place):
        return Path(place)
    end = f"; {hint}" if hint else ""
    if not _may_be_on_the_hub(text):
        raise ValueError(f"{what} {shortened(text)} does not exist{end}")
    try:
        return hub_snapshot(text, wanted)
    except ValueError as error:
        raise ValueError(
            f"{what} {shortened(text)} is no folder or file here, and was not loaded from the hub: {error}{end}"
        ) from None


def _may_be_on_the_hub(name: str) -> bool:
    """Whether a name that is of nothing here can be OWNER/NAME, or NAME."""
    parts = name.split("/")
    return len(parts) <= 2 and parts[0][:1] not in ("", ".", "~") and not (len(parts) > 1 and os.path.isdir(parts[0]))


def hub_snapshot(name: str, wanted: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The local folder of a hub repository's files that fit the glob patterns, fetched unless they are there.

    Raises ValueError if it is no repository, or cannot be reached.
    """
    from huggingface_hub import constants, snapshot_download  # slow, and not needed for a folder
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=list(ignored)))
    except LocalEntryNotFoundError:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        reason = f"the hub can't be reached{offline}, and the cache has no whole copy of it"
    except GatedRepoError:
        reason = f"its terms must be accepted at https://huggingface.co/{name}, and `hf auth login` run here"
    except RepositoryNotFoundError:
        reason = "there is no such repository, or it is private (`hf auth login`)"
    except (HFValidationError, HfHubHTTPError, ConnectionError, OSError) as error:
        reason = first_line(error)
    raise ValueError(reason)


def hub_files(name: str) -> list[str] | None:
    """The names of a hub repository's files; None if it cannot be reached, or is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().list_repo_files(name)
    except (HFValidationError, HfHubHTTPError, ConnectionError, OSError):
        return None


def model_patterns(stem: str, variant: str | None, folder: str = "") -> list[str]:
    """Glob patterns of a model's files in a folder of a repository; stem: how the names of its weights begin."""
    inside = f"{folder}/" if folder else ""
    return [inside + pattern for pattern in ("config.json", *weight_patterns(stem, variant))]


def weight_patterns(stem: str, variant: str | None) -> list[str]:
    """Glob patterns of a model's safetensors: one file, or shards with their index, in both namings of variants."""
    shard = f"{stem}-?????-of-?????.safetensors"
    if variant is not None:
        shard = f"{stem}.{variant}-?????-of-?????.safetensors"
    patterns = [single_name(stem, variant), shard, *index_names(stem, variant)]
    return patterns if variant is None else [*patterns, f"{stem}-?????-of-?????.{variant}.safetensors"]
