"""What an operator would do on a GPU, recorded on tensors of the device "meta".

    steps = recorded(lambda: kernel("teacher_kl")(x, request))

Triton's launches are caught where it would start them, all else by torch's dispatcher. Do not
import this under TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from mulki.ops.operators import OPERATORS

_ALLOCATIONS = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like")


class Launch(NamedTuple):
    """A launch of a kernel of ours."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, options included


class Operation(NamedTuple):
    """An operation of torch that is no view: a product, a sum, an allocation."""

    name: str
    read: list[Tensor]
    written: list[Tensor]

    @property
    def is_product(self) -> bool:
        return self.name in ("mm", "addmm", "bmm", "addmm_")

    @property
    def allocates(self) -> bool:
        return self.name in _ALLOCATIONS


class _Operations(TorchDispatchMode):
    def __init__(self, steps: list[Launch | Operation]) -> None:
        super().__init__()
        self._steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, Tensor):
            read = [a for a in args if isinstance(a, Tensor)]
            self._steps.append(Operation(func.overloadpacket.__name__, read, [out]))
        return out


def recorded(call: Callable[[], object]) -> list[Launch | Operation]:
    """The steps of a call with tensors of the device "meta"."""
    steps: list[Launch | Operation] = []

    def run(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [parameter.name for parameter in self.params]
        steps.append(Launch(self, grid, dict(zip(names, given, strict=False)) | named))

    with mock.patch.object(JITFunction, "run", run), _Operations(steps):
        call()
    return steps


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a shape and dtype without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments_of(op: str, n: int, p: int, d: int, dtype: torch.dtype) -> Any:
    """Those of an operator: two teachers by the gate on labels, one of pairs; a class mask."""
    operator = OPERATORS[op]

    def teachers(k: int, classes: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        xs, ws = [meta(n, d, dtype=dtype)] * k, [meta(classes, d, dtype=dtype)] * k
        return xs, ws, [meta()] * k

    labels = meta(n, dtype=torch.int64), meta(p, dtype=torch.bool)
    rest: dict[str, tuple[Any, ...]] = {
        "teacher_kl": (*teachers(2, p), None, *labels, 2.0, 1.0, 0.0, 1.0, True),
        "prototype_cross_entropy": (*labels, 0.1, -100),
        "siglip": (meta(), 0),
        "similarity": (True,),
        "contrastive": (),
        "pair_kl": (*teachers(1, n), None, 2.0, 1.0, 0.0, 1.0, True, 1.0, 1.0),
    }
    return operator.arguments(meta(n, d, dtype=dtype), meta(p, d, dtype=dtype), meta(), *rest[op])
