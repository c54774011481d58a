"""Launches a kernel on the current device and stream. All launches go here.

`Repeated` launches a kernel again and again, where arguments differ in counts alone. `multiply`
launches a matrix product of the library that torch calls (cuBLAS, hipBLAS). `recording` collects
what operators launch instead of launching it. The operators then run on tensors of the device
"meta": `benchmarks/kernels/ahead_of_time.py` compiles what a GPU would have been given, and
`python -m benchmarks.kernels plan` counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from . import common

# No fused multiply-add: then a student that equals its teacher has a KL of exactly zero.
FP_FUSION = False
INT32 = 2**31 - 1


class Launch(NamedTuple):
    """A launch that was recorded."""

    kernel: Any  # the triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, constexprs included
    options: dict[str, Any]


class Product(NamedTuple):
    """A product of the library that was recorded: [m, k] times [k, n], or a batch of such."""

    a: Tensor
    b: Tensor
    out: Tensor
    add: bool


_recorded: list[Launch | Product] | None = None


def launch(kernel: Any, grid: tuple[int, ...], warps: int, stages: int, **arguments: Any) -> Any:
    """Launch `kernel` over `grid` and return what was compiled; None if launches are recorded."""
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": FP_FUSION}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, options))
        return None
    return kernel[grid](**arguments, **options)


class Repeated:
    """A kernel and its arguments, all but the counts that differ from launch to launch.

    Triton looks through all arguments of a launch for the kernel that was compiled for their types,
    alignment, and integers that are 1 or multiples of 16. None of that differs here: `counts` are
    of `products.COUNTS`, which are not specialised. So the first launch finds the kernel, and the
    others take it.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], warps: int, stages: int, **arguments: Any
    ) -> None:
        self._launch = partial(launch, kernel, grid, warps, stages)
        self._kernel, self._grid = kernel, grid
        self._arguments = arguments
        self._run: Callable[..., None] | None = None

    def __call__(self, **counts: int) -> None:
        """Launch with these counts, which are not negative."""
        self._arguments.update(counts)
        fits = max(counts.values()) <= INT32  # beyond, a count is of another type
        if fits and self._run is not None:
            self._run(*self._arguments.values())
            return
        compiled = self._launch(**self._arguments)
        if fits and isinstance(compiled, CompiledKernel):
            names = (parameter.name for parameter in self._kernel.params)
            self._arguments = {name: self._arguments[name] for name in names}
            self._run = compiled[(*self._grid, 1, 1)[:3]]


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a b to `out`, or add it to what is there; `out` is float32 or of the operands' dtype.

    Operands are matrices, or for products that are not added batches of them. float32 is multiplied
    as torch's setting says. The interpreter's CPU multiplies in float32.
    """
    if _recorded is not None:
        _recorded.append(Product(a, b, out, add))
        return
    if a.device.type == "cpu":
        a, b = a.to(out.dtype), b.to(out.dtype)
    product = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else product(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        product(a, b, out_dtype=out.dtype, out=out)


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch | Product]]:
    """Collect the launches for `architecture`."""
    global _recorded
    assert _recorded is None
    launches: list[Launch | Product] = []
    _recorded = launches
    common.assume_architecture(architecture)
    try:
        yield launches
    finally:
        _recorded = None
        common.assume_architecture(None)
