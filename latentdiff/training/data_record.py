"""What a run was trained on, so that a resume notices what has changed since."""

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter
from torch import nn

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.data.index import digest_of_bytes
from latentdiff.data.latent_cache import digest_of
from latentdiff.printable import listed, shown

SHOWN = 5  # names in a message

Row = tuple[str, str, str]  # name, digest of the image's bytes, digest of the caption


@dataclass(frozen=True)
class DataRecord:
    """Names and digests of the images and captions, and digests of the weights that are not trained.

    It is kept compressed: it stays in memory as long as the run, and a set can have millions of images.
    """

    packed: bytes

    @classmethod
    def of(cls, images: CaptionedImages, held_out: CaptionedImages, frozen: Mapping[str, nn.Module]) -> Self:
        """Of what a run is about to train on. frozen: the modules that are not trained, by what they are."""
        weights = {name: digest_of({}, module) for name, module in frozen.items()}
        return cls.from_json({"images": _rows(images), "held_out": _rows(held_out), "frozen": weights})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Of what `to_json` gives."""
        known = {"images": list[Row], "held_out": list[Row], "frozen": dict[str, str]}
        checked = {name: TypeAdapter(kind).validate_python(values[name]) for name, kind in known.items()}
        return cls(zlib.compress(json.dumps(checked).encode()))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return json.loads(zlib.decompress(self.packed))

    @property
    def images(self) -> list[Row]:
        """Of the training images."""
        return [(*row,) for row in self.to_json()["images"]]

    @property
    def held_out(self) -> list[Row]:
        """Of the held-out images."""
        return [(*row,) for row in self.to_json()["held_out"]]

    @property
    def frozen(self) -> dict[str, str]:
        """Digests of weights by what they are, such as "autoencoder"."""
        return self.to_json()["frozen"]

    def changes_since(self, old: Self) -> list[str]:
        """What differs from an older record, a line each; empty if nothing does."""
        lines = [f"other weights of the {name}" for name in self.replaced(old)]
        lines += _differences("images", self.images, old.images)
        return lines + _differences("held-out images", self.held_out, old.held_out)

    def replaced(self, old: Self) -> list[str]:
        """The frozen parts whose weights are others."""
        before = old.frozen
        return [name for name, digest in self.frozen.items() if before.get(name, digest) != digest]

    def shares_images_with(self, old: Self) -> bool:
        """Whether any training image is the same."""
        before = {row[1] for row in old.images}
        return not before or not before.isdisjoint(row[1] for row in self.images)


def _rows(images: CaptionedImages) -> list[Row]:
    names = _short_names([images.name(row) for row in range(len(images))])
    captions = ("\n".join(own).encode("utf-8", "surrogatepass") for own in images.all_captions)
    return list(zip(names, images.digests, map(digest_of_bytes, captions), strict=True))


def _short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folder that they share, so that a moved folder is recognised."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def _differences(kind: str, now: Sequence[Row], before: Sequence[Row]) -> list[str]:
    new, old = _keyed(now), _keyed(before)
    both = [key for key in new if key in old]
    groups = {
        f"{kind} changed": [key for key in both if new[key][1] != old[key][1]],
        f"captions of {kind} changed": [key for key in both if new[key][2] != old[key][2]],
        f"{kind} added": [key for key in new if key not in old],
        f"{kind} removed": [key for key in old if key not in new],
    }
    lines = []
    for text, keys in groups.items():
        if keys:
            names = listed([shown(name) for name, _ in keys], SHOWN)
            lines.append(f"{text}: {len(keys)} of {len(before)} ({names})")
    if not lines and list(new) != list(old):
        lines.append(f"{kind} in another order")
    return lines


def _keyed(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """Rows by name, and by a number where several have the same."""
    seen: Counter[str] = Counter()
    keyed: dict[tuple[str, int], Row] = {}
    for row in rows:
        keyed[row[0], seen[row[0]]] = row
        seen[row[0]] += 1
    return keyed
