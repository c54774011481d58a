"""Small calls of kernels without most of Python's work: what a call did is kept, and done again.

What Python does for a call, from checks to the arguments of launches, depends on shapes, strides,
dtypes, devices, alignments and numbers, on how matrices lie to each other in one memory, and on
settings. These are the key of a call. The second call of a key is recorded as a function of its
tensors: what it allocated, the operations of torch, and the launches with the kernels that were
found for them. The calls after it are calls of that function. Nothing is kept of a call that took
many steps, whose time is the GPU's, or that read a value, and nothing of its tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from mulki.ops.logits import autocasting

Results = tuple[Tensor, ...]
Key = tuple[Any, ...]
Function = Callable[..., Results]  # of the tensors of a call

MOST_STEPS = 64  # of a call that is kept
MOST_CALLS = 512  # then all are forgotten: shapes may change with every call
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

#: What is kept, by the key of the call; None of one that was seen once, False of one not to keep.
calls: dict[Key, Function | bool | None] = {}
_forbidden = 0
_IS_HIP = torch.version.hip is not None


class _OfThread(threading.local):
    recorder: Recorder | None = None


_of_thread = _OfThread()


def key_of(values: Sequence[Any], *also: Any) -> tuple[Key, list[Tensor]]:
    """The key of a call with these arguments, and its tensors."""
    tensors: list[Tensor] = []
    key = [*also, is_capturing()]
    _add(values, key, tensors)
    # Operands of several models that lie in one memory may be one product.
    first: dict[Key, tuple[int, Any]] = {}
    for i, t in enumerate(tensors):
        if t.dim() == 2:
            kind, offset = (t.untyped_storage()._cdata, t.shape, t.stride()), t.storage_offset()
            of, start = first.setdefault(kind, (i, offset))
            key += of, offset - start
    return tuple(key), tensors


def _add(values: Sequence[Any], key: list[Any], tensors: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            key += value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % 16
            if _IS_HIP:  # whose compiler asks whether 32 bits are enough
                key.append(value.untyped_storage().nbytes() >> 31 == 0)
        elif isinstance(value, (list, tuple)):
            key.append(len(value))
            _add(value, key, tensors)
        else:
            key.append(value)


def is_capturing() -> bool:
    """Whether launches go into a CUDA graph, where each costs the host nothing later."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def again(function: Function, tensors: Sequence[Tensor]) -> Results:
    """What was kept of a call, for the tensors of another one."""
    device = tensors[0].device
    with current_device(device):
        if not autocasting(device.type):
            return function(*tensors)
        with torch.autocast(device.type, enabled=False):
            return function(*tensors)


def noted(key: Key, call: Callable[..., Results], *values: Any) -> Results:
    """Call with values that the key is made of, and note it or keep it for the calls after it."""
    if _forbidden or calls.get(key, True) is False:
        return call(*values)
    if key not in calls:
        if len(calls) >= MOST_CALLS:
            calls.clear()
        calls[key] = None
        return call(*values)
    # Each tensor is an object of its own, also where one is given twice.
    given: list[Tensor] = []
    copied = tuple(_detached(value, given) for value in values)
    with Recorder(given) as recorder:
        _of_thread.recorder = recorder
        try:
            results = call(*copied)
        finally:
            _of_thread.recorder = None
    calls[key] = recorder.finished(results) or False
    return results


def _detached(value: Any, given: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        given.append(value.detach())
        return given[-1]
    if isinstance(value, (list, tuple)):
        members = [_detached(one, given) for one in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    return value


def forget() -> None:
    """Keep nothing of the calls so far."""
    calls.clear()


@contextmanager
def forbidden() -> Iterator[None]:
    """Nothing is kept or done again: launches are not what they seem."""
    global _forbidden
    forget()
    _forbidden += 1
    try:
        yield
    finally:
        _forbidden -= 1


class Recorder(TorchDispatchMode):
    """Notes what is done with tensors, and what is made of them."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = Graph()
        self._nodes = {id(t): self._graph.placeholder(f"t{i}") for i, t in enumerate(given)}
        self._known = list(given)  # whose ids no others take
        self._steps = 0
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._paused and self._steps <= MOST_STEPS:
            self._note(func, args, kwargs or {}, out)
        return out

    def launched(self, run: Callable[..., None], arguments: Sequence[Any]) -> None:
        """Note a launch."""
        self._step(run, tuple(arguments), {})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What a launch itself asks of torch is a part of it."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def finished(self, results: Results) -> Function | None:
        """What was noted as a function of the tensors that were given; None where it is not all."""
        if self._steps > MOST_STEPS or any(id(t) not in self._nodes for t in results):
            return None
        self._graph.output(tuple(self._nodes[id(t)] for t in results))
        code = self._graph.python_code("self")
        scope = dict(code.globals)
        exec(code.src, scope)
        return partial(scope["forward"], None)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        made = [out] if isinstance(out, Tensor) else out
        if not isinstance(made, (list, tuple)) or not all(isinstance(t, Tensor) for t in made):
            self._steps = MOST_STEPS + 1  # a value was read
        elif isinstance(out, Tensor) and func.overloadpacket.__name__ in _ALLOCATIONS:
            new = _empty(out.dtype, out.device)
            self._made(out, self._step(new, (tuple(out.shape), out.stride()), {}))
        elif func.is_view and _same_start(args[0], out) and id(args[0]) in self._nodes:
            shape = tuple(out.shape), out.stride()
            if shape == (tuple(args[0].shape), args[0].stride()):
                self._made(out, self._nodes[id(args[0])])
            else:
                self._made(out, self._step(torch.as_strided, (args[0], *shape), {}))
        else:
            node = self._step(func, args, kwargs)
            for i, t in enumerate(made):
                # What is written to a given tensor stays where it was.
                if node is not None and id(t) not in self._nodes:
                    one = isinstance(out, Tensor)
                    self._made(t, node if one else self._graph.call_function(getitem, (node, i)))

    def _made(self, out: Tensor, node: Node | None) -> None:
        if node is not None:
            self._known.append(out)
            self._nodes[id(out)] = node

    def _step(self, function: Any, args: Any, kwargs: Any) -> Node | None:
        self._steps += 1
        try:
            args, kwargs = map_aggregate((args, kwargs), self._node_of)
        except KeyError:  # a tensor from elsewhere
            self._steps = MOST_STEPS + 1
        if self._steps > MOST_STEPS:
            return None
        return self._graph.call_function(function, args, kwargs)

    def _node_of(self, value: Any) -> Any:
        return self._nodes[id(value)] if isinstance(value, Tensor) else value


@cache
def _empty(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    def empty(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return empty


def _same_start(base: Tensor, view: Any) -> bool:
    # Of some operations that are called views, such as `contiguous`, the result may be a copy.
    return (
        isinstance(view, Tensor)
        and view.dtype == base.dtype
        and view.untyped_storage()._cdata == base.untyped_storage()._cdata
        and view.storage_offset() == base.storage_offset()
    )


def recorder() -> Recorder | None:
    """Where launches of this thread are to be noted."""
    return _of_thread.recorder


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one. Triton launches there, wherever the tensors are."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()
