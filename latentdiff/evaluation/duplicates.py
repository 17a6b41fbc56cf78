"""Images that are nearly the same: resized, saved again, slightly cropped or touched up.

Two images are near-duplicates if their difference hashes (dHash, 64 bits, by the library ImageHash) differ in at most
MAX_BITS bits, and their colours on an 8 x 8 grid by at most MAX_COLOURS on average and MAX_CHANNEL anywhere.
docs/data.md has the measurements behind these limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_BITS = 6  # of 64
MAX_COLOURS = 8.0  # of 0 .. 255
MAX_CHANNEL = 30  # of one channel in one cell: tells a small object from the same one in another colour
GRID = 8  # cells along a side
SMALL = 9 * GRID  # pixels of the side to which an image is reduced first; dHash needs 9 x 8 of them
# Hashes that differ in MAX_BITS bits are equal in at least one of MAX_BITS + 1 bands.
BANDS = MAX_BITS + 1
WINDOW = 500  # images of an equal band that one is compared with: those that are next in brightness


@dataclass(frozen=True)
class Fingerprint:
    """What an image is recognised by. bits: its dHash; colours: RGB of an 8 x 8 grid, row by row."""

    bits: int
    colours: bytes


def is_available() -> bool:
    """Whether the library of the hashes is installed."""
    try:
        import imagehash  # noqa: F401
    except ImportError:
        return False
    return True


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an image without transparency."""
    import imagehash  # the extra "inspect"

    small = image.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX)
    bits = np.packbits(imagehash.dhash(small, hash_size=GRID).hash).tobytes()
    colours = small.resize((GRID, GRID), Image.Resampling.BOX)
    return Fingerprint(int.from_bytes(bits, "big"), colours.tobytes())


def near_groups(prints: Sequence[Fingerprint]) -> list[list[int]]:
    """Indices of images that are near-duplicates of one another, directly or through others of the group.

    Only images whose hashes agree in one of 7 bands of 9 or 10 bits are compared, each with at most WINDOW others a
    band, so the time grows with the pairs that agree. In a set with more than WINDOW images that look alike some pairs
    may be missed.
    """
    if len(prints) < 2:
        return []
    bits = np.array([one.bits for one in prints], dtype=np.uint64)
    colours = np.frombuffer(b"".join(one.colours for one in prints), dtype=np.uint8).reshape(len(prints), -1)
    bands = [sum(1 << int(bit) for bit in band) for band in np.array_split(np.arange(64), BANDS)]
    masks = [np.uint64(band) for band in bands]
    edges = [pair for i, mask in enumerate(masks) for pair in _pairs(bits, colours, mask, masks[:i])]
    if not edges:
        return []
    first, second = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(prints), len(prints)))
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for index in sorted({*first.tolist(), *second.tolist()}):
        groups.setdefault(int(labels[index]), []).append(index)
    return list(groups.values())


def _pairs(bits: np.ndarray, colours: np.ndarray, band: np.uint64, earlier: Sequence[np.uint64]) -> list[np.ndarray]:
    """Pairs [2, n] of near-duplicates whose hashes agree in a band (a mask), and in none of the earlier ones."""
    keys = bits & band
    brightness = colours.mean(1)  # differs by no more than the colours do on average
    order = np.lexsort((brightness, keys))
    keys, brightness = keys[order], brightness[order]
    found, here = [], np.arange(len(order))
    for distance in range(1, min(WINDOW, len(order) - 1) + 1):
        here = here[here + distance < len(order)]
        there = here + distance
        # Both are sorted: who has no partner at this distance has none at a larger one.
        here = here[(keys[here] == keys[there]) & (brightness[there] - brightness[here] <= MAX_COLOURS)]
        if len(here) == 0:
            break
        a, b = order[here], order[here + distance]
        other = bits[a] ^ bits[b]
        alike = np.bitwise_count(other) <= MAX_BITS
        for mask in earlier:
            alike &= (other & mask) != 0
        a, b = a[alike], b[alike]
        differences = np.abs(colours[a].astype(np.int16) - colours[b])
        near = (differences.mean(1) <= MAX_COLOURS) & (differences.max(1, initial=0) <= MAX_CHANNEL)
        found.append(np.stack([a[near], b[near]]))
    return found
