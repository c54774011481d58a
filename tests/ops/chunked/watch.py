"""Counts of operations, products and memory of `chunked`, on a device without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mulki.ops import chunked
from mulki.ops.operators import OPERATORS
from tests.ops.op_cases import Case, asking, make

MIB = 1 << 20
#: Cases, and how many teachers each has.
TEACHERS = {"kl": 2, "kl_label": 2, "ce": 0, "ce_all": 0, "contrastive": 0, "siglip": 0, "pairs": 2}
PAIRS = ("contrastive", "pairs")


class Watch(TorchDispatchMode):
    """Counts operations and products, and the most bytes of results in memory at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        name = func.overloadpacket.__name__
        if name not in ("new_empty", "empty_like", "scalar_tensor"):  # no work on a device
            self.names.append(name)
        storage = out.untyped_storage()
        self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        self.largest = max(self.largest, sum(size for _, size in self._alive.values()))
        return out

    @property
    def products(self) -> int:
        return sum(name in ("mm", "addmm", "addmm_") for name in self.names)


def on_meta(name: str, n: int, p: int, dtype: torch.dtype, d: int = 64) -> Case:
    case = asking(make(name, n=4, p=4, d=d, dtype=dtype), "reduced")

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        if not isinstance(value, Tensor):
            return value
        shape = [{4: n}.get(size, size) for size in value.shape]
        return value.new_empty(shape, device="meta")

    args = [moved(value) for value in case.args]
    fields = OPERATORS[case.op].arguments._fields
    for i, (field, value) in enumerate(zip(fields, args, strict=False)):
        if field in ("prototypes", "class_mask"):
            args[i] = value if value is None else value.new_empty(p, *value.shape[1:])
        if field == "teacher_prototypes":
            args[i] = [one.new_empty(p, one.shape[1]) for one in value]
    return Case(case.op, tuple(args))


def computed(case: Case) -> Watch:
    operator = OPERATORS[case.op]
    with Watch() as watch:
        chunked.run(operator, *operator.split(case.args))
    return watch
