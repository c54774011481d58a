"""What decides on the bits of a run: random generators, and algorithms that repeat."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

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


def random_state(device: torch.device) -> list[Any]:
    """The states of Python's, NumPy's and torch's generators, as JSON and tensors hold them.

    Args:
        device: of the process; its generator is among them.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = [random.getstate(), [kind, np.asarray(keys).tolist(), *rest], torch.get_rng_state()]
    if device.type != "cpu":
        state.append(torch.get_device_module(device).get_rng_state(device).cpu())
    return state


def set_random_state(state: Sequence[Any], device: torch.device) -> None:
    """Undo what was drawn since `random_state`."""
    (version, words, gauss), of_numpy, of_torch, *of_device = state
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(of_numpy))
    torch.set_rng_state(of_torch)
    for each in of_device:
        torch.get_device_module(device).set_rng_state(each, device)
