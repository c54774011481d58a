"""What a step launches, counted without a GPU: products, launches, bytes and memory.

A step is a public function and the gradients of its leaves, with all that autograd launches for
them. It runs on tensors of the device "meta". Launches of our kernels are recorded
(`launch.recording`), and so is every other operation of PyTorch that would launch a kernel. A
product is 2 N P D operations; bytes are those of the tensors that a launch is given, each once, and
for an operation of PyTorch also those that it returns. Through L2 they come as often as programs
take them: a product of the library is assumed to have tiles of 128 x 128. Extra memory is the peak
beyond inputs and results; recorded launches keep their tensors, so that nothing of ours counts as
freed on the way.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernels.ahead_of_time import NUMBER_FORMATS, asking, precision
from mulki import Similarity, functional
from mulki.kernels import lookup
from mulki.kernels.common import ceil_div, next_power_of_2
from mulki.kernels.launch import Launch, Product, recording
from mulki.kernels.schedule import TILE, padded_operations
from mulki.ops import (
    autograd,
    backends,
    direct,
    operators,
    siglip,
    torch_private,
    use_backend,
)

# Operations that launch nothing, beside views.
_FREE = (
    *("empty", "new_empty", "empty_like", "empty_strided"),
    *("detach", "lift_fresh", "_unsafe_view"),
)
# Operations that write their first argument and do not read it.
_WRITES = ("copy_", "fill_", "zero_")
# The operators, and how many teachers each has.
OPERATORS = {
    "dual_teacher_kl": 2,
    "prototype_cross_entropy": 0,
    "contrastive": 0,
    "pair_kl": 1,
    "siglip": 0,
    "similarity": 0,
}
PAIRED = ("contrastive", "pair_kl")  # with P = N


@dataclass(frozen=True)
class Work:
    """One launch."""

    source: str  # "library" (a product of the library), "kernel" (one of ours) or "torch"
    operations: float  # of matrix products
    padded: float  # the same, of whole tiles
    bytes: int
    held: int  # bytes of the memory that its tensors are parts of
    programs: int = 0  # of ours, that share operations and bytes
    again: int = 0  # bytes that programs take from L2 once more


@dataclass(frozen=True)
class Counts:
    """All launches of a call, forward and backward."""

    work: tuple[Work, ...]
    products: float
    extra_bytes: int

    @property
    def launches(self) -> int:
        return len(self.work)

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.work)

    @property
    def l2_bytes(self) -> int:
        return self.bytes + sum(one.again for one in self.work)


def counts(
    operator: str,
    n: int,
    p: int,
    d: int,
    number_format: str,
    in_graph: bool = False,
    one_memory: bool = False,
) -> Counts:
    """Of a step by our kernels, from the public function to the gradients of its leaves.

    Args:
        in_graph: what a CUDA graph has of it.
        one_memory: whether the features of all models lie beside each other, and their prototypes.
    """
    step = step_of(operator, n, p, d, number_format, one_memory=one_memory)
    captured = mock.patch.object(lookup, "is_capturing", lambda: in_graph)
    with precision("sm_90", number_format), recording("sm_90") as launches, on_meta(), captured:
        extra = _observed(step, launches)
    work = tuple(one if isinstance(one, Work) else _work(one, 2 * n * p * d) for one in launches)
    return Counts(work, sum(one.operations for one in work) / (2 * n * p * d), extra)


def step_of(
    operator: str,
    n: int,
    p: int,
    d: int,
    number_format: str,
    upstream: Tensor | None = None,
    one_memory: bool = False,
) -> Callable[[], Sequence[Tensor]]:
    """A step of training of a public function, on tensors of the device "meta"; see `on_meta`.

    Teachers have scales that are numbers, the student one that learns. An upstream gradient that is
    None is made, and is 1.
    """
    dtype = NUMBER_FORMATS[number_format][0]
    pairs = [(_meta(n, d, dtype=dtype), _meta(p, d, dtype=dtype)) for _ in range(3)]
    if one_memory:
        pairs = list(zip(_meta(3, n, d, dtype=dtype), _meta(3, p, d, dtype=dtype), strict=True))
    leaves = [t.requires_grad_() for t in (*pairs[0], _meta())]
    target, bias = _meta(n, dtype=torch.int64), _meta().requires_grad_()
    if operator == "similarity":
        upstream = _meta(n, p, dtype=dtype)
    if operator == "siglip":
        leaves.append(bias)

    def step() -> Sequence[Tensor]:
        student, *teachers = (
            Similarity(x, w, leaves[2] if i == 0 else 20.0) for i, (x, w) in enumerate(pairs)
        )
        if operator == "dual_teacher_kl":
            out = functional.dual_teacher_kl(student, *teachers, target=target)
        elif operator == "pair_kl":
            out = functional.pair_teacher_kl(student, teachers[:1], temperature=2.0)
        elif operator == "prototype_cross_entropy":
            out = functional.prototype_cross_entropy(student, target)
        elif operator == "similarity":
            out = functional.prototype_similarity(*leaves)
        elif operator == "contrastive":
            out = functional.clip_contrastive(*leaves)
        else:
            out = siglip.loss((leaves[0], leaves[1], leaves[2]), bias, "mean")  # of any N and P
        return (out, *torch.autograd.grad(out, leaves, upstream))

    return step


class _Direct:
    """Stands for `torch.ops.mulki`, which has other kernels for tensors without values."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(backends.call, operators.OPERATORS[name])


