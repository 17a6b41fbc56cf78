"""The latent cache of stage 2: outputs of the frozen VAE and text encoder for each image and caption, kept on disk.

FOLDER/<name>-latents-<16 hex>/   posterior moments of every image, and of the flipped one where data.flip > 0;
                                  with buckets a folder for each shape
FOLDER/<name>-text-<16 hex>/      of a frozen text encoder: its context of every distinct caption

The hex digits are a fingerprint of everything the tensors depend on, so a stale cache is never opened. Each folder
holds safetensors files of consecutive items and a manifest.json, which is written last: without it the cache is
incomplete, and the next start keeps the files that are complete. Changed bytes within a file of the right size are not
detected.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from latentdiff.distributed import from_main, on_all, on_main
from latentdiff.formats.files import read_json, write_json, write_safetensors
from latentdiff.models.pixel_space import Autoencoder
from latentdiff.models.pretrained_text import AnyTextEncoder, Tokenizer

FORMAT_VERSION = 3  # part of every fingerprint: raise it when the same inputs give other tensors or files
MANIFEST = "manifest.json"
MAX_SHARD_BYTES = 256 * 2**20
MAX_SHARD_ITEMS = 4096
MIN_SHARD_ITEMS = 64
WANTED_SHARDS = 16  # so that a small set too is split over processes, and loses little when interrupted
MAPPED_BYTES = 256 * 2**20  # of one part may be mapped in memory before all its files are unmapped
FAULT_AROUND = 2 * 2**20  # a read may bring in a huge page around what is read
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
        latents: Sequence["Shards"],
        text: "Shards | None",
        text_rows: "CaptionRows",
    ) -> None:
        """Finished parts; `text_rows` gives each caption's item of `text` (item 0: "").

        latents: of the images of each shape, as `images.by_shape()` has them.
        """
        groups = images.by_shape()
        assert [len(group) for group in groups] == [part.count for part in latents]
        self.images = images
        self.latents = latents
        self.text_rows = text_rows
        self._text = text
        self._places = torch.empty(len(images), 2, dtype=torch.int64)  # of each image: its part, its row there
        for part, group in enumerate(groups):
            rows = torch.arange(len(group))
            self._places[list(group)] = torch.stack([torch.full_like(rows, part), rows], dim=1)

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
        replace: remove the other caches of this name in `folder` when this one is complete; false in a folder that
        several runs share. shard_items: items per file; None: chosen by size.

        Raises ValueError for random crops (each is another image), tensors that are not finite, a full disk.
        """
        if images.config.crop != "center":
            raise ValueError("data.crop random cannot be cached; set train.cache_latents=false or data.crop=center")
        parts = [images.select(group) for group in images.by_shape()]
        latents = []
        for part in parts:
            digest = _agree_on_digest(accelerator, lambda part=part: latents_digest(vae, part))
            path, layout = folder / f"{name}-latents-{digest[:16]}", _moments_layout(vae, part)
            latents.append(Shards(path, digest, len(part), layout, shard_items))
        jobs = [
            _Job(own, partial(_encode_images, vae, part, batch_size), part.name, "images")
            for own, part in zip(latents, parts, strict=True)
        ]
        rows = CaptionRows([])
        text = None
        if text_encoder is not None and not images.config.shuffle_caption:
            encoder = text_encoder
            captions = list(dict.fromkeys(["", *images.distinct_captions]))
            rows = CaptionRows(captions)
            digest = _agree_on_digest(accelerator, lambda: text_digest(captions, tokenizer, encoder))
            text = Shards(
                folder / f"{name}-text-{digest[:16]}",
                digest,
                len(captions),
                _text_layout(tokenizer, encoder),
                shard_items,
            )
            encode = partial(_encode_captions, tokenizer, encoder, captions, batch_size)
            jobs.insert(0, _Job(text, encode, lambda row: _caption_name(images, captions[row]), "captions"))
        _complete(jobs, folder, accelerator, progress)
        if replace and accelerator.is_main_process:
            _remove_others(folder, name, [job.shards.folder for job in jobs])
        accelerator.wait_for_everyone()
        return cls(images, latents, text, rows)

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
        part, row = self._places[index].tolist()
        return self.latents[part].item(row)["moments"]

    @property
    def unconditional_context(self) -> Tensor | None:
        """The frozen text encoder's context [L, D] of the unconditional prompt; None if contexts are not kept."""
        return None if self._text is None else self._text.item(0)["context"].clone()


