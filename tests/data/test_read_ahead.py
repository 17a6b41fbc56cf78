"""Reading the next batch while the current one is used."""

import threading
import time
from collections.abc import Iterator
from typing import cast

import pytest
import torch

from latentdiff.data.batches import Batch, read_ahead

CPU = torch.device("cpu")


class Batches:
    """Five batches, of which one may fail; counts how many were begun."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing, self.begun = failing, 0
        self.threads: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        for step in range(5):
            self.begun += 1
            self.threads.add(threading.current_thread().name)
            if step == self.failing:
                raise OSError(f"image {step} cannot be read")
            yield cast(Batch, {"step": step})


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_the_order_is_the_same_and_the_next_is_read_meanwhile() -> None:
    source = Batches()
    batches = read_ahead(source, CPU)
    for step in range(5):
        assert next(batches)["step"] == step
        end = time.monotonic() + 10
        while source.begun < min(step + 2, 5) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.01)
        assert source.begun == min(step + 2, 5)  # one ahead, not more
    assert next(batches, None) is None
    assert reading_threads() == [] and source.threads == {"reading_0"}


def test_an_error_comes_with_its_batch_and_ends_the_thread() -> None:
    batches = read_ahead(Batches(failing=2), CPU)
    assert [next(batches)["step"] for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="^image 2 cannot be read$"):
        next(batches)
    assert reading_threads() == []


def test_the_thread_ends_with_the_iterator() -> None:
    batches = read_ahead(Batches(), CPU)
    next(batches)
    assert len(reading_threads()) == 1
    cast(Iterator, batches).close()  # pyright: ignore[reportAttributeAccessIssue]
    assert reading_threads() == []
