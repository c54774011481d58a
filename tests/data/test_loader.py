from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
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
from torchvision import transforms as tv

from mulki.data import BadImage, folder_task
from mulki.data.loader import (
    Images,
    batch_sizes,
    batches,
    cycle,
    readable_batches,
)
from mulki.data.unlabelled import find_images
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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_no_batch(tmp_path: Path, workers: int) -> None:
    for seed in range(5):
        picture(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    before = torch.get_rng_state()
    found = list(readable_batches(find_images([tmp_path]), FIXED, 2, workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(batch) for batch in found] == [2, 2, 1]
    images = [image for batch in found for image in batch]
    assert isinstance(images[2], BadImage) and "2.png: unreadable" in str(images[2])
    for seed in (0, 1, 3, 4):
        assert torch.equal(images[seed], FIXED(picture(seed)))
