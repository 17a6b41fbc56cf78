"""The order of training: epochs, global batches, micro-batches, the loader."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from latentdiff.randomness import Stream, generator


class Key(TypedDict):
    """An image and its place in the training: the epoch, the step, and the index in the global batch of that step."""

    index: int
    epoch: int
    step: int
    sample_index: int


class Item(TypedDict):
    """What a data set returns for a key: the tensors of a `Batch`, for one image."""

    key: Key
    caption: str
    pixels: NotRequired[Tensor]
    moments: NotRequired[Tensor]
    context: NotRequired[Tensor]


class Batch(TypedDict):
    """A micro-batch: `pixels` [b, C, H, W] in [-1, 1] or, from a latent cache, `moments` [b, ..., h, w] and captions.

    With a frozen text encoder and a latent cache, captions are `context` [b, L, D] too.
    """

    index: list[int]  # of the images in the data set
    step: int
    sample_indices: list[int]  # indices in the step's global batch
    captions: list[str]
    pixels: NotRequired[Tensor]
    moments: NotRequired[Tensor]
    context: NotRequired[Tensor]


@dataclass(frozen=True)
class BatchPlan:
    """How a step's global batch is split: `processes` x `accumulation` micro-batches of `micro` images."""

    batch_size: int
    micro: int
    processes: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro * self.processes):
            raise ValueError(
                f"train.batch_size {self.batch_size} is not divisible by train.micro_batch_size {self.micro} "
                f"x {self.processes} processes"
            )

    def __str__(self) -> str:
        return f"batch {self.batch_size} = {self.micro} x {self.processes} processes x {self.accumulation} accumulated"

    @property
    def accumulation(self) -> int:
        """Forward and backward passes of one process per optimiser step."""
        return self.batch_size // (self.micro * self.processes)


class StepBatches(Sampler[list[Key]]):
    """The keys of one process's micro-batches, step after step.

    Epoch e is the permutation given by (seed, e); the global batch of step s is the s-th block of `batch_size` images
    in the endless sequence of epochs. So every image comes exactly once per epoch (or as often as `repeats` says) with
    any number of processes, and a resumed run starts at `start_step` without any state.
    """

    def __init__(
        self,
        num_images: int,
        plan: BatchPlan,
        rank: int,
        seed: int,
        start_step: int,
        total_steps: int,
        repeat: int = 1,
        repeats: Sequence[int] | None = None,
        held_out: int = 0,
    ) -> None:
        """repeats: how often each image comes in an epoch; None: once. held_out: images that were, for the message.

        Raises ValueError for a batch of more than `repeat` times the images of an epoch.
        """
        # An image's occurrences in an epoch are views of their own: with its number, the key's epoch tells them apart.
        self.occurrences: list[tuple[int, int]] = []  # of (image, its number); empty if each comes once
        if repeats is not None:
            self.occurrences = [(index, k) for index, times in enumerate(repeats) for k in range(times)]
        self.most_repeats = max(repeats or [1])
        self.num_images = len(self.occurrences or range(num_images))
        if plan.batch_size > repeat * self.num_images:
            raise ValueError(
                f"train.batch_size {plan.batch_size} is larger than the {num_images} training images"
                + (f" ({held_out} are held out)" if held_out else "")
                + (f" times data.repeat {repeat}" if repeat > 1 else "; use a smaller one, or data.repeat")
            )
        self.plan = plan
        self.rank = rank
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, []
        for step in range(self.start_step, self.total_steps):
            for micro_step in range(self.plan.accumulation):
                first = (micro_step * self.plan.processes + self.rank) * self.plan.micro
                keys = []
                for sample_index in range(first, first + self.plan.micro):
                    epoch_of_sample, position = divmod(step * self.plan.batch_size + sample_index, self.num_images)
                    if epoch_of_sample != epoch:
                        epoch, order = epoch_of_sample, self.order(epoch_of_sample)
                    index, occurrence = self._occurrence(order[position])
                    view = epoch * self.most_repeats + occurrence
                    keys.append(Key(index=index, epoch=view, step=step, sample_index=sample_index))
                yield keys

    def global_batch(self, step: int) -> list[int]:
        """The images of a step, over all processes, in order."""
        positions = range(step * self.plan.batch_size, (step + 1) * self.plan.batch_size)
        orders = {epoch: self.order(epoch) for epoch in {position // self.num_images for position in positions}}
        places = (orders[position // self.num_images][position % self.num_images] for position in positions)
        return [self._occurrence(place)[0] for place in places]

    def _occurrence(self, place: int) -> tuple[int, int]:
        """The image at a place in an epoch's list, and the number of its occurrence."""
        return self.occurrences[place] if self.occurrences else (place, 0)

    def order(self, epoch: int) -> list[int]:
        """The permutation of an epoch's occurrences."""
        return torch.randperm(self.num_images, generator=generator(self.seed, Stream.ORDER, epoch)).tolist()


def collate(items: Sequence[Item]) -> Batch:
    """Stack the items of one step to a micro-batch."""
    keys = [item["key"] for item in items]
    names = [name for name in items[0] if name not in ("key", "caption")]
    tensors: Any = {name: torch.stack([item[name] for item in items]) for name in names}
    return Batch(
        **tensors,
        index=[key["index"] for key in keys],
        step=keys[0]["step"],
        sample_indices=[key["sample_index"] for key in keys],
        captions=[item["caption"] for item in items],
    )


def loader(images: Dataset, batches: StepBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Micro-batches in order, decoded in this process or by workers."""
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and pre-emption reach the workers too, but the run needs them to finish its step and save."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
