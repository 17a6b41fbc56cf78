"""Stopping."""

import os
import signal
import threading

import pytest

from latentdiff.training.stopping import SIGNALS, StopRequest


def handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in SIGNALS}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_asks_the_run_to_stop(accelerator, name):
    before, number = handlers(), getattr(signal, name)
    with StopRequest(accelerator) as stop:
        assert stop.agreed()[0] is None
        assert signal.getsignal(number) != before[number]  # else it would end the tests
        os.kill(os.getpid(), number)
        assert stop.agreed()[0] == name
        assert stop.agreed()[0] == name
    assert handlers() == before


def test_second_interrupt_kills(accelerator):
    before = handlers()
    stop = StopRequest(accelerator)
    with pytest.raises(KeyboardInterrupt), stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed()[0] == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_signal_handlers_are_restored_after_an_error(accelerator):
    before = handlers()
    with pytest.raises(RuntimeError, match="out of memory"), StopRequest(accelerator):
        raise RuntimeError("out of memory")
    assert handlers() == before


def test_stop_request_in_another_thread_does_nothing(accelerator):
    before, seen = handlers(), []

    def run() -> None:
        with StopRequest(accelerator) as stop:
            seen.append((stop.agreed()[0], handlers()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)] and handlers() == before
