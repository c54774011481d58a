from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from mulki.data import BadImage, folder_task
from mulki.data.loader import (
    Images,
    _ends_of_workers,
    batch_sizes,
    batches,
    cycle,
    readable_batches,
)
from mulki.data.shards import open_shard
from mulki.data.unlabelled import find_images
from mulki.errors import InputError
from tests.data.data_helpers import Blank, picture

FIXED = tv.Compose([tv.Resize(8), tv.ToTensor()])


class Noise:
    """Draws from all three generators."""

    def __call__(self, image: Any) -> Tensor:
        drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
        return tv.functional.to_tensor(image).mean() + torch.tensor(drawn)


class Counting(Blank):
    """Counts loads of each image; image i is of grey i."""

    loads: ClassVar[Counter[int]] = Counter()

    def load(self, index: int) -> Any:
        self.loads[index] += 1
        image = super().load(index)
        image.paste((index, index, index), (0, 0, 4, 4))
        return image


@pytest.fixture
def images(pack: Path) -> Any:
    return open_shard(pack / "digits-train.tar")


@pytest.fixture
def counting() -> Counting:
    Counting.loads = Counter()
    return Counting((0, 1, 0, 1, 0, 1, 0))


def _flat(batch_list: list[Any]) -> list[tuple[Any, ...]]:
    return [tuple(part.tolist() for part in batch) for batch in batch_list]


def _take(count: int, images: Any, transform: Any, start: int = 0, **options: Any) -> Any:
    options = {"batch_size": 2, "shuffle": True, "seed": 3} | options
    return _flat(list(islice(cycle(batches(images, transform, **options), start), count)))


def test_batches_hold_image_target_and_index(images: Any) -> None:
    (first, second, third) = batches(images, FIXED, 2, shuffle=False, seed=0)
    assert first[0].shape == (2, 3, 8, 8) and third[0].shape == (1, 3, 8, 8)
    assert first[1].dtype == first[2].dtype == torch.int64
    assert torch.cat([first[2], second[2], third[2]]).tolist() == list(range(5))
    assert torch.cat([first[1], second[1], third[1]]).tolist() == list(images.targets)
    assert torch.equal(third[0][0], FIXED(images.load(4)))


def test_the_same_seed_gives_the_same_batches_whatever_the_workers(images: Any) -> None:
    torch.manual_seed(1)
    wanted = _take(9, images, Noise())
    torch.manual_seed(2)
    assert _take(9, images, Noise()) == wanted
    assert _take(9, images, Noise(), workers=2) == wanted
    assert _take(9, images, Noise(), seed=4) != wanted


