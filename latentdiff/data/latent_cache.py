"""The latent cache of stage 2: outputs of the frozen VAE and text encoder for each image and caption, kept on disk.

FOLDER/<name>-latents-<16 hex>/   posterior moments of images, and of the flipped ones where data.flip > 0;
                                  with buckets a folder for each shape
FOLDER/<name>-text-<16 hex>/      of a frozen text encoder: its context of captions

The hex digits are a fingerprint of everything that all items of a folder share, so a stale cache is never opened. Each
item is found by a digest of its own, of the image's bytes or the caption, so only new items are encoded, in whatever
order they come. A folder holds safetensors files, each with the digests of its items and named after these: what is
there is what the files say, and a file, once written, never changes. Changed bytes within a file of the right size are
not detected.

Several runs may share a folder. One at a time adds files; a run that reads them holds a lock that they stay.
"""

import hashlib
import json
import re
import shutil
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from math import prod
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from latentdiff.config import size_of
from latentdiff.data.batches import Item, Key
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.data.index import digest_of_bytes
from latentdiff.data.shapes import Shape
from latentdiff.distributed import chunks, from_main, on_all, on_main
from latentdiff.formats.files import write_safetensors
from latentdiff.formats.locks import FolderUse, holding, holding_file
from latentdiff.models.pixel_space import Autoencoder
from latentdiff.models.pretrained_text import AnyTextEncoder, Tokenizer

FORMAT_VERSION = 4  # part of every fingerprint: raise it when the same inputs give other tensors or files
DIGESTS = "digests"  # name of the tensor of digests in a file
MAX_SHARD_BYTES = 256 * 2**20
MAX_SHARD_ITEMS = 4096
MIN_SHARD_ITEMS = 64
WANTED_SHARDS = 16  # so that a small set too is split over processes, and loses little when interrupted
MAX_SMALL_SHARDS = 64  # of fewer items than a small set's; more are put together
MAPPED_BYTES = 256 * 2**20  # of one part may be mapped in memory before all its files are unmapped
FAULT_AROUND = 2 * 2**20  # a read may bring in a huge page around what is read
CPU_BATCH = 4  # on the CPU larger batches are not faster, and a single new item is padded to one
WAIT = 0.5  # seconds, between two looks at what another run does
# Tensor name -> (shape of one item, dtype).
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class LatentCache(Dataset):
    """Moments of all images, and a frozen text encoder's context of their captions, read from memory-mapped files.

    It stores the posterior's moments, not samples, so each epoch samples new latents; whether an epoch sees an image
    flipped is decided when it is read. In pixel space the moments are the 8-bit images.
    """

    def __init__(
        self,
        images: CaptionedImages,
        latents: Sequence["Items"],
        text: "Items | None",
        text_rows: "CaptionRows",
    ) -> None:
        """`text_rows` gives each caption's item of `text` (item 0: "").

        latents: of the images of each shape, as `images.by_shape()` has them.
        """
        groups = images.by_shape()
        assert [len(group) for group in groups] == [len(part) for part in latents]
        self.images = images
        self.latents = latents
        self.text_rows = text_rows
        self._text = text
        # Of each image, its part and its item there. An array's numbers are read faster than a tensor's.
        parts, items = np.zeros(len(images), dtype=np.int32), np.zeros(len(images), dtype=np.int32)
        for part, group in enumerate(groups):
            parts[group], items[group] = part, np.arange(len(group))
        self._parts, self._items = array("i", parts.tobytes()), array("i", items.tobytes())

    @classmethod
    def open(
        cls,
        folder: Path,
        name: str,
        images: CaptionedImages,
        vae: Autoencoder,
        tokenizer: Tokenizer,
        text_encoder: AnyTextEncoder | None,
        batch_size: int,
        accelerator: Accelerator,
        progress: bool,
        replace: bool,
        shard_items: int | None = None,
    ) -> "LatentCache":
        """Open the cache in `folder`, after encoding what is missing. Every process calls this.

        name: distinguishes the caches of several image sets ("train", "held_out"). text_encoder: None if it is trained
        too; its context is not kept then, nor if data.shuffle_caption makes new captions in each epoch. Models encode
        on their own device and in their own dtype.
        replace: when this cache is complete, remove the others of this name in `folder`, and what is in this one but
        not in use any more (see `Shards.tidy`), unless another run uses them; false in a folder that several runs
        share. shard_items: items per file; None: chosen by size.

        Raises ValueError for random crops (each is another image), tensors that are not finite, a full disk.
        """
        if images.config.crop != "center":
            raise ValueError("data.crop random cannot be cached; set train.cache_latents=false or data.crop=center")
        jobs = []
        for group in images.by_shape():
            part = images.select(group)
            fingerprint = _agree_on_digest(accelerator, lambda part=part: latents_digest(vae, part))
            path = folder / f"{name}-latents-{fingerprint[:16]}"
            shards = Shards(path, fingerprint, _moments_layout(vae, part), shard_items)
            encode = partial(_encode_images, vae, part, batch_size)
            jobs.append(_Job("images", shards, digest_numbers(part.digests), encode, part.name))
        rows = CaptionRows(digest_numbers([]))
        if text_encoder is not None and not images.config.shuffle_caption:
            captions = list(dict.fromkeys(["", *images.distinct_captions]))
            digests = digest_numbers([_caption_digest(caption) for caption in captions])
            rows = CaptionRows(digests)
            fingerprint = _agree_on_digest(accelerator, lambda: text_digest(tokenizer, text_encoder))
            path = folder / f"{name}-text-{fingerprint[:16]}"
            shards = Shards(path, fingerprint, _text_layout(tokenizer, text_encoder), shard_items)
            encode = partial(_encode_captions, tokenizer, text_encoder, captions, batch_size)
            jobs.insert(0, _Job("captions", shards, digests, encode, lambda row: _caption_name(images, captions[row])))
        items = _complete(jobs, folder, accelerator, progress, replace)
        if replace:
            on_main(accelerator, lambda: _remove_others(folder, name, [job.shards.folder for job in jobs]))
        text = items.pop(0) if jobs[0].kind == "captions" else None
        return cls(images, items, text, rows)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Item:
        """`moments` [2C, h, w] float32, `caption`, of a frozen text encoder its `context` [L, D], `key`.

        In pixel space `moments` are [C, H, W] uint8. The tensors are views of mapped files: copy (or stack) them,
        do not write to them.
        """
        flipped = self.images.view(key["index"], key["epoch"]).flip
        caption = self.images.caption(key["index"], key["epoch"])
        item = Item(key=key, caption=caption, moments=self.moments(key["index"])[int(flipped)])
        if self._text is not None:
            item["context"] = self._text.item(self.text_rows[caption])["context"]
        return item

    def moments(self, index: int) -> Tensor:
        """[F, ..., h, w] of an image and, where F is 2, of the flipped one."""
        return self.latents[self._parts[index]].item(self._items[index])["moments"]

    @property
    def unconditional_context(self) -> Tensor | None:
        """The frozen text encoder's context [L, D] of the unconditional prompt; None if contexts are not kept."""
        return None if self._text is None else self._text.item(0)["context"].clone()


