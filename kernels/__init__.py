"""Triton kernels, imported as `mulki.kernels`. Importing this package imports no Triton.

`KERNELS` maps the name of an operator to its kernel. It is empty: the kernels are not written yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

KERNELS: dict[str, Callable[..., Any]] = {}


def why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why no kernel here serves `op`, in one sentence, or None when one does."""
    return None if op in KERNELS else f"mulki.kernels has no Triton kernel for {op} yet"


def kernel(op: str) -> Callable[..., Any]:
    """The kernel of `op`, with the operator's signature; ask `why_not` first."""
    return KERNELS[op]
