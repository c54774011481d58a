"""Host code that all operators share: operands, the architecture, the precision of products.

Nothing here waits for a device, and importing this asks for none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32", "tf32x3")


class Model(NamedTuple):
    """The operands of one product X W^T, of a student or a teacher."""

    features: Tensor  # X [N, D]; the elements of a row are contiguous
    prototypes: Tensor  # W [P, D], likewise

    @classmethod
    def of(cls, features: Tensor, prototypes: Tensor) -> Model:
        return cls(contiguous_rows(features), contiguous_rows(prototypes))

    @property
    def width(self) -> int:
        return self.features.shape[1]


def contiguous_rows(operand: Tensor) -> Tensor:
    """The operand, copied unless the elements of a row are contiguous. The row stride is free."""
    return operand if operand.stride(1) == 1 or operand.shape[1] == 1 else operand.contiguous()


def as_float32(values: Tensor) -> Tensor:
    """Contiguous float32."""
    return values.to(torch.float32).contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as contiguous uint8."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def empty_float32(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 tensor on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)


# triton.cdiv and triton.next_power_of_2 take microseconds when called on the host.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def upcast(models: Sequence[Model]) -> bool:
    """Whether kernels convert operands to float32 as they load them.

    Triton's interpreter takes the bits of a bfloat16 for an integer and computes with that.
    """
    bfloat16 = models[0].features.dtype == torch.bfloat16
    return bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"


_assumed: str | None = None


def assume_architecture(name: str | None) -> None:
    """Choose tiles and precisions for this architecture; None: for the device of the tensors."""
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
    return _cuda_architecture(_index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def resident_programs(device: torch.device, of_each: int) -> int:
    """How many programs run at a time, where a multiprocessor holds so many of them."""
    if device.type == "cpu":
        return 3  # of the interpreter: so few that each has several blocks
    multiprocessors = _cuda_multiprocessors(_index(device)) if device.type == "cuda" else 132
    return of_each * multiprocessors


@cache
def _cuda_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def _cuda_architecture(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def precision(architecture: str, dtype: torch.dtype) -> str:
    """The input_precision of tl.dot: "tf32" where PyTorch allows tf32, else a float32 product.

    The environment variable MULKI_INPUT_PRECISION (ieee, tf32, tf32x3) overrides this. It says how
    float32 is multiplied; for half precision it has no effect.

    Raises:
        ValueError: the variable has another value, or one that this architecture does not support.
    """
    if dtype != torch.float32 or architecture == "interpreter":
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
                f"MULKI_INPUT_PRECISION: got {asked!r}, which {architecture} does not support; "
                f"wanted ieee{' or tf32' if tf32 else ''}"
            )
        return asked
    if tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    # tf32x3: three tf32 products give float32 accuracy on tensor cores. AMD's compiler refuses it.
    return "tf32x3" if nvidia else "ieee"


def number_family(dtype: torch.dtype) -> str:
    """How the library multiplies: "half" precision, "tf32", or "float" for strict float32."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float"
