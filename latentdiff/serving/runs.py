"""The runs of a folder, by name. What a URL names is looked up here; no path is made of it."""

import os
from dataclasses import dataclass
from pathlib import Path

from latentdiff.formats.diffusers_folder import PIPELINE_FILE
from latentdiff.formats.lora import LORA_FILE, holds_lora
from latentdiff.training.checkpoint import list_checkpoints, step_of
from latentdiff.training.run_folder import RECORD_FILE

PUBLISHED = "published"


@dataclass(frozen=True)
class Listing:
    """The runs by name, sorted, and the names of those that are left out since a link in them leaves the folder."""

    runs: dict[str, Path]
    left_out: list[str]


def list_runs(folder: Path) -> Listing:
    """The runs and pipelines directly in a folder; the folder alone if it is one itself.

    Raises ValueError if it is no folder.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds the runs, such as saved")
    if _is_run(root):
        return Listing({root.name: root}, [])
    runs: dict[str, Path] = {}
    left_out = []
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not _is_run(path):
            continue
        if _leaves(path, root):
            left_out.append(path.name)
        else:
            runs[path.name] = path
    return Listing(runs, left_out)


def weights_of(run: Path) -> list[str]:
    """What can be generated with: "published", if there is a pipeline, and the steps of the checkpoints, newest first.

    Nothing for a run of stage 1.
    """
    is_published = published_file(run).is_file()
    if not is_published and (run / "config.json").is_file():  # an autoencoder
        return []
    published = [PUBLISHED] if is_published else []
    return published + [str(step_of(checkpoint)) for checkpoint in reversed(list_checkpoints(run))]


def published_file(run: Path) -> Path:
    """The file that a run writes when it is finished: of a pipeline, or of the adapters that it trained."""
    return run / (LORA_FILE if holds_lora(run) else PIPELINE_FILE)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (RECORD_FILE, PIPELINE_FILE, LORA_FILE, "metrics.jsonl"))


def _leaves(path: Path, root: Path) -> bool:
    """Whether a folder, or any link below it, leads out of `root`."""
    seen: set[Path] = set()
    try:
        left = [path.resolve()]
        while left:
            place = left.pop()
            if place in seen:
                continue
            seen.add(place)
            if not place.is_relative_to(root):
                return True
            if not place.is_dir():
                continue
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_symlink() or entry.is_dir():
                        left.append(Path(entry.path).resolve())
    except (OSError, RuntimeError):  # a loop of links, or a folder that cannot be read
        return True
    return False
