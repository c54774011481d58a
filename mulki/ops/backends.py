"""Which backend serves an operator, and why the better ones do not; and the call of its kernel.

CPU tensors go to the C++ kernels (`cpp`), all others, as of CUDA (also HIP) and XPU, to the Triton
ones (`triton`) where a proof says that they are right and faster there (`mulki.ops.proofs`), and
whatever those do not serve to plain PyTorch in blocks of bounded memory (`chunked`). The reference
is for float64, unless `chunked` is forced, and for tests.

`MULKI_BACKEND` (auto, triton, cpp, chunked, reference) and `use_backend` force one.
`MULKI_STRICT=1`, or any other value but the empty one and 0, turns a fallback into a RuntimeError.
Both variables are read at every call.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mulki.ops import checks, prepared, proofs, torch_private
from mulki.ops.logits import autocasting
from mulki.ops.operators import OPERATORS, Arguments, Operator, Request

# From the arguments and what is asked to the results.
Kernel = Callable[[Arguments, Request], tuple[Tensor, ...]]

NAMES = ("auto", "triton", "cpp", "chunked", "reference")
CANDIDATES = {"cpu": ("cpp", "chunked")}
ELSEWHERE = ("triton", "chunked")


@dataclass(frozen=True)
class PlainPyTorch:
    """Serves all operators on any device, by the function `run` of a module."""

    module: str

    def why_not(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve `op`, in one sentence, or None when it can."""
        return None

    def kernel(self, op: str) -> Kernel:
        """The kernel of `op`; ask `why_not` first."""
        return functools.partial(importlib.import_module(self.module).run, OPERATORS[op])


@dataclass(frozen=True)
class CppKernel:
    """A kernel of csrc/."""

    overload: Callable[..., tuple[Tensor, ...]]  # torch.ops.mulki_cpp.<op>, with gradients

    def __call__(self, x: Arguments, request: Request) -> tuple[Tensor, ...]:
        return self.overload(*x, *request)


@dataclass(frozen=True)
class TritonKernel:
    """A kernel of kernels/, whose small calls are kept."""

    function: Kernel

    def __call__(self, x: Arguments, request: Request) -> tuple[Tensor, ...]:
        return self.function(x, request)