def test_every_epoch_has_its_own_order_and_augmentation(counting: Counting) -> None:
    taken = _take(12, counting, Noise())
    orders = [[i for _, _, index in taken[e : e + 4] for i in index] for e in (0, 4, 8)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    values = [str(value) for image, _, _ in taken for value in image]
    assert len(set(values)) == len(values)


def test_global_generators_are_left_alone(images: Any) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    def seeded(task: Callable[[], object]) -> tuple[float, float, float]:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        task()
        return draw()

    untouched = seeded(lambda: None)
    assert seeded(lambda: _take(3, images, Noise())) == untouched
    assert seeded(lambda: _take(3, images, FIXED, workers=1)) == untouched


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    size=st.integers(1, 11),
    start=st.integers(0, 30),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_starting_late_gives_what_would_have_come(
    n: int, size: int, start: int, drop_last: bool, shuffle: bool
) -> None:
    options: dict[str, Any] = {"batch_size": size, "drop_last": drop_last, "shuffle": shuffle}
    blank = Blank((0,) * n)
    wanted = _take(start + 5, blank, Noise(), **options)
    assert all(len(index) == min(size, n) for _, _, index in wanted) or not drop_last
    assert _take(5, blank, Noise(), start=start, **options) == wanted[start:]


def test_starting_late_with_workers_loads_the_right_batches(images: Any) -> None:
    assert _take(4, images, Noise(), start=5, workers=2) == _take(9, images, Noise())[5:]


def test_fewer_images_than_a_batch(images: Any) -> None:
    for drop_last in (False, True):
        loader = batches(images, FIXED, 64, shuffle=True, seed=0, drop_last=drop_last)
        sizes = [len(batch[1]) for batch in islice(cycle(loader), 3)]
        assert sizes == [5, 5, 5]


def test_drop_last_leaves_out_the_rest(images: Any) -> None:
    loader = batches(images, FIXED, 2, shuffle=True, seed=0, drop_last=True)
    assert [len(batch[1]) for batch in loader] == [2, 2] and len(loader) == 2


@pytest.mark.parametrize("start", [0, 7])
def test_classes_come_equally_often(start: int) -> None:
    images = Blank((0,) * 90 + (1,) * 9 + (2,))

    def taken(seed: int) -> list[tuple[int, int]]:
        loader = batches(images, FIXED, 10, shuffle=True, seed=seed, balanced=True)
        found = islice(cycle(loader, start), 30)
        return [pair for _, t, i in found for pair in zip(t.tolist(), i.tolist(), strict=True)]

    first = taken(0)
    assert first == taken(0) != taken(1)
    # 300 images, 100 of each class, with a standard deviation of 8.2.
    counts = Counter(target for target, _ in first)
    assert all(67 <= counts[target] <= 133 for target in range(3))
    assert all(images.targets[index] == target for target, index in first)
    whole = batches(images, FIXED, 10, shuffle=True, seed=0, balanced=True)
    late = [i.tolist() for _, _, i in islice(cycle(whole, start), 5)]
    every = [i.tolist() for _, _, i in islice(cycle(whole, 0), start + 5)]
    assert late == every[start:]


def test_nothing_to_load_is_refused() -> None:
    with pytest.raises(ValueError, match="0 images"):
        batches(Blank(()), FIXED, 2, shuffle=False, seed=0)
    with pytest.raises(ValueError, match="batches of 0"):
        batches(Blank((0,)), FIXED, 0, shuffle=False, seed=0)
    with pytest.raises(ValueError, match="start -1"):
        cycle(batches(Blank((0,)), FIXED, 1, shuffle=False, seed=0), -1)


def test_cache_loads_each_image_once_and_only_when_asked(counting: Counting) -> None:
    plain = _take(10, counting, FIXED)
    counting.loads.clear()
    loader = batches(counting, FIXED, 2, shuffle=True, seed=3, cached=True, workers=2)
    endless = cycle(loader)
    taken = [next(endless)]
    assert sum(counting.loads.values()) <= 3
    taken += list(islice(endless, 9))
    assert _flat(taken) == plain
    assert set(counting.loads) == set(range(7))
    assert sum(counting.loads.values()) <= 7 + 1  # the first tells the size


def test_cache_stays_off_where_it_would_be_wrong_or_too_large(counting: Counting) -> None:
    one_image = 3 * 8 * 8 * 4 / 2**20
    assert Images(counting, FIXED, cached=True, cache_mb=7 * one_image).cached
    assert not Images(counting, FIXED, cached=True, cache_mb=6.9 * one_image).cached
    assert not Images(counting, Noise(), cached=True).cached
    assert not Images(counting, FIXED).cached
    assert _take(6, counting, Noise(), cached=True) == _take(6, counting, Noise())


@pytest.mark.parametrize("in_worker", [False, True])
def test_an_unreadable_image_is_named_in_one_line(make_folder: Any, in_worker: bool) -> None:
    root = make_folder()
    train = folder_task(root).train
    bad = root / "train" / "crow" / "1.png"
    bad.write_bytes(b"")
    with pytest.raises(BadImage) as caught:
        try:
            list(batches(train, FIXED, 2, shuffle=False, seed=0))
        except BadImage:
            if in_worker:
                # What a worker does; a real one would keep the loader waiting for 5 s afterwards.
                ExceptionWrapper(where="in DataLoader worker process 0").reraise()
            raise
    message = str(caught.value)
    assert message.startswith(f"{bad}: unreadable image")
    assert "\n" not in message and "Traceback" not in message


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 13),
    size=st.integers(1, 9),
    processes=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_processes_divide_each_batch_in_its_order(
    n: int, size: int, processes: int, drop_last: bool, shuffle: bool
) -> None:
    options: dict[str, Any] = {"batch_size": size, "drop_last": drop_last, "shuffle": shuffle}
    blank = Blank((0,) * n)

    def part(rank: int) -> Callable[[int], list[int]]:
        return lambda count: [
            min(rank * -(-count // processes) + i, count - 1) for i in range(-(-count // processes))
        ]

    whole = _take(5, blank, FIXED, **options)
    parts = [_take(5, blank, FIXED, part=part(r), **options) for r in range(processes)]
    sizes = batch_sizes(batches(blank, FIXED, seed=3, **options))
    for step, (_, _, index) in enumerate(whole):
        together = [i for part in parts for i in part[step][2]]
        assert together[: len(index)] == index
        assert set(together[len(index) :]) <= {index[-1]}
        assert len(index) == sizes[step % len(sizes)]


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
        list(_ends_of_workers.told(dropping()))


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
from mulki.data import loader
from tests.data.data_helpers import Blank, picture

def stuck(image):
    print(os.getpid(), flush=True)
    time.sleep(600)

loader._ORPHANS_END_S = 0.1
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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_no_batch(tmp_path: Path, workers: int) -> None:
    for seed in range(5):
        picture(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    found = list(readable_batches(find_images([tmp_path]), FIXED, 2, workers))
    assert [len(batch) for batch in found] == [2, 2, 1]
    images = [image for batch in found for image in batch]
    assert isinstance(images[2], BadImage) and "2.png: unreadable" in str(images[2])
    for seed in (0, 1, 3, 4):
        assert torch.equal(images[seed], FIXED(picture(seed)))