class CaptionRows:
    """The place of each of many distinct captions in a list, without keeping these: 16 bytes each."""

    def __init__(self, captions: Sequence[str]) -> None:
        """Raises ValueError for two captions of one digest (64 bits)."""
        digests = np.array([self._digest(caption) for caption in captions], dtype=np.uint64)
        self._rows = np.argsort(digests)
        self._digests = digests[self._rows]
        if len(np.unique(digests)) < len(digests):
            raise ValueError("two captions have the same digest; change one of them")

    def __getitem__(self, caption: str) -> int:
        """The place of one of the captions."""
        digest = self._digest(caption)
        place = int(np.searchsorted(self._digests, digest))
        assert place < len(self._digests) and self._digests[place] == digest
        return int(self._rows[place])

    @staticmethod
    def _digest(caption: str) -> np.uint64:
        return np.uint64(int(digest_of_bytes(caption.encode("utf-8", "surrogatepass")), 16))


@torch.no_grad()
def encode_means(vae: Autoencoder, images: CaptionedImages, batch_size: int) -> list[Tensor]:
    """The posterior mean of each image as unit-scale latents [C, h, w], on the device of `vae`."""
    means: dict[int, Tensor] = {}
    for indices, pixels in images.batches(batch_size):
        means |= zip(indices, vae.sample(vae.encode(pixels.to(vae.device))), strict=True)
    return [means[index] for index in range(len(images))]


# ----------------------------------------------------------------------------------------------------------------------
# Files


