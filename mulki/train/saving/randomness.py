"""What decides on the bits of a run: random generators, and algorithms that repeat."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mulki.errors import InputError, ProcessLost


@contextmanager
def deterministic(used: bool) -> Iterator[None]:
    """In the block torch computes with such algorithms alone as give the same bits every time.

    CUBLAS_WORKSPACE_CONFIG, where it is not set, is set for the rest of the process, since cuBLAS
    reads it once.

    Raises:
        InputError: an operation has no such algorithm.
    """
    if not used:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False  # it chooses by time
    try:
        yield
    except ProcessLost:
        raise  # it may speak of what another process has met
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        reason = str(error).split(", but you set")[0].splitlines()[0]
        raise InputError(
            f"--deterministic: {reason}; leave the option out, or pass --device cpu"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark = before[2]


def random_state(device: torch.device) -> Tensor:
    """The states of Python's, NumPy's and torch's generators, [n] int64.

    Args:
        device: of the process; its generator is among them.
    """
    version, words, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    parts = [
        torch.from_numpy(np.array([version, *words], dtype=np.int64)),
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
