"""The states of all global random generators of a process, as one tensor."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> Tensor:
    """The states of Python's, NumPy's and torch's generators, [n] int64.

    Args:
        device: of the process; its generator is among them.
    """
    version, words, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    parts = [
        torch.tensor([version, *words]),
        _floats(gauss is not None, gauss or 0.0),
        torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        torch.tensor([int(place)]),
        _floats(bool(has_gauss), float(cached)),
        torch.get_rng_state().long(),
    ]
    if device.type != "cpu":
        parts.append(torch.get_device_module(device).get_rng_state(device).cpu().long())
    return torch.cat(parts)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Undo what was drawn since `random_state`."""
    state = state.cpu()
    python, (gauss,), keys, (place,), (normal,), rest = (
        state[:626],
        state[626:628].unsqueeze(0),
        state[628:1252],
        state[1252:1253],
        state[1253:1255].unsqueeze(0),
        state[1255:],
    )
    version, *words = python.tolist()
    random.setstate((version, tuple(words), _float(gauss)))
    cached = _float(normal)
    np.random.set_state(
        ("MT19937", keys.numpy().astype(np.uint32), int(place), cached is not None, cached or 0.0)
    )
    size = len(torch.get_rng_state())
    torch.set_rng_state(rest[:size].byte())
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(rest[size:].byte(), device)


def _floats(there: bool, value: float) -> Tensor:
    return torch.cat(
        [torch.tensor([int(there)]), torch.tensor([value], dtype=torch.float64).view(torch.int64)]
    )


def _float(pair: Tensor) -> float | None:
    return float(pair[1:].view(torch.float64)) if pair[0] else None
