"""The order of training: epochs, global batches, micro-batches, the loader."""

import signal
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

    With several buckets the images of a step are of one. Each has epochs of its own, given by (seed, e, bucket), and
    its n images fill floor((e + 1) n / batch_size) - floor(e n / batch_size) batches in epoch e of the whole set. In
    which order the buckets take turns in an epoch is given by (seed, e) too.
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
        buckets: Sequence[Sequence[int]] | None = None,
        repeats: Sequence[int] | None = None,
        holdout: float = 0,
    ) -> None:
        """buckets: the images of each; None: one of all images.

        repeats: how often each image comes in an epoch; None: once. holdout: data.holdout, if it was used.
        Raises ValueError for a batch of more than `repeat` times the images of an epoch.
        """
        buckets = buckets or [range(num_images)]
        assert sum(map(len, buckets)) == num_images
        self.num_images = num_images
        self.most_repeats = max(repeats or [1])
        # The occurrences of an epoch: occurrence k of image i is i + k * num_images.
        self.buckets = buckets
        if repeats is not None:
            self.buckets = [
                array("q", (i + k * num_images for i in bucket for k in range(repeats[i]))) for bucket in buckets
            ]
        count = sum(map(len, self.buckets))
        if plan.batch_size > repeat * count:
            raise ValueError(
                f"train.batch_size {plan.batch_size} is larger than the {num_images} training images"
                + (f" (data.holdout is {holdout})" if holdout else "")
                + (f" times data.repeat {repeat}" if repeat > 1 else "; use a smaller one, or data.repeat")
            )
        assert all(plan.batch_size <= repeat * len(bucket) for bucket in self.buckets)
        self.plan = plan
        self.rank = rank
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps
        self._turns: tuple[int, list[tuple[int, int]]] = -1, []  # the latest epoch and its turns

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        orders: dict[int, tuple[int, Sequence[int]]] = {}  # by bucket, its latest epoch and its order
        for step in range(self.start_step, self.total_steps):
            bucket, number = self.turn(step)
            for micro_step in range(self.plan.accumulation):
                first = (micro_step * self.plan.processes + self.rank) * self.plan.micro
                keys = []
                for sample_index in range(first, first + self.plan.micro):
                    place = number * self.plan.batch_size + sample_index
                    epoch, position = divmod(place, len(self.buckets[bucket]))
                    if bucket not in orders or orders[bucket][0] != epoch:
                        orders[bucket] = epoch, self.order(epoch, bucket)
                    occurrence, index = divmod(orders[bucket][1][position], self.num_images)
                    # Each occurrence in an epoch is a view of its own.
                    view = epoch * self.most_repeats + occurrence
                    keys.append(Key(index=index, epoch=view, step=step, sample_index=sample_index))
                yield keys

    def global_batch(self, step: int) -> list[int]:
        """The images of a step, over all processes, in order."""
        bucket, number = self.turn(step)
        count = len(self.buckets[bucket])
        positions = range(number * self.plan.batch_size, (number + 1) * self.plan.batch_size)
        orders = {epoch: self.order(epoch, bucket) for epoch in {position // count for position in positions}}
        return [orders[position // count][position % count] % self.num_images for position in positions]

    def order(self, epoch: int, bucket: int = 0) -> Sequence[int]:
        """The images of a bucket in the order of one of its epochs; with repeats, their occurrences."""
        images = self.buckets[bucket]
        own = [bucket] if len(self.buckets) > 1 else []
        order = torch.randperm(len(images), generator=generator(self.seed, Stream.ORDER, epoch, *own))
        return array("q", (images[place] for place in order.tolist()))

    def turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many batches of it came before."""
        if len(self.buckets) == 1:
            return 0, step
        # Steps fall short of whole epochs by less than one for each bucket: so early is the latest that can be meant.
        latest = (step + len(self.buckets)) * self.plan.batch_size // sum(map(len, self.buckets)) + 1
        epoch = bisect_right(range(latest), step, key=lambda e: sum(self._batches_before(e))) - 1
        if self._turns[0] != epoch:
            self._turns = epoch, self._turns_in(epoch)
        return self._turns[1][step - sum(self._batches_before(epoch))]

    def _turns_in(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, batches of it before) of each step in an epoch of the whole set."""
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        in_turn = [b for b, (first, end) in enumerate(zip(before, after, strict=True)) for _ in range(first, end)]
        order = torch.randperm(len(in_turn), generator=generator(self.seed, Stream.BUCKETS, epoch)).tolist()
        turns = []
        for bucket in (in_turn[place] for place in order):
            turns.append((bucket, before[bucket]))
            before[bucket] += 1
        return turns

    def _batches_before(self, epoch: int) -> list[int]:
        """How many batches each bucket fills before an epoch of the whole set."""
        return [epoch * len(bucket) // self.plan.batch_size for bucket in self.buckets]


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


def read_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; while one is used, one thread reads the next. The thread ends with the iterator.

    device: of the training; pinned memory is made for it. An error of reading is raised at its batch.
    """

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # new threads begin with device 0

    iterator = iter(batches)
    with ThreadPoolExecutor(1, "reading", begin) as thread:
        upcoming = thread.submit(next, iterator, None)
        while (batch := upcoming.result()) is not None:
            upcoming = thread.submit(next, iterator, None)
            yield batch


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and pre-emption reach the workers too, but the run needs them to finish its step and save."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
