"""What launches have in common: the architecture, the precision of products, and operands.

Nothing here waits for a device, and nothing asks for one at import.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import DTYPES

PRECISIONS = ("ieee", "tf32", "tf32x3")


class Model(NamedTuple):
    """The operands of one product X W^T, rows contiguous."""

    x: Tensor  # [N, D]
    w: Tensor  # [P, D]

    @classmethod
    def of(cls, x: Tensor, w: Tensor) -> Model:
        return cls(rows(x), rows(w))

    @property
    def width(self) -> int:
        return self.x.shape[1]

    def swapped(self) -> Model:
        return Model(self.w, self.x)


def rows(operand: Tensor) -> Tensor:
    """The operand with contiguous rows, in a dtype the kernels take; rows may be any step apart."""
    if operand.dtype not in DTYPES:
        operand = operand.float()
    return operand if operand.stride(1) == 1 or operand.shape[1] == 1 else operand.contiguous()


def flat(values: Tensor) -> Tensor:
    """Numbers, one per row or fewer, as contiguous float32."""
    return values.to(torch.float32).contiguous()


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A mask as contiguous uint8."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def empty(like: Tensor, *shape: int) -> Tensor:
    """float32 on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)


# Triton's own are for kernels, and take microseconds on the host.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def upcast(models: Sequence[Model]) -> bool:
    """Whether kernels turn what they load into float32 at once.

    Triton's interpreter computes with the bits of a bfloat16 as if they were an integer.
    """
    return interpreted() and any(model.x.dtype == torch.bfloat16 for model in models)


_assumed: str | None = None


def assume_architecture(name: str | None) -> None:
    """Choose tiles and precisions as on this architecture, or again as on the tensors' device."""
    global _assumed
    _assumed = name


def architecture(device: torch.device) -> str:
    """sm_90, gfx942, xpu or the like, or "interpreter" for CPU tensors."""
    if _assumed is not None:
        return _assumed
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        return device.type
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_architecture(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def precision(architecture: str, dtypes: set[torch.dtype]) -> str:
    """How tl.dot multiplies float32: "tf32" where PyTorch may, else as float32 does.

    MULKI_INPUT_PRECISION (ieee, tf32, tf32x3) decides where it is set. Half precision has one way.
    """
    if torch.float32 not in dtypes or architecture == "interpreter":
        return "ieee"
    nvidia = architecture.startswith("sm_")
    tf32 = nvidia or architecture in ("gfx942", "xpu")
    asked = os.environ.get("MULKI_INPUT_PRECISION", "")
    if asked:
        if asked not in PRECISIONS:
            raise ValueError(
                f"MULKI_INPUT_PRECISION: got {asked!r}, wanted one of {', '.join(PRECISIONS)}"
            )
        if not (nvidia or architecture == "xpu" or asked == "ieee" or (tf32 and asked == "tf32")):
            raise ValueError(
                f"MULKI_INPUT_PRECISION: got {asked!r}, which {architecture} has not; wanted ieee"
                + (" or tf32" if tf32 else "")
            )
        return asked
    if tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    # tf32x3 recovers float32 from three products on tensor cores; AMD's compiler refuses it.
    return "tf32x3" if nvidia else "ieee"