class CaptionRows:
    """The place of each of many distinct captions in a list, without keeping these: 16 bytes each."""

    def __init__(self, digests: np.ndarray) -> None:
        """Of the captions' digests; ValueError if two are the same (64 bits)."""
        self._rows = np.argsort(digests)
        self._digests = digests[self._rows]
        if len(np.unique(digests)) < len(digests):
            raise ValueError("two captions have the same digest; change one of them")

    def __getitem__(self, caption: str) -> int:
        """The place of one of the captions."""
        digest = digest_numbers([_caption_digest(caption)])[0]
        place = int(np.searchsorted(self._digests, digest))
        assert place < len(self._digests) and self._digests[place] == digest
        return int(self._rows[place])


@torch.no_grad()
def encode_means(vae: Autoencoder, images: CaptionedImages, batch_size: int) -> list[Tensor]:
    """The posterior mean of each image as unit-scale latents [C, h, w], on the device of `vae`."""
    means: dict[int, Tensor] = {}
    for indices, pixels in images.batches(batch_size):
        means |= zip(indices, vae.sample(vae.encode(pixels.to(vae.device))), strict=True)
    return [means[index] for index in range(len(images))]


# ----------------------------------------------------------------------------------------------------------------------
# Files


class Items:
    """Items of one part of a cache, read from files that are mapped into memory when they are first needed.

    Mapped pages count as the process's memory (RssFile), though the system can reclaim them; to bound that, all files
    are unmapped when they may have reached MAPPED_BYTES. The system's file cache is not affected.
    """

    def __init__(
        self,
        shards: "Shards",
        names: Sequence[str],
        file_items: int,
        places: np.ndarray,
        use: FolderUse | None = None,
    ) -> None:
        """names: of the files. file_items: how many items these hold, with those that are not of this data set.

        places: of each item its file and its row there, [2, items] int32. use: kept, so that the files are.
        """
        self.folder, self.layout, self.item_bytes = shards.folder, shards.layout, shards.item_bytes
        self._paths = [shards.path(name) for name in names]
        self._files, self._rows = (array("i", row.astype(np.int32).tobytes()) for row in places)
        self._bounded = file_items * self.item_bytes > MAPPED_BYTES
        self._use = use
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._read_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> dict[str, Tensor]:
        """The tensors of one item: views of a mapped file."""
        assert 0 <= index < len(self)
        file, row = self._files[index], self._rows[index]
        size = self.item_bytes + FAULT_AROUND
        self._read_bytes += size
        if self._bounded and self._read_bytes > MAPPED_BYTES:
            self._mapped.clear()
            self._read_bytes = size
        if file not in self._mapped:
            with safe_open(self._paths[file], framework="pt") as opened:
                self._mapped[file] = {name: opened.get_tensor(name) for name in self.layout}
        return {name: values[row] for name, values in self._mapped[file].items()}


