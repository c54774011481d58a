from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mulki.engine.randomness import random_state, set_random_state

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
    assert state.dtype == torch.int64 and state.ndim == 1
    wanted = draws() + draws()
    draws()
    set_random_state(state, CPU)
    assert draws() + draws() == wanted


@pytest.mark.gpu
def test_draws_on_a_gpu_repeat() -> None:
    device = torch.device("cuda")
    state = random_state(device)
    wanted = torch.rand(5, device=device)
    set_random_state(state, device)
    assert torch.equal(torch.rand(5, device=device), wanted)
