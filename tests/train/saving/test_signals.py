from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from mulki.errors import Stopped
from mulki.train.saving.signals import Signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
NAMES = ["SIGINT", "SIGTERM", "SIGHUP"]


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A process that a shell or nohup has started in the background ignores some of them."""
    before = {name: signal.getsignal(signal.Signals[name]) for name in NAMES}
    for name in NAMES:
        signal.signal(signal.Signals[name], signal.default_int_handler)
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_at_once(name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=name) as caught, Signals():
        os.kill(os.getpid(), number)
    assert caught.value.number == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_waits_where_it_is_held(name: str) -> None:
    done = []
    with pytest.raises(Stopped, match=name), Signals() as signals:
        with signals.held(), signals.held():
            os.kill(os.getpid(), signal.Signals[name])
            done.append(1)
        assert signals.pending == signal.Signals[name]
        signals.raise_pending()
    assert done == [1]


def test_a_second_signal_does_not_wait() -> None:
    with pytest.raises(Stopped, match="SIGINT"), Signals() as signals, signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")


def test_the_same_signal_twice_in_a_moment_is_one() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), Signals() as signals, signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        signals._since -= 10
        assert signals.pending == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.pending is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone() -> None:
    seen = []

    def enter() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Signals():
            seen.append(signal.getsignal(signal.SIGTERM) == before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [True]
