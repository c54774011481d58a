"""What decides on the bits of a run: random generators, and algorithms that repeat."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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


def random_state(*devices: torch.device) -> list[Any]:
    """The states of Python's, NumPy's and torch's generators, as JSON and tensors hold them.

    Args:
        devices: whose generators are among them, beside that of the CPU.
    """
    of_numpy: Any = np.random.get_state(legacy=False)
    if of_numpy["bit_generator"] == "MT19937":  # else a program has set another one
        kind, keys, *rest = np.random.get_state()
        of_numpy = [kind, np.asarray(keys).tolist(), *rest]
    state = [random.getstate(), of_numpy, torch.get_rng_state()]
    return state + [_generator_state(each) for each in devices if each.type != "cpu"]


def set_random_state(state: Sequence[Any], *devices: torch.device) -> None:
    """Undo what was drawn since `random_state` of the same devices."""
    (version, words, gauss), of_numpy, of_torch, *of_devices = state
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(of_numpy if isinstance(of_numpy, dict) else tuple(of_numpy))
    torch.set_rng_state(of_torch)
    others = (each for each in devices if each.type != "cpu")
    for device, of_device in zip(others, of_devices, strict=False):
        _generator_state(device, of_device)


def _generator_state(device: torch.device, new: Tensor | None = None) -> Tensor:
    # Reads the state, or sets it to `new`. The functions for Metal take no device.
    module, one = torch.get_device_module(device), device.type == "mps"
    if new is None:
        state: Tensor = module.get_rng_state() if one else module.get_rng_state(device)
        return state.cpu()
    module.set_rng_state(*([new] if one else [new, device]))
    return new