@dataclass(frozen=True)
class Listing:
    """What is in the files of a part: the digests of the items, file after file, int64.

    problems: of files that cannot be used, what is wrong with them.
    """

    names: list[str]
    counts: list[int]  # items of each file
    digests: np.ndarray
    problems: dict[Path, str] = field(default_factory=dict)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """Where each item is among all of the listing; -1: nowhere."""
        if len(self.digests) == 0:
            return np.full(len(digests), -1)
        order = np.argsort(self.digests, kind="stable")
        first = np.searchsorted(self.digests, digests, sorter=order)
        places = order[np.minimum(first, len(order) - 1)]
        return np.where(self.digests[places] == digests, places, -1)

    def missing(self, digests: np.ndarray) -> list[int]:
        """The rows of the digests that are nowhere; of equal ones the first."""
        rows = np.flatnonzero(self.find(digests) < 0)
        _, first = np.unique(digests[rows], return_index=True)
        return rows[np.sort(first)].tolist()

    def file_of(self, places: np.ndarray) -> np.ndarray:
        """The number of the file that each place is in."""
        return np.searchsorted(np.cumsum(self.counts), places, side="right")

    def places(self, digests: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The files that hold these items, all of which are there, and of each its place in that list and its row."""
        found = self.find(digests)
        assert (found >= 0).all()
        files, which = np.unique(self.file_of(found), return_inverse=True)
        starts = np.cumsum([0, *self.counts])
        return files.tolist(), np.stack([which.reshape(-1), found - starts[files][which.reshape(-1)]])


class Shards:
    """The files of one part of a cache, whose items have the tensors in `layout`.

    fingerprint: hex digest of everything that the items share. shard_items: items per new file; None: chosen by size.
    """

    def __init__(self, folder: Path, fingerprint: str, layout: Layout, shard_items: int | None = None) -> None:
        assert DIGESTS not in layout
        self.folder = folder
        self.fingerprint = fingerprint
        self.layout = layout
        self.item_bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        self._wanted_items = shard_items

    def shard_items(self, count: int) -> int:
        """Items per file, if so many are written."""
        return self._wanted_items or _shard_items(count, self.item_bytes)

    def path(self, name: str) -> Path:
        """Of a file by its name, 16 hex digits."""
        return self.folder / f"{name}.safetensors"

    def write(self, digests: np.ndarray, tensors: Mapping[str, Tensor]) -> str:
        """Write a file of items, stacked, atomically; its name."""
        expected = {name: ((len(digests), *shape), dtype) for name, (shape, dtype) in self.layout.items()}
        assert {name: (tuple(values.shape), values.dtype) for name, values in tensors.items()} == expected
        name, own = file_name_of(digests), torch.from_numpy(digests.copy())
        write_safetensors({**tensors, DIGESTS: own}, self.path(name), {"fingerprint": self.fingerprint})
        return name

    def listing(self) -> Listing:
        """What is there now."""
        names, parts, problems = [], [], {}
        for path in sorted(self.folder.glob("*.safetensors")):
            found = self._digests_of(path)
            if isinstance(found, np.ndarray):
                names.append(path.stem)
                parts.append(found)
            elif path.exists():  # another run may have removed a damaged one
                problems[path] = found
        digests = np.concatenate([digest_numbers([]), *parts])
        return Listing(names, [len(part) for part in parts], digests, problems)

    def _digests_of(self, path: Path) -> np.ndarray | str:
        """Of the items of a file, or what is wrong with it."""
        try:
            with safe_open(path, framework="np") as file:  # this compares the header with the file's length
                own = (file.metadata() or {}).get("fingerprint") == self.fingerprint
                digests = file.get_tensor(DIGESTS) if own else digest_numbers([])
        except (SafetensorError, OSError) as error:
            return f"is truncated or damaged ({error})"
        return digests if own and path.stem == file_name_of(digests) else "belongs to another cache"

    def discard(self, listing: Listing) -> None:
        """Remove the files that cannot be used, with a warning that names them. No other run may be writing."""
        for path, problem in listing.problems.items():
            warnings.warn(f"{path} {problem}; what is missing of the cache is encoded again", stacklevel=2)
            path.unlink(missing_ok=True)

    def tidy(self, listing: Listing, digests: np.ndarray, progress: bool) -> bool:
        """Remove what is not needed for items of these digests; True if files have changed. No other run may be here.

        Items that are not used any more stay until they are more than half: they may come back (an image that was
        moved away, another data.holdout), and so all rewriting together copies no more than was once encoded. Then the
        files that hold some are written anew without them. So are, put together, small files that years of single
        additions have left.
        """
        for temporary in self.folder.glob(".*.tmp"):  # of killed processes
            temporary.unlink()
        self.discard(listing)
        used = np.unique(listing.find(digests))
        counts = np.array(listing.counts, dtype=np.int64)
        used_counts = np.bincount(listing.file_of(used), minlength=len(counts))
        chosen = np.zeros(len(counts), dtype=bool)
        if 2 * len(used) < len(listing.digests):
            chosen |= used_counts < counts
        small = counts < _shard_items(1, self.item_bytes)
        if small.sum() > MAX_SMALL_SHARDS:
            chosen |= small
        moved = digests[np.isin(listing.find(digests), used[chosen[listing.file_of(used)]])]
        moved = moved[np.sort(np.unique(moved, return_index=True)[1])]  # in their order, each once
        if not chosen.any() or len(moved) * self.item_bytes > shutil.disk_usage(self.folder).free:
            return False
        written = self._rewrite(listing, moved, progress)
        for file in np.flatnonzero(chosen).tolist():
            if listing.names[file] not in written:
                self.path(listing.names[file]).unlink()
        return True

    def _rewrite(self, listing: Listing, moved: np.ndarray, progress: bool) -> set[str]:
        """Write the items of these digests once more, in this order; the names of the files."""
        files, places = listing.places(moved)
        file_items = sum(listing.counts[file] for file in files)
        items = Items(self, [listing.names[file] for file in files], file_items, places)
        written = set()
        with tqdm(total=len(moved), desc="rewrite cache", unit="item", disable=not progress, leave=False) as bar:
            for rows in chunks(range(len(moved)), self.shard_items(len(moved))):
                read = [items.item(row) for row in rows]
                tensors = {name: torch.stack([item[name] for item in read]) for name in self.layout}
                written.add(self.write(moved[rows], tensors))
                bar.update(len(rows))
        return written


def file_name_of(digests: np.ndarray) -> str:
    """The name of a file that holds these items: two runs that encode the same write the same file."""
    return digest_of_bytes(digests.astype("<i8").tobytes())


def digest_numbers(digests: Sequence[str]) -> np.ndarray:
    """Digests of 16 hex digits as int64."""
    return np.array([int(digest, 16) for digest in digests], dtype=np.uint64).view(np.int64)


def _caption_digest(caption: str) -> str:
    return digest_of_bytes(caption.encode("utf-8", "surrogatepass"))


def _shard_items(count: int, item_bytes: int) -> int:
    """Items per shard: at most MAX_SHARD_BYTES and MAX_SHARD_ITEMS, fewer if that makes fewer than WANTED_SHARDS."""
    wanted = max(MIN_SHARD_ITEMS, -(-count // WANTED_SHARDS))
    return max(1, min(MAX_SHARD_ITEMS, MAX_SHARD_BYTES // item_bytes, wanted))


def _remove_others(folder: Path, name: str, kept: Sequence[Path]) -> None:
    """Remove the caches of `name` that are not in `kept`, unless another run uses them."""
    for other in folder.iterdir():
        if re.fullmatch(rf"{re.escape(name)}-(latents|text)-[0-9a-f]{{16}}", other.name) and other not in kept:
            with suppress(FileNotFoundError), holding(other) as unused:
                if unused:
                    shutil.rmtree(other)


# ----------------------------------------------------------------------------------------------------------------------
# Fingerprints


def latents_digest(vae: Autoencoder, images: CaptionedImages) -> str:
    """Fingerprint (32 hex digits) of what the moments share: the autoencoder, and how images become pixels.

    The images must be of one shape.
    """
    config = images.config
    settings = {
        "format": FORMAT_VERSION,
        "vae": vae.config.model_dump(mode="json"),
        "size": size_of(_shape(images)),
        "channels": images.channels,
        "crop": config.crop,
        "background": list(config.background),
        "flipped": config.flip > 0,
    }
    return digest_of(settings, vae)


def text_digest(tokenizer: Tokenizer, text_encoder: AnyTextEncoder) -> str:
    """Fingerprint (32 hex digits) of what the contexts share: the tokenizer and the text encoder."""
    settings = {
        "format": FORMAT_VERSION,
        "max_length": tokenizer.max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "text_encoder": text_encoder.to_transformers(),
    }
    return digest_of(settings, text_encoder)


def digest_of(settings: Mapping[str, object], model: nn.Module | None) -> str:
    """BLAKE2b of settings as JSON and of a model's weights: names, types, shapes, bytes."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for key, value in sorted(model.state_dict().items()) if model is not None else []:
        digest.update(f"\n{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


@dataclass(frozen=True)
class _Job:
    """A part to complete: images or captions.

    digests: of the items, int64. encode: yields the tensors of some items in batches; name: of an item, for messages.
    """

    kind: str
    shards: Shards
    digests: np.ndarray
    encode: Callable[[Sequence[int]], Iterator[dict[str, Tensor]]]
    name: Callable[[int], str]


def _complete(
    jobs: Sequence[_Job], folder: Path, accelerator: Accelerator, progress: bool, replace: bool
) -> list[Items]:
    """Encode what is missing, split over the processes, say how much that was, and open all parts.

    The main process holds the folders in use and looks at what is there, for all.
    """
    items, encoded = [], {"images": [0, 0], "captions": [0, 0]}
    with ExitStack() as failed:
        # At once: an exception that is kept keeps what its frames hold.
        uses = [_use(job.shards.folder, accelerator, replace, failed) for job in jobs]
        missing = [_agree_on_missing(job, accelerator) for job in jobs]
        on_all(accelerator, lambda: _check_disk(folder, jobs, missing))
        for job, use, rows in zip(jobs, uses, missing, strict=True):
            if rows:
                with _writing(job.shards.folder, accelerator):
                    # Another run may have written in the meantime.
                    rows = _agree_on_missing(job, accelerator, discard=True)
                    parts = list(chunks(rows, job.shards.shard_items(len(rows))))
                    mine = parts[accelerator.process_index :: accelerator.num_processes]
                    on_all(accelerator, lambda job=job, mine=mine: _encode_shards(job, mine, progress))
            items.append(_opened(job, use, accelerator, progress))
            encoded[job.kind][0] += len(rows)
            encoded[job.kind][1] += len(np.unique(job.digests))
        failed.pop_all()
    (new, count), (new_captions, captions) = encoded["images"], encoded["captions"]
    said = f"latents: {new:,} new of {count:,} encoded"
    accelerator.print(said + (f"; captions: {new_captions:,} new of {captions:,}" if captions else ""))
    return items


def _opened(job: _Job, use: FolderUse | None, accelerator: Accelerator, progress: bool) -> Items:
    """A complete part, tidied if no other run uses it. use: of the main process, which looks for all."""
    shards, digests = job.shards, job.digests
    names: list[int] = []
    places = np.empty((2, len(digests)), dtype=np.int64)
    file_items = [0]

    def look() -> None:
        listing = shards.listing()
        if not listing.missing(digests) and use is not None and use.alone:
            changed = shards.tidy(listing, digests, progress)
            if not use.share() or changed:
                listing = shards.listing()
        if missing := listing.missing(digests):
            raise ValueError(
                f"{len(missing)} of {len(digests)} {job.kind} are not in {shards.folder} after encoding; the folder "
                "must be one that all processes see and that nothing else writes to"
            )
        files, places[:] = listing.places(digests)
        names.extend(digest_numbers([listing.names[file] for file in files]).tolist())
        file_items[0] = sum(listing.counts[file] for file in files)

    on_main(accelerator, look)
    number, file_items[0] = from_main(accelerator, [len(names), file_items[0]])
    if accelerator.num_processes > 1:  # names are sent as the numbers that they are
        names = from_main(accelerator, names or [0] * number) if number else []
        places = np.array(from_main(accelerator, places.reshape(-1).tolist())).reshape(2, -1)
    return Items(shards, [f"{name % 2**64:016x}" for name in names], file_items[0], places, use)


def _encode_shards(job: _Job, mine: Sequence[Sequence[int]], progress: bool) -> None:
    """Encode and write this process's shards; ValueError naming the first items that are not finite."""
    total = sum(map(len, mine))
    shown = progress and total > 0
    with tqdm(total=total, desc=f"encode {job.kind}", unit="item", disable=not shown, leave=False) as bar:
        for items in mine:
            tensors = {n: torch.empty(len(items), *shape, dtype=t) for n, (shape, t) in job.shards.layout.items()}
            done = 0
            for batch in job.encode(items):
                size = len(next(iter(batch.values())))
                for name, values in batch.items():
                    assert values.dtype == tensors[name].dtype and values.shape[1:] == tensors[name].shape[1:]
                    _check_finite(values, items[done : done + size], job)
                    tensors[name][done : done + size] = values
                done += size
                bar.update(size)
            assert done == len(items)
            job.shards.write(job.digests[items], tensors)


def _check_finite(values: Tensor, items: Sequence[int], job: _Job) -> None:
    finite = values.flatten(1).isfinite().all(dim=1).tolist()
    bad = [item for item, fine in zip(items, finite, strict=True) if not fine]
    if bad:
        named = ", ".join(job.name(item) for item in bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        model, key = ("the autoencoder", "vae") if job.kind == "images" else ("the text encoder", "text.pretrained")
        raise ValueError(
            f"{model} gives values that are not finite for {named}; if that is so for all {job.kind} its weights are "
            f"not usable, name others with {key}, else leave these images out of data.source"
        )


@torch.no_grad()
def _encode_images(
    vae: Autoencoder, images: CaptionedImages, batch_size: int, items: Sequence[int]
) -> Iterator[dict[str, Tensor]]:
    """Moments [b, F, ..., h, w] of images, batch after batch; the next batch is read while one is encoded."""
    batches = list(chunks(items, batch_size))
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(images.pixels, batches[0])
        for _, following in zip_longest(batches, batches[1:], fillvalue=[]):
            pixels = torch.stack(list(ahead))
            ahead = pool.map(images.pixels, following)
            pixels = pixels.to(vae.device, vae.dtype)
            views = [pixels, pixels.flip(3)] if images.config.flip > 0 else [pixels]
            moments = [_in_equal_batches(vae.encode, view, batch_size).to("cpu", vae.moments_dtype) for view in views]
            yield {"moments": torch.stack(moments, dim=1)}


@torch.no_grad()
def _encode_captions(
    tokenizer: Tokenizer,
    text_encoder: AnyTextEncoder,
    captions: Sequence[str],
    batch_size: int,
    items: Sequence[int],
) -> Iterator[dict[str, Tensor]]:
    """Context [b, L, D] of captions, batch after batch."""
    assert not text_encoder.training
    device = next(text_encoder.parameters()).device
    for batch in chunks(items, batch_size):
        input_ids = tokenizer([captions[item] for item in batch]).to(device)
        yield {"context": _in_equal_batches(text_encoder, input_ids, batch_size).cpu()}


def _in_equal_batches(encode: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int) -> Tensor:
    """What `encode` gives for up to `batch_size` inputs, in batches that all have one size, padded where need be.

    Batches of another size round differently. So an item has the same bits, whatever else is encoded with it: on the
    CPU, and on other devices if a kernel treats all places in a batch alike.
    """
    size = min(CPU_BATCH, batch_size) if inputs.device.type == "cpu" else batch_size
    outputs = []
    for part in inputs.split(size):
        padding = part[-1:].expand(size - len(part), *part.shape[1:])
        outputs.append(encode(torch.cat([part, padding]))[: len(part)])
    return torch.cat(outputs)


def _moments_layout(vae: Autoencoder, images: CaptionedImages) -> Layout:
    """Moments [F, ..., h, w] of images of one shape; F is 2 if images may be flipped."""
    grid = [side // vae.config.downsampling for side in _shape(images)]
    views = 2 if images.config.flip > 0 else 1
    return {"moments": ((views, vae.moments_channels, *grid), vae.moments_dtype)}


def _shape(images: CaptionedImages) -> Shape:
    """The one shape of images; that of their training where there are none."""
    shapes = {images.shape(index) for index in range(len(images))} or {images.config.shape}
    (shape,) = shapes
    return shape


def _text_layout(tokenizer: Tokenizer, text_encoder: AnyTextEncoder) -> Layout:
    dtype = next(text_encoder.parameters()).dtype
    return {"context": ((tokenizer.max_length, text_encoder.hidden_size), dtype)}


def _caption_name(images: CaptionedImages, caption: str) -> str:
    """A caption, by the first image that has it."""
    index = next((index for index, own in enumerate(images.all_captions) if caption in own), None)
    return "the unconditional prompt" if index is None else f"the caption of {images.name(index)}"


def _check_disk(folder: Path, jobs: Sequence[_Job], missing: Sequence[Sequence[int]]) -> None:
    """ValueError unless what is to be written fits on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(len(rows) * job.shards.item_bytes for job, rows in zip(jobs, missing, strict=True))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the latent cache needs {needed / 1e9:.3g} GB in {folder}, where {free / 1e9:.3g} GB are free; make room, "
            "set train.cache_folder to a larger disk, or train.cache_latents=false"
        )


# ----------------------------------------------------------------------------------------------------------------------
# What the main process decides for all


def _agree_on_digest(accelerator: Accelerator, digest: Callable[[], str]) -> str:
    """A fingerprint that the main process computes and broadcasts."""
    own = bytearray(16)
    on_main(accelerator, lambda: own.__setitem__(slice(None), bytes.fromhex(digest())))
    return bytes(from_main(accelerator, list(own))).hex()


def _agree_on_missing(job: _Job, accelerator: Accelerator, discard: bool = False) -> list[int]:
    """The items to encode, as seen by the main process: other processes may look when files already appear.

    discard: remove files that cannot be used.
    """
    own: list[int] = []

    def look() -> None:
        listing = job.shards.listing()
        if discard:
            job.shards.discard(listing)
        own.extend(listing.missing(job.digests))

    on_main(accelerator, look)
    (number,) = from_main(accelerator, [len(own)])
    return from_main(accelerator, own if accelerator.is_main_process else [0] * number) if number else []


def _use(folder: Path, accelerator: Accelerator, alone: bool, stack: ExitStack) -> FolderUse | None:
    """Begin to use a folder until `stack` ends, on the main process for all; alone if no one else is there."""
    uses: list[FolderUse] = []

    def begin() -> bool:
        use = FolderUse.begin(folder, alone)
        if use is not None:
            stack.callback(use.end)
            uses.append(use)
        return use is not None

    _wait_for(begin, folder, accelerator)
    return uses[0] if uses else None


@contextmanager
def _writing(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """One run at a time adds to a folder."""
    with ExitStack() as stack:

        def begin() -> bool:
            with ExitStack() as attempt:
                held = attempt.enter_context(holding_file(folder / ".lock"))
                if held:
                    stack.push(attempt.pop_all())
            return held

        _wait_for(begin, folder, accelerator)
        yield


def _wait_for(begin: Callable[[], bool], folder: Path, accelerator: Accelerator) -> None:
    """Until it succeeds on the main process. The others wait with it in short calls, which cannot time out."""
    told = False
    while True:
        begun: list[int] = []
        on_main(accelerator, lambda begun=begun: begun.append(begin()))
        if from_main(accelerator, begun or [0])[0]:
            return
        if not told:
            accelerator.print(f"waiting for another run, which writes to {folder}")
        told = True
        time.sleep(WAIT)
