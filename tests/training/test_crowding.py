"""A run whose cores are used by others says so."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latentdiff.training import crowding
from latentdiff.training.crowding import CrowdWatch, seconds_waited

CPU = torch.device("cpu")


def watch(monkeypatch: pytest.MonkeyPatch, waited: list[float | None], threads: int = 2) -> CrowdWatch:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    readings: Iterator[float | None] = iter(waited)
    return CrowdWatch(CPU, lambda: next(readings))


def test_it_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 threads that wait for 20 of 2 x 25 s; looked at too early, nothing is read."""
    crowd = watch(monkeypatch, [1.0, 4.0, 24.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for now in (100.0, 119.0, 120.0, 139.9):
            crowd.look(now=now)
    message = (
        "^other processes use these cores: the 2 threads of this run wait for one 40% of the time, and each waits for "
        "the others; run with OMP_NUM_THREADS=1, or stop the other processes$"
    )
    with pytest.warns(UserWarning, match=message):
        crowd.look(now=145.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crowd.look(now=200.0)


@pytest.mark.parametrize(
    ("waited", "threads", "why"),
    [([0.0, 3.0, 6.0], 2, "alone"), ([0.0, 15.0, 30.0], 1, "one thread"), ([0.0, None], 2, "unknown")],
)
def test_it_is_silent(waited: list[float | None], threads: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = watch(monkeypatch, waited, threads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for now in (0.0, 20.0, 40.0):
            crowd.look(now=now)


def test_the_run_s_own_saving_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was waited for up to the end of a save does not count."""
    crowd = watch(monkeypatch, [0.0, 15.0, 16.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crowd.look(now=0.0)
        crowd.look(own_work=True, now=15.0)
        crowd.look(now=25.0)
        crowd.look(now=50.0)
    assert crowd.watching


def test_it_does_not_watch_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert not CrowdWatch(torch.device("cuda"), lambda: 1 / 0).watching


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="Linux only")
def test_waiting_is_measured() -> None:
    """Two busy threads of one process on one core: each waits while the other runs, about half of the time."""
    script = """
import os, time, hashlib
from threading import Thread
from latentdiff.training.crowding import seconds_waited
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
end = time.perf_counter() + 1.0
def work():
    while time.perf_counter() < end:
        hashlib.sha256(bytes(10**6))  # without the GIL
before, other = seconds_waited(), Thread(target=work)
other.start()
work()
print(seconds_waited() - before)
other.join()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 3


def test_without_the_numbers_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowding, "TASKS", tmp_path / "none")
    assert seconds_waited() is None
    for task, text in (("1", "5 2000000000 7"), ("2", "5 500000000 7")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    (tmp_path / "3").mkdir()  # its thread has ended
    monkeypatch.setattr(crowding, "TASKS", tmp_path)
    assert seconds_waited() == 2.5
