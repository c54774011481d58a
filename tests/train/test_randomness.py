from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from mulki.errors import InputError, ProcessLost
from mulki.train.randomness import deterministic, random_state, set_random_state

CPU = torch.device("cpu")


def draws() -> list[float]:
    # An odd number of normal draws, of which Python and NumPy make two at a time.
    return [
        random.gauss(0, 1),
        random.random(),
        np.random.normal(),
        np.random.rand(),
        *torch.randn(17).tolist(),
        torch.rand(()).item(),
    ]


@pytest.mark.parametrize("before", [0, 1, 700])
def test_draws_repeat(before: int) -> None:
    for _ in range(before):
        draws()
    state = random_state(CPU)
    wanted = draws() + draws()
    draws()
    set_random_state(state, CPU)
    assert draws() + draws() == wanted


def test_draws_of_another_numpy_generator_repeat() -> None:
    usual = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        test_draws_repeat(1)
    finally:
        np.random.set_bit_generator(usual)


@pytest.mark.gpu
def test_draws_on_a_gpu_repeat() -> None:
    device = torch.device("cuda")
    state = random_state(device)
    wanted = torch.rand(5, device=device)
    set_random_state(state, device)
    assert torch.equal(torch.rand(5, device=device), wanted)


def test_deterministic_algorithms_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    # What was not there would not be put back.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


def test_an_operation_without_such_an_algorithm_is_named() -> None:
    named = "--deterministic: put_ .*not have a deterministic.*leave"
    with pytest.raises(InputError, match=named), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="size"), deterministic(True):
        torch.ones(2) + torch.ones(3)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_another_process_has_met_is_not_laid_to_the_option() -> None:
    said = "process 1 has failed: x does not have a deterministic implementation"
    with pytest.raises(ProcessLost, match="process 1 has failed"), deterministic(True):
        raise ProcessLost(said, quiet=True)
    with pytest.raises(RuntimeError, match="Deterministic behavior"), deterministic(True):
        raise RuntimeError(
            "Deterministic behavior was enabled, set CUBLAS_WORKSPACE_CONFIG=:4096:8"
        )