class Shards:
    """One part of a cache: `count` items, each of the tensors in `layout`, in safetensors files and a manifest.

    fingerprint: hex digest of everything the items depend on. A file is mapped into memory when it is first read.
    Mapped pages count as the process's memory (RssFile), though the system can reclaim them; to bound that, all files
    are unmapped when they may have reached MAPPED_BYTES. The system's file cache is not affected.
    """

    def __init__(
        self, folder: Path, fingerprint: str, count: int, layout: Layout, shard_items: int | None = None
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.count = count
        self.layout = layout
        self.item_bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        self.shard_items = shard_items or _shard_items(count, self.item_bytes)
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._read_bytes = 0

    @property
    def ranges(self) -> list[range]:
        """The items of each shard."""
        return [
            range(first, min(first + self.shard_items, self.count)) for first in range(0, self.count, self.shard_items)
        ]

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard:05d}.safetensors"

    def item(self, index: int) -> dict[str, Tensor]:
        """The tensors of one item: views of a mapped file."""
        assert 0 <= index < self.count
        shard, row = divmod(index, self.shard_items)
        size = self.item_bytes + FAULT_AROUND
        self._read_bytes += size
        if self._read_bytes > MAPPED_BYTES and self.count * self.item_bytes > MAPPED_BYTES:
            self._mapped.clear()
            self._read_bytes = size
        if shard not in self._mapped:
            with safe_open(self.path(shard), framework="pt") as file:
                self._mapped[shard] = {name: file.get_tensor(name) for name in self.layout}
        return {name: values[row] for name, values in self._mapped[shard].items()}

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard's items, stacked, atomically."""
        length = len(self.ranges[shard])
        expected = {name: ((length, *shape), dtype) for name, (shape, dtype) in self.layout.items()}
        assert {name: (tuple(values.shape), values.dtype) for name, values in tensors.items()} == expected
        write_safetensors(tensors, self.path(shard), self._metadata(shard))

    def pending(self) -> list[int]:
        """The shards that must be written (again); none if the part is complete, else it is marked as incomplete.

        An unusable file is named in a warning. Keeps the shard size of a matching manifest.
        """
        manifest = self._matching_manifest()
        sizes = {}
        if manifest is not None:
            self.shard_items = manifest["shard_items"]
            sizes = {entry["file"]: entry["bytes"] for entry in manifest["shards"]}
        found = []
        for shard in range(len(self.ranges)):
            path = self.path(shard)
            problem = self._problem(shard, sizes.get(path.name))
            if problem is not None:
                found.append(shard)
                if path.exists() or manifest is not None:
                    warnings.warn(f"{path} {problem}; its part of the cache is encoded again", stacklevel=2)
        if found:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        return found

    def finish(self) -> None:
        """Write the manifest, which makes the part complete; ValueError if a shard is missing."""
        for shard in range(len(self.ranges)):
            if problem := self._problem(shard):
                raise ValueError(
                    f"{self.path(shard)} {problem} after encoding; the folder must be one that all processes see and "
                    "that nothing else writes to"
                )
        listed = {self.path(shard).name for shard in range(len(self.ranges))}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in listed:  # left by an interrupted start with another shard size
                path.unlink()
        shards = [
            {
                "file": self.path(shard).name,
                "start": items.start,
                "stop": items.stop,
                "bytes": self.path(shard).stat().st_size,
            }
            for shard, items in enumerate(self.ranges)
        ]
        write_json(self._description() | {"shard_items": self.shard_items, "shards": shards}, self.folder / MANIFEST)

    def is_complete(self) -> bool:
        """Whether there is a matching manifest."""
        return self._matching_manifest() is not None

    def _metadata(self, shard: int) -> dict[str, str]:
        items = self.ranges[shard]
        return {"fingerprint": self.fingerprint, "start": str(items.start), "stop": str(items.stop)}

    def _description(self) -> dict[str, object]:
        tensors = {
            name: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for name, (shape, dtype) in self.layout.items()
        }
        return {
            "format": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "count": self.count,
            "tensors": tensors,
        }

    def _matching_manifest(self) -> dict | None:
        try:
            manifest = read_json(self.folder / MANIFEST)
        except ValueError:
            return None
        return manifest if self._description().items() <= manifest.items() else None

    def _problem(self, shard: int, size: int | None = None) -> str | None:
        """What is wrong with a shard's file, which should have `size` bytes; None if it is complete."""
        path = self.path(shard)
        if not path.is_file():
            return "is missing"
        if size is not None and path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes instead of {size}"
        try:
            with safe_open(path, framework="pt") as file:  # this compares the header with the file's length
                found = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            return f"is truncated or damaged ({error})"
        return None if self._metadata(shard).items() <= found.items() else "belongs to another cache"