class Cpp:
    """The C++ kernels of csrc/, for CPU tensors."""

    def why_not(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cpu":
            return f"serves CPU tensors, not {device_type}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes float32, bfloat16 and float16, not {dtype}"
        try:
            reason: str | None = importlib.import_module("mulki.ops.loader").load()
        except Exception as error:
            return _reason(error)
        if reason is None and not torch_private.has_cpu_kernel(op):
            return f"the library has no kernel for {op}"
        return reason

    def kernel(self, op: str) -> Kernel:
        return CppKernel(getattr(torch.ops.mulki_cpp, op).default)


class Triton:
    """The Triton kernels of kernels/, for GPUs; on CPU tensors in Triton's interpreter alone."""

    def why_not(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on CPU tensors in Triton's interpreter alone; set TRITON_INTERPRET=1"
        try:
            lookup = importlib.import_module("mulki.kernels.lookup")
            reason: str | None = lookup.why_not(op, device_type, dtype)
            return reason
        except Exception as error:
            return _reason(error)

    def kernel(self, op: str) -> Kernel:
        return TritonKernel(importlib.import_module("mulki.kernels.lookup").kernel(op))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


BACKENDS: dict[str, Triton | Cpp | PlainPyTorch] = {
    "triton": Triton(),
    "cpp": Cpp(),
    "chunked": PlainPyTorch("mulki.ops.chunked"),
    "reference": PlainPyTorch("mulki.ops.reference"),
}


class Served(NamedTuple):
    """Who serves an operator for one device type, dtype and size of calls."""

    op: str
    device_type: str  # or one device, as "cuda:1"
    dtype: torch.dtype
    backend: str
    rejected: dict[str, str]  # the better backends, and why they do not serve it
    size: str | None = None  # one of `proofs.SIZES`; None for all


class _Forced:
    """One use of `use_backend`: an object of its own, since two may name the same backend."""

    def __init__(self, name: str):
        self.name = name


_forced: tuple[_Forced, ...] = ()  # the one entered last is in force
_forcing_lock = threading.Lock()
# Kernels, and why those that should serve in their place fail to.
_kernels: dict[tuple[Any, ...], tuple[Kernel, str | None]] = {}
_fallbacks: dict[tuple[str, str, torch.dtype, str], Served] = {}


def call(operator: Operator, *args: Any) -> tuple[Tensor, ...]:
    """Check the arguments of an operator and call the kernel that serves them.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError, ValueError: see `kernel`.
    """
    x, request = operator.split(args)
    known = None
    if prepared.calls:  # then a Triton kernel has served
        known = _key_of(operator, args)
        kept = prepared.calls.get(known[0])
        if callable(kept):
            if x[0].is_cpu:
                check(operator, x, request, values=request.grad is None)  # it reads values
            return prepared.again(kept, known[1])
    # Before its gradients are asked for, the values were read in the forward pass.
    check(operator, x, request, values=request.grad is None)
    features, prototypes = x[:2]
    kind = features.device.type
    # Only the Triton kernels serve some sizes and not others, and calls with gradients or without.
    sized = "triton" in CANDIDATES.get(kind, ELSEWHERE)
    size = proofs.size_of(len(features), len(prototypes)) if sized else None
    gradients = any(request.wanted) if sized else None
    device = str(features.device) if sized else kind
    found = kernel(operator.name, device, features.dtype, size, gradients)
    if not autocasting(kind):
        return found(x, request)
    # Operands are rounded before the operator; inside, autocast would round the logits.
    with torch.autocast(kind, enabled=False):
        return found(x, request)


def _key_of(operator: Operator, args: Sequence[Any]) -> tuple[prepared.Key, list[Tensor]]:
    # All that the choice of a kernel depends on, and what the kernels do.
    return prepared.key_of(args, operator.name, _setting(), *proofs.settings())


def check(operator: Operator, x: Arguments, request: Request, values: bool) -> None:
    """Raise where arguments, or what is asked, do not fit.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for place in operator.tensors:
        if x[place] is None:  # which the dispatcher takes for a tensor
            raise TypeError(f"{x._fields[place]}: got None, wanted a tensor")
    operator.check(x, values=values)
    checks.choice("reduction", request.reduction, operator.reductions)
    if len(request.wanted) != operator.leaves:
        raise ValueError(f"wanted: got {len(request.wanted)}, wanted {operator.leaves} of bool")
    if request.grad is None:
        # Of a matrix nobody wants the gradient of the sum.
        if any(request.wanted) and "sum" not in operator.reductions:
            raise ValueError("grad: got None, wanted the upstream gradient of the matrix")
    else:
        rows = operator.rows(x)
        checks.shape("grad", request.grad, rows if request.reduction == "none" else rows[:-1])
        checks.on_device("grad", request.grad, x[0].device)


def kernel(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    size: str | None = None,
    gradients: bool | None = None,
) -> Kernel:
    """The kernel that serves `op` for tensors of this device type and dtype.

    Args:
        device_type: or one device, as "cuda:1", since cards of one machine may differ.
        size: of the call, see `proofs.SIZES`; None where no Triton kernel may serve it.
        gradients: whether the call makes them; None asks for a kernel of both kinds of calls.

    Raises:
        RuntimeError: a backend that should serve it does not, under MULKI_STRICT.
        ValueError: MULKI_BACKEND names no backend.
    """
    setting = _setting()
    # A proof is of how float32 is multiplied, too.
    numbers = None if size is None else proofs.settings()
    key = (op, device_type, dtype, size, gradients, setting, numbers)
    found = _kernels.get(key)
    if found is None:
        served = choose(op, device_type, dtype, setting, size, gradients)
        fallback = None
        if served.rejected:
            # What is slower is no failure to serve.
            if not all(why.startswith(proofs.SLOWER) for why in served.rejected.values()):
                reasons = "; ".join(f"{name}: {why}" for name, why in served.rejected.items())
                fallback = (
                    f"MULKI_STRICT: mulki::{op} for {device_type} tensors of {dtype} falls back to "
                    f"{served.backend} ({reasons}); unset MULKI_STRICT to allow it"
                )
                _refuse_if_strict(fallback)
            _fallbacks.setdefault((op, device_type, dtype, setting), served)
            why = served.rejected.get("triton", "")
            if proofs.WRONG in why:
                warnings.warn(f"mulki::{op}: the Triton kernel {why}", stacklevel=2)
        found = _kernels[key] = BACKENDS[served.backend].kernel(op), fallback
    serving, fallback = found
    if fallback is not None:
        _refuse_if_strict(fallback)
    return serving


def _refuse_if_strict(fallback: str) -> None:
    if os.environ.get("MULKI_STRICT", "") not in ("", "0"):
        raise RuntimeError(fallback)


def _setting() -> str:
    forced = _forced
    return forced[-1].name if forced else os.environ.get("MULKI_BACKEND", "auto")


def forget_choices() -> None:
    """Choose anew at the next calls: a proof was made, or the environment has changed."""
    _kernels.clear()
    prepared.forget()


def share_proofs(group: Any = None) -> None:
    """Have all ranks take the same kernels: those that the first rank's proofs allow.

    All ranks of the group call it, best before the first loss. A rank whose GPU, driver or versions
    are not those of the first rank then takes no Triton kernel.

    Args:
        group: a process group of torch.distributed; None for the default one.
    """
    proofs.share(group)
    forget_choices()


def choose(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    setting: str = "auto",
    size: str | None = None,
    gradients: bool | None = None,
) -> Served:
    """The first backend that serves `op`, among the candidates or after the forced one.

    The Triton kernels serve unasked only what `mulki prove` has shown on this GPU. A setting that
    is none of NAMES is a ValueError.
    """
    checks.choice("MULKI_BACKEND", setting, NAMES)
    if dtype == torch.float64 and setting != "chunked":
        return Served(op, device_type, dtype, "reference", {})
    names = CANDIDATES.get(device_type, ELSEWHERE) if setting == "auto" else (setting,)
    rejected: dict[str, str] = {}
    for name in names:
        reason = BACKENDS[name].why_not(op, device_type, dtype)
        if reason is None and name == "triton" and setting == "auto":
            reason = proofs.why_not(op, device_type, dtype, size, gradients)
        if reason is None:
            return Served(op, device_type, dtype, name, rejected, size)
        rejected[name] = reason
    return Served(op, device_type, dtype, "chunked", rejected, size)


def use_backend(name: str) -> AbstractContextManager[None]:
    """A context in which `name` serves the operators: auto, triton, cpp, chunked or reference.

    It holds for the whole process, since autograd runs backward passes in threads of its own, and
    takes precedence over MULKI_BACKEND. Of several contexts, in whatever threads, the one entered
    last is in force. `triton` on CPU tensors needs TRITON_INTERPRET=1.

    Raises:
        ValueError: there is no such backend.
    """
    checks.choice("name", name, NAMES)
    return _forcing(name)


@contextmanager
def _forcing(name: str) -> Iterator[None]:
    global _forced
    entry = _Forced(name)
    with _forcing_lock:
        _forced = (*_forced, entry)
    # TRITON_INTERPRET, by which Triton serves CPU tensors or does not, may have changed.
    forget_choices()
    try:
        yield
    finally:
        # Threads need not leave in the order in which they came.
        with _forcing_lock:
            _forced = tuple(one for one in _forced if one is not entry)


def report() -> list[Served]:
    """Who serves every operator in float32 and bfloat16 on every device type that is here.

    On a GPU the sizes of calls are told apart, since proofs do, and calls are
    reported as in training. Where no GPU is, "cuda" is reported all the same: it says why the
    Triton kernels are not used.
    """
    available = {"cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available()}
    gpus = [device_type for device_type, here in available.items() if here] or ["cuda"]
    setting = _setting()

    return [
        _explain(choose(op, device_type, dtype, setting, size, True), setting)
        for device_type in ("cpu", *gpus)
        for op in OPERATORS
        for dtype in (torch.float32, torch.bfloat16)
        for size in ([None] if device_type == "cpu" else proofs.SIZES)
    ]


def _explain(served: Served, setting: str) -> Served:
    # A backend that was not asked because another is forced is a better one without a reason yet.
    names = CANDIDATES.get(served.device_type, ELSEWHERE)
    better = (*names, "reference")
    place = better.index(served.backend) if served.backend in better else 0
    unasked = {
        name: f"{setting} is forced" for name in names[:place] if name not in served.rejected
    }
    return served._replace(rejected={**served.rejected, **unasked})


def fallbacks() -> list[Served]:
    """The fallbacks that have happened in this process, each once."""
    return list(_fallbacks.values())
