"""Loading processes that end, are ended, or meet errors."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import connection, resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from mulki.data.loader import batches
from mulki.data.workers import _ends
from mulki.errors import InputError, Stopped

FIXED = tv.Compose([tv.Resize(8), tv.ToTensor()])


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that torch waits for the end of a process which has failed."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)


class Deadly:
    """A transform that kills the process that it runs in, at one of the images."""

    def __init__(self) -> None:
        self.left = 3

    def __call__(self, image: object) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 2, 2)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_killed_worker_is_named(images: Any, shuffle: bool) -> None:
    loader = batches(images, Deadly(), 2, shuffle=shuffle, seed=0, workers=1)
    with pytest.raises(InputError, match="^--workers 1: .*ended"):
        list(loader)


@pytest.mark.skipif(sys.platform != "linux", reason="file descriptors handed over")
def test_a_worker_does_not_print_that_the_run_left_with_a_batch_half_taken(
    images: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def left(handed: tuple[str, int]) -> None:
        connection.SocketClient(handed[0]).close()
        # The worker takes one at a time, so it has met the end of the first one.
        key = multiprocessing.current_process().authkey
        connection.Client(handed[0], authkey=key).close()
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(resource_sharer._resource_sharer, "get_connection", left)
    with pytest.raises(Stopped):
        list(batches(images, FIXED, 2, seed=0, workers=1))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
def test_a_worker_that_ends_as_it_hands_over_a_batch_is_named(
    images: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def ended(loader: DataLoader[Any]) -> Iterator[Any]:
        raise error
        yield

    monkeypatch.setattr(DataLoader, "__iter__", ended)
    with pytest.raises(InputError, match="^--workers 1: .*ended as it handed over a batch"):
        next(iter(batches(images, FIXED, 2, shuffle=False, seed=0, workers=1)))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_worker_that_is_killed_is_named_where_a_batch_is_waited_for(images: Any) -> None:
    loaded = iter(batches(images, FIXED, 2, shuffle=True, seed=0, workers=1))
    next(loaded)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    # The signal comes here, where an error would be met by code that does not expect it.
    while worker.is_alive():
        time.sleep(0.01)
    with pytest.raises(InputError, match="^--workers 1: .*ended"):
        next(loaded)
    assert next(iter(batches(images, FIXED, 2, shuffle=False, seed=0, workers=1)))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_the_end_of_a_worker_is_told_where_code_has_dropped_it() -> None:
    loaded = iter(DataLoader([0, 1, 2], num_workers=1))
    (worker,) = multiprocessing.active_children()

    def dropping() -> Iterator[Any]:
        os.kill(worker.pid, signal.SIGKILL)
        with contextlib.suppress(RuntimeError):
            time.sleep(60)
        yield loaded

    with pytest.raises(RuntimeError, match="^DataLoader worker .* is killed by signal"):
        list(_ends.told(Dropping(dropping(), [worker])))


class Dropping:
    """An iterator with processes, as torch's."""

    def __init__(self, of: Iterator[Any], workers: list[Any]) -> None:
        self._of, self._workers = of, workers

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._of)


def children() -> set[Any]:
    return {*multiprocessing.active_children()}


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_the_end_of_a_process_of_another_loader_is_told_at_once(images: Any) -> None:
    loaded = iter(batches(images, FIXED, 2, shuffle=True, seed=0, workers=1))
    next(loaded)
    known = children()
    other = iter(DataLoader([0, 1, 2], num_workers=1))
    (worker,) = children() - known
    with pytest.raises(RuntimeError, match="^DataLoader worker .* is killed by signal"):
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(60)
    del other
    assert next(loaded)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_handler_that_was_set_since_may_call_the_one_before(images: Any) -> None:
    next(iter(batches(images, FIXED, 2, shuffle=False, seed=0, workers=1)))
    before: Any = signal.getsignal(signal.SIGCHLD)
    heard: list[int] = []

    def chained(number: int, frame: Any) -> None:
        heard.append(number)
        before(number, frame)

    signal.signal(signal.SIGCHLD, chained)
    try:
        test_a_worker_that_is_killed_is_named_where_a_batch_is_waited_for(images)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert heard


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender is not told")
@pytest.mark.parametrize("sent", ["INT", "HUP", "TERM"])
def test_a_worker_goes_on_until_its_own_process_ends_it(images: Any, sent: str) -> None:
    loader = batches(images, FIXED, 2, shuffle=False, seed=0, workers=1)
    wanted = [index.tolist() for _, _, index in loader]
    loaded = iter(loader)
    found = [next(loaded)[2].tolist()]
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", f"-{sent}", str(worker.pid)], check=True)
    found += [index.tolist() for _, _, index in loaded]
    assert found == wanted
    loaded = iter(loader)
    next(loaded)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


ORPHAN = """
import os, signal, sys, time
from mulki.data import loader, workers
from tests.data.data_helpers import Blank, picture

def stuck(image):
    print(os.getpid(), flush=True)
    time.sleep(600)

workers._ORPHANS_END_S = 0.1
for _ in loader.batches(Blank((0,) * 4), stuck, 2, shuffle=False, seed=0, workers=1):
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another system has no such wait")
def test_a_worker_ends_with_a_run_that_was_killed() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ORPHAN]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        run.kill()
        run.wait()
        # Who reads the pipe to its end has waited for both.
        assert run.stdout.read() == ""
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(worker, 0)
            time.sleep(0.1)


def failing(said: str, image: object) -> torch.Tensor:
    raise RuntimeError(said)


@pytest.mark.parametrize(
    ("said", "kind", "wanted"),
    [
        (
            "unable to allocate shared memory(shm) for file </torch_1>: No space left (28)",
            InputError,
            r"^--workers 1: shared memory is full.*--shm-size\)$",
        ),
        ("bad pixels", RuntimeError, "bad pixels"),
    ],
    ids=["memory", "other"],
)
def test_an_error_in_a_worker_is_not_taken_for_its_end(
    images: Any, said: str, kind: type[Exception], wanted: str
) -> None:
    loader = batches(images, partial(failing, said), 2, shuffle=False, seed=0, workers=1)
    with pytest.raises(kind, match=wanted):
        list(loader)


def interrupted(error: type[Exception], image: object) -> torch.Tensor:
    raise error("the storage is closed")


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_readers_own_is_not_taken_for_its_end(
    images: Any, error: type[Exception], workers: int
) -> None:
    transform = partial(interrupted, error)
    with pytest.raises(error, match="the storage is closed"):
        list(batches(images, transform, 2, shuffle=False, seed=0, workers=workers))