def _shard_items(count: int, item_bytes: int) -> int:
    """Items per shard: at most MAX_SHARD_BYTES and MAX_SHARD_ITEMS, fewer if that makes fewer than WANTED_SHARDS."""
    wanted = max(MIN_SHARD_ITEMS, -(-count // WANTED_SHARDS))
    return max(1, min(MAX_SHARD_ITEMS, MAX_SHARD_BYTES // item_bytes, wanted))


def _remove_others(folder: Path, name: str, kept: Sequence[Path]) -> None:
    """Remove the caches of `name` that are not in `kept`, and temporary files of killed processes in those."""
    for other in folder.iterdir():
        if re.fullmatch(rf"{re.escape(name)}-(latents|text)-[0-9a-f]{{16}}", other.name) and other not in kept:
            shutil.rmtree(other)
    for part in kept:
        for temporary in part.glob(".*.tmp"):
            temporary.unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Fingerprints


def latents_digest(vae: Autoencoder, images: CaptionedImages) -> str:
    """Fingerprint (32 hex digits) of the moments: the autoencoder, the images and how they become pixels.

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
        "images": images.digests,
    }
    return digest_of(settings, vae)


def text_digest(captions: Sequence[str], tokenizer: Tokenizer, text_encoder: AnyTextEncoder) -> str:
    """Fingerprint (32 hex digits) of the captions' contexts."""
    settings = {
        "format": FORMAT_VERSION,
        "captions": list(captions),
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
    """A part to complete. encode: yields the tensors of a range of items in batches; name: of an item, for messages."""

    shards: Shards
    encode: Callable[[range], Iterator[dict[str, Tensor]]]
    name: Callable[[int], str]
    kind: str


def _complete(jobs: Sequence[_Job], folder: Path, accelerator: Accelerator, progress: bool) -> None:
    """Encode what is missing, split over the processes; the main process finishes each part."""
    pending = [_agree_on_pending(job.shards, accelerator) for job in jobs]
    on_all(accelerator, lambda: _check_disk(folder, jobs, pending))
    for job, shards in zip(jobs, pending, strict=True):
        mine = shards[accelerator.process_index :: accelerator.num_processes]
        on_all(accelerator, lambda job=job, mine=mine: _encode_shards(job, mine, progress))
        finish = accelerator.is_main_process and not job.shards.is_complete()
        on_all(accelerator, job.shards.finish if finish else lambda: None)


def _encode_shards(job: _Job, mine: Sequence[int], progress: bool) -> None:
    """Encode and write this process's shards; ValueError naming the first items that are not finite."""
    ranges = job.shards.ranges
    total = sum(len(ranges[shard]) for shard in mine)
    shown = progress and total > 0
    with tqdm(total=total, desc=f"encode {job.kind}", unit="item", disable=not shown, leave=False) as bar:
        for shard in mine:
            items = ranges[shard]
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
            job.shards.write(shard, tensors)


def _check_finite(values: Tensor, items: range, job: _Job) -> None:
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
    vae: Autoencoder, images: CaptionedImages, batch_size: int, items: range
) -> Iterator[dict[str, Tensor]]:
    """Moments [b, F, ..., h, w] of images, batch after batch; the next batch is read while one is encoded."""
    batches = [items[first : first + batch_size] for first in range(0, len(items), batch_size)]
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(images.pixels, batches[0])
        for _, following in zip_longest(batches, batches[1:], fillvalue=range(0)):
            pixels = torch.stack(list(ahead))
            ahead = pool.map(images.pixels, following)
            pixels = pixels.to(vae.device, vae.dtype)
            views = [pixels, pixels.flip(3)] if images.config.flip > 0 else [pixels]
            yield {"moments": torch.stack([vae.encode(view).to("cpu", vae.moments_dtype) for view in views], dim=1)}


@torch.no_grad()
def _encode_captions(
    tokenizer: Tokenizer, text_encoder: AnyTextEncoder, captions: Sequence[str], batch_size: int, items: range
) -> Iterator[dict[str, Tensor]]:
    """Context [b, L, D] of captions, batch after batch."""
    assert not text_encoder.training
    device = next(text_encoder.parameters()).device
    for first in range(0, len(items), batch_size):
        input_ids = tokenizer([captions[item] for item in items[first : first + batch_size]])
        yield {"context": text_encoder(input_ids.to(device)).cpu()}


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


def _check_disk(folder: Path, jobs: Sequence[_Job], pending: Sequence[Sequence[int]]) -> None:
    """ValueError unless what is to be written fits on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(
        len(job.shards.ranges[shard]) * job.shards.item_bytes
        for job, shards in zip(jobs, pending, strict=True)
        for shard in shards
    )
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


def _agree_on_pending(shards: Shards, accelerator: Accelerator) -> list[int]:
    """The shards to write, as seen by the main process: other processes may look when files already appear."""
    own: list[int] = []
    on_main(accelerator, lambda: own.extend(shards.pending()))
    shards.shard_items, number = from_main(accelerator, [shards.shard_items, len(own)])
    return from_main(accelerator, own if accelerator.is_main_process else [0] * number) if number else []
