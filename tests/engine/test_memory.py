"""How many samples can be encoded at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mulki.engine import memory
from mulki.engine.memory import Fit, fitting_micro_batch, free_memory

WIDTH = 64
# What ReLU saves of a float32 row; Linear saves the images, which are there anyway.
PER_SAMPLE = 4 * WIDTH


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


def test_what_a_sample_keeps_is_measured() -> None:
    found = fitting_micro_batch(encoder(), torch.zeros(100, WIDTH), available=10**9)
    assert found == Fit(100, PER_SAMPLE, 10**9)
    assert str(found) == "0.0 MiB an image, 954 MiB free"


@pytest.mark.parametrize(("samples", "size"), [(8.5, 8), (8.0, 8), (1.2, 1), (0.1, 1), (1000, 20)])
def test_half_of_the_free_memory_is_taken(samples: float, size: int) -> None:
    available = int(2 * samples * PER_SAMPLE)
    assert fitting_micro_batch(encoder(), torch.zeros(20, WIDTH), available).size == size


def test_a_batch_of_one() -> None:
    found = fitting_micro_batch(encoder(), torch.zeros(1, WIDTH), available=10**9)
    assert found.size == 1


def test_a_size_that_runs_out_of_memory_is_halved() -> None:
    tried: list[int] = []
    real = encoder()

    class Small(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            tried.append(len(images))
            if len(images) > 7:
                raise torch.OutOfMemoryError("no more")
            out: Tensor = real(images)
            return out

    class Nothing:
        @staticmethod
        def empty_cache() -> None:
            tried.append(-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda device: Nothing)
        found = fitting_micro_batch(Small(), torch.zeros(30, WIDTH), available=10**9)
    assert found.size == 7
    assert tried == [1, 2, 30, -1, 15, -1, 7]


def test_nothing_is_kept_of_the_measurement() -> None:
    module = encoder()
    fitting_micro_batch(module, torch.zeros(4, WIDTH), available=10**9)
    assert all(p.grad is None for p in module.parameters())


def test_free_memory_of_this_machine() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
    assert free_memory(torch.device("meta")) == 0


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 1000)
    monkeypatch.setattr(memory, "_cgroup_left", lambda: 300)
    assert free_memory(torch.device("cpu")) == 300
    monkeypatch.setattr(memory, "_cgroup_left", lambda: None)
    assert free_memory(torch.device("cpu")) == 1000
