"""How many samples can be encoded at a time."""

from __future__ import annotations

import platform
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from mulki.train.learning import memory
from mulki.train.learning.memory import (
    MicroBatch,
    fitting_micro_batch,
    free_memory,
    graph_bytes,
    keep_freed_memory,
)
from tests import python

WIDTH = 64
# What ReLU saves of a float32 row; Linear saves the images, which are there anyway.
PER_SAMPLE = 4 * WIDTH


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


def test_what_a_sample_keeps_is_measured() -> None:
    found = fitting_micro_batch(encoder(), torch.zeros(100, WIDTH), (), 10**9)
    assert found == MicroBatch(100, PER_SAMPLE, 10**9, 10**9 // 2 // PER_SAMPLE)
    assert str(found) == "0.0 MiB an image, 954 MiB free"


@pytest.mark.parametrize(("samples", "size"), [(8.5, 8), (8.0, 8), (1.2, 1), (0.1, 1), (1000, 20)])
def test_half_of_the_free_memory_is_taken(samples: float, size: int) -> None:
    available = int(2 * samples * PER_SAMPLE)
    assert fitting_micro_batch(encoder(), torch.zeros(20, WIDTH), (), available).size == size


def test_room_is_left_for_what_else_a_step_saves() -> None:
    available = 2 * 8 * PER_SAMPLE
    images = torch.zeros(20, WIDTH)
    for beside, size in ((3 * PER_SAMPLE, 5), (100 * PER_SAMPLE, 1)):
        found = fitting_micro_batch(encoder(), images, (), available, beside=beside)
        assert found.size == size


def test_the_graph_of_all_texts_is_measured_on_two_of_them() -> None:
    texts = torch.zeros(100, WIDTH)
    plain, dropout = encoder(), nn.Sequential(encoder(), nn.Dropout())
    before = torch.random.get_rng_state()
    assert graph_bytes(plain, texts) == 100 * PER_SAMPLE
    # Dropout saves its mask, a byte for each number.
    assert graph_bytes(dropout, texts) > 100 * PER_SAMPLE
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        assert graph_bytes(plain, texts) == 0


def test_a_batch_of_one() -> None:
    found = fitting_micro_batch(encoder(), torch.zeros(1, WIDTH), (), 10**9)
    assert found.size == 1


def test_memory_is_left_for_gradients_and_moments() -> None:
    module = encoder()
    parameters = [*module.parameters()]
    taken = 3 * 4 * (WIDTH * WIDTH + WIDTH)
    free = taken + 2 * 8 * PER_SAMPLE
    found = fitting_micro_batch(module, torch.zeros(20, WIDTH), parameters, free)
    assert found == MicroBatch(8, PER_SAMPLE, free - taken, 8)
    assert fitting_micro_batch(module, torch.zeros(20, WIDTH), parameters, 100).size == 1


class Small(nn.Module):
    """Runs out of memory above a number of samples."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most
        self.tried: list[int] = []
        self.layer = encoder()

    def forward(self, images: Tensor) -> Tensor:
        self.tried.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("no more")
        out: Tensor = self.layer(images)
        return out


def test_processes_try_the_same_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much memory each has: a process that tried more would be alone in its trials."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    meet = threading.Barrier(2)
    told: dict[int, int] = {}

    def of(rank: int, most: int, available: int) -> list[int]:
        def smallest(number: int) -> int:
            told[rank] = number
            meet.wait(timeout=30)
            least = min(told.values())
            meet.wait(timeout=30)
            return least

        small = Small(most)
        images = torch.zeros(30, WIDTH)
        found = fitting_micro_batch(small, images, (), available, tried=True, smallest=smallest)
        return [*small.tried, found.size]

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(of, 0, 30, 10**9)
        other = pool.submit(of, 1, 6, 2 * 24 * PER_SAMPLE)
        assert one.result() == other.result() == [1, 2, 24, 12, 6, 6]


def test_nothing_is_kept_of_the_measurement() -> None:
    module = nn.Sequential(encoder(), nn.Dropout(0.5))
    parameters = [*module.parameters()]
    state = torch.get_rng_state()
    fitting_micro_batch(module, torch.zeros(4, WIDTH), parameters, 10**9, tried=True)
    assert all(p.grad is None for p in parameters)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    fitting_micro_batch(module, torch.zeros(4, WIDTH), parameters, 10**9, tried=True)
    assert all(p.grad is not None and (p.grad == 1).all() for p in parameters)
    module.requires_grad_(False)  # as a locked tower
    fitting_micro_batch(module, torch.zeros(4, WIDTH), parameters, 10**9, tried=True)


def test_free_memory_of_this_machine() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None and 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


def test_the_most_memory_that_was_in_use() -> None:
    before = memory.peak_memory(torch.device("cpu"))
    assert before is not None and before > 50 * 2**20
    held = torch.ones(before // 4 + 2**25)
    after = memory.peak_memory(torch.device("cpu"))
    assert after is not None and after >= before + 2**24
    del held
    assert memory.peak_memory(torch.device("cpu")) == after
    assert memory.peak_memory(torch.device("meta")) is None


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 1000)
    monkeypatch.setattr(memory, "_cgroup_left", lambda: 300)
    assert free_memory(torch.device("cpu")) == 300
    monkeypatch.setattr(memory, "_cgroup_left", lambda: None)
    assert free_memory(torch.device("cpu")) == 1000


KEPT = """
import resource
import torch
from mulki.train.learning.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(64, 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


def test_freed_memory_is_kept() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert keep_freed_memory() is False
        return
    given_back, kept, later = python("-c", KEPT).split()
    assert kept == "True"
    # 5 times 64 MiB: at most 2 MiB a page, where the system has pages as large as that.
    assert int(given_back) - int(later) > 2 * 32
