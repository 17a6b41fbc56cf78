"""A pipeline's folder: open and save it."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from latentdiff.diffusion.timesteps import Sigmas
from latentdiff.formats.files import read_json
from latentdiff.pipeline.options import (
    GenerationDefaults,
)

GENERATION_FILE = "generation_config.json"
SCHEDULED = ("sampler", "sigmas")  # defaults that are in scheduler_config.json


def _read_defaults(path: Path, sampler: str, sigmas: Sigmas) -> GenerationDefaults:
    """The folder's generation defaults; a folder from elsewhere has none but its scheduler's sampler."""
    if not path.is_file():
        return GenerationDefaults(sampler=sampler, sigmas=sigmas)
    values = {name: value for name, value in read_json(path).items() if name not in SCHEDULED}
    try:
        return GenerationDefaults(**values, sampler=sampler, sigmas=sigmas)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _local_folder(name: str, variant: str | None) -> Path:
    """The folder itself, or a snapshot of a hub repository: the parts that a pipeline needs, safetensors only."""
    if os.path.isdir(os.path.expanduser(name)):
        return Path(name).expanduser()
    stem = "model" if variant is None else f"model.{variant}"
    wanted = [f"*/*{stem}.safetensors", f"*/*{stem}-0*.safetensors", "*/*.json", "*/*.txt", "model_index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["safety_checker/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is neither a folder nor a model that could be reached on the hub: {reason}"
        ) from None
