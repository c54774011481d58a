"""Which Triton kernels there are, in this folder `mulki.kernels`, without importing Triton.

A module per operator has a function of its name, from the operator's arguments and what is asked of
it (`mulki.ops.operators.Request`) to its results. Arguments are not checked: `mulki.ops` does that.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mulki.ops import toolchain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the first with bfloat16 and tf32 on tensor cores

OPERATORS: tuple[str, ...] = ("similarity", "prototype_cross_entropy", "teacher_kl")
OPERATORS += ("contrastive", "siglip", "pair_kl")


def why_not(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why no kernel here serves `op`, in one sentence, or None when one does.

    Args:
        device: of the tensors, as "cuda:1", or "cuda" for all that are here.
    """
    if op not in OPERATORS:
        return "mulki.kernels has no Triton kernel for it"
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {dtype}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not importable ({error}): install the one that this torch names"
    if device == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "runs on CPU tensors under TRITON_INTERPRET=1 alone"
    return _missing(torch.device(device)) or "; ".join(toolchain.missing()) or None


def _missing(asked: torch.device) -> str | None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return f"wants torch 2.11 or newer, and this is {torch.__version__}"
    if asked.type == "xpu":
        return None if torch.xpu.is_available() else "torch finds no XPU on this machine"
    if asked.type != "cuda":
        return f"serves CUDA, HIP and XPU tensors, not {asked.type}"
    if not torch.cuda.is_available():
        return "torch finds no GPU on this machine"
    if torch.version.hip is not None:
        return None
    for i in range(torch.cuda.device_count()) if asked.index is None else (asked.index,):
        found = torch.cuda.get_device_capability(i)
        if found < CAPABILITY:
            wanted, has = (".".join(map(str, one)) for one in (CAPABILITY, found))
            name = torch.cuda.get_device_name(i)
            return f"wants compute capability {wanted}, and {name} has {has}"
    return None


def kernel(op: str) -> Callable[..., Any]:
    """The function of `op`, on the device of its tensors; ask `why_not` first."""
    function = getattr(importlib.import_module(f"mulki.kernels.{op}"), op)

    def on_its_device(x: Any, request: Any) -> tuple[torch.Tensor, ...]:
        with _current(x[0].device):
            return function(x, request)

    return on_its_device


def _current(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device, wherever the tensors are.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()