@contextmanager
def on_meta() -> Iterator[None]:
    """The public functions take the Triton kernels for tensors of the device "meta"."""
    patches = (
        (lookup, "why_not", lambda *_: None),
        # Where a mode of the dispatcher listens, or tensors have no values, the way is another one.
        (direct, "_may_be_direct", lambda *_: True),
        (torch_private, "is_plain", lambda *_: True),
        (autograd, "_OPS", _Direct()),
    )
    with ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(use_backend("triton"))
        yield


def calls_of(
    operator: str, n: int, p: int, d: int, number_format: str
) -> list[Callable[[], object]]:
    """The calls that are counted, one after the other, on tensors of the device "meta"."""
    dtype = NUMBER_FORMATS[number_format][0]
    x, w, scale = _meta(n, d, dtype=dtype), _meta(p, d, dtype=dtype), _meta()
    target, k = _meta(n, dtype=torch.int64), OPERATORS[operator]
    teachers = (
        [x.clone() for _ in range(k)],
        [w.clone() for _ in range(k)],
        [_meta() for _ in range(k)],
    )
    if operator == "dual_teacher_kl":
        gate = None, target, None, 2.0, 1.0, 0.0, 1.0
        return [asking("teacher_kl", x, w, scale, *teachers, *gate)]
    if operator == "pair_kl":
        return [asking("pair_kl", x, w, scale, *teachers, None, 2.0, 1.0, 0.0, 0.0)]
    if operator == "similarity":
        forward = asking(operator, x, w, scale, reduction="none", gradients=False)
        grad = _meta(n, p, dtype=dtype)
        return [forward, asking(operator, x, w, scale, grad=grad, reduction="none")]
    rest: dict[str, tuple[Any, ...]] = {
        "prototype_cross_entropy": (target, None, 0.0, -100),
        "siglip": (_meta(),),
        "contrastive": (),
    }
    return [asking(operator, x, w, scale, *rest[operator])]


def counts_of_torch(function: Callable[[], Sequence[Tensor]], size: int) -> Counts:
    """Of plain PyTorch, on tensors of the device "meta"; `size` is the operations of a product."""
    launches: list[Any] = []
    extra = _observed(function, launches)
    return Counts(tuple(launches), sum(one.operations for one in launches) / size, extra)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _work(launch: Launch | Product, size: int) -> Work:
    """`size` is the operations of a product."""
    if isinstance(launch, Product):
        *batch, m, k = launch.a.shape
        count, n = math.prod(batch), launch.b.shape[-1]
        read = (launch.a, launch.b, launch.out, *([launch.out] if launch.add else []))
        again = _bytes(launch.a) * (ceil_div(n, TILE) - 1)
        again += _bytes(launch.b) * (ceil_div(m, TILE) - 1)
        padded, moved = count * padded_operations(m, k, n), sum(map(_bytes, read))
        return Work("library", 2 * count * m * n * k, padded, moved, _held(read), again=again)
    tensors = [t for t in tree_leaves(launch.arguments) if isinstance(t, Tensor)]
    once = {id(t): t for t in tensors}.values()
    name, given, programs = launch.kernel.__name__, launch.arguments, math.prod(launch.grid)
    products, again = 0, 0
    if name == "whole_rows":
        xs, ws = given["operands"][:2]
        products, again = len(xs), sum(map(_bytes, ws)) * (programs - 1)
        if given["dx_ptr"] is not None:
            products, again = products + 1, again + _bytes(ws[0]) * programs
    if name == "stored_rows" and given["g_ptr"] is not None and not given["TILE"].whole:
        again = sum(map(_bytes, given["y_ptrs"])) * given["TILE"].statistics
    operations, padded = size * products, 0
    if name == "whole_rows":
        padded = operations * next_power_of_2(given["classes"]) / given["classes"]
    moved = sum(map(_bytes, once))
    return Work("kernel", operations, padded, moved, _held(once), programs, again)


def _held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors are parts of."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


class _Observer(TorchDispatchMode):
    """Notes what operations would launch, and the memory that they allocate."""

    def __init__(self, launches: list[Any]) -> None:
        super().__init__()
        self.launches = launches
        self.live = self.peak = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for t in made:
            self._allocated(t.untyped_storage())
        name = func.overloadpacket.__name__
        if name not in _FREE:
            # What is written alone is not read.
            read = args[1:] if name in _WRITES else args, {**(kwargs or {}), "out": None}
            given = [t for t in tree_leaves(read) if isinstance(t, Tensor)]
            operations = padded = 0
            if name in ("mm", "addmm"):
                a, b = given[-2:]
                operations = 2 * a.shape[0] * a.shape[1] * b.shape[1]
                padded = padded_operations(*a.shape, b.shape[1])
            source, both = "library" if operations else "torch", [*given, *made]
            moved = sum(map(_bytes, both))
            self.launches.append(Work(source, operations, padded, moved, _held(both)))
        return out

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self.seen.pop(key)


def _observed(function: Callable[[], Any], launches: list[Any]) -> int:
    """Call it, note what it launches, and return its peak of memory beyond its results."""
    with _Observer(launches) as observer:
        out = function()
    results = {t.untyped_storage()._cdata: t for t in tree_leaves(out) if isinstance(t, Tensor)}
    return observer.peak - sum(t.untyped_storage().nbytes() for t in results.values())
