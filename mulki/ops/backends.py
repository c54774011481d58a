"""Which backend serves an operator, and why the better ones do not; and the call of its kernel.

CPU tensors go to the C++ kernels (`cpp`). All others, as of CUDA (also HIP) and XPU, go to the
Triton ones (`triton`) from the size on from which `mulki doctor --kernels` has seen them win on
this GPU (`mulki.ops.wins`). Whatever those do not serve is plain PyTorch in blocks of bounded
memory (`chunked`). The reference is for float64, unless `chunked` is forced, and for tests.

`MULKI_BACKEND` (auto, triton, cpp, chunked, reference) and `use_backend` force one.
`MULKI_STRICT=1`, or any other value but the empty one and 0, turns a fallback into a RuntimeError.
Both are read at import, and when a `use_backend` begins or ends; see `read_environment`.
"""

from __future__ import annotations

import importlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mulki.ops import checks, loader, torch_private, wins
from mulki.ops.logits import autocasting
from mulki.ops.operators import OPERATORS, Arguments, Operator, Request

# From the arguments and what is asked to the results.
Kernel = Callable[[Arguments, Request], tuple[Tensor, ...]]

NAMES = ("auto", "triton", "cpp", "chunked", "reference")
CANDIDATES = {"cpu": ("cpp", "chunked")}
ELSEWHERE = ("triton", "chunked")


@dataclass(frozen=True)
class PlainKernel:
    """An operator in plain PyTorch, by a module of mulki/ops."""

    module: ModuleType
    operator: Operator

    def __call__(self, x: Arguments, request: Request) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.module.run(self.operator, x, request)
        return found

    def at_once(self, x: Arguments, reduction: str, details: bool) -> tuple[Tensor, ...] | None:
        """The loss in training and the details, without the dispatcher, where that is possible."""
        at_once: Callable[..., tuple[Tensor, ...] | None] = self.module.at_once
        return at_once(self.operator, x, reduction, details)


@dataclass(frozen=True)
class PlainPyTorch:
    """Serves all operators on any device."""

    module: str

    def why_not(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve `op`, in one sentence, or None when it can."""
        return None

    def kernel(self, op: str) -> Kernel:
        """The kernel of `op`; ask `why_not` first."""
        return PlainKernel(importlib.import_module(self.module), OPERATORS[op])


@dataclass(frozen=True)
class CppKernel:
    """A kernel of csrc/."""

    overload: Callable[..., tuple[Tensor, ...]]  # torch.ops.mulki_cpp.<op>, with gradients

    def __call__(self, x: Arguments, request: Request) -> tuple[Tensor, ...]:
        return self.overload(*x, *request)


class Cpp:
    """The C++ kernels of csrc/, for CPU tensors."""

    def why_not(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cpu":
            return f"serves CPU tensors, not {device_type}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes float32, bfloat16 and float16, not {dtype}"
        reason = loader.load()
        if reason is None and not torch_private.has_cpu_kernel(op):
            return f"the library has no kernel for {op}"
        return reason

    def kernel(self, op: str) -> Kernel:
        return CppKernel(getattr(torch.ops.mulki_cpp, op).default)


class Triton:
    """The Triton kernels of kernels/, for GPUs; on CPU tensors in Triton's interpreter alone."""

    def why_not(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        try:
            lookup = importlib.import_module("mulki.kernels.lookup")
            reason: str | None = lookup.why_not(op, device_type, dtype)
            return reason
        except Exception as error:  # of a Triton that does not fit
            return f"{type(error).__name__}: {error}"

    def kernel(self, op: str) -> Kernel:
        found: Kernel = importlib.import_module("mulki.kernels.lookup").kernel(op)
        return found


BACKENDS: dict[str, Triton | Cpp | PlainPyTorch] = {
    "triton": Triton(),
    "cpp": Cpp(),
    "chunked": PlainPyTorch("mulki.ops.chunked"),
    "reference": PlainPyTorch("mulki.ops.reference"),
}


class Served(NamedTuple):
    """Who serves an operator for one device type and dtype."""

    op: str
    device_type: str
    dtype: torch.dtype
    backend: str
    rejected: dict[str, str]  # the better backends, and why they do not serve it
    least: float = 0  # logits of a call, N times P; `chunked` serves smaller ones

    @property
    def who(self) -> str:
        """The backend in words."""
        return f"{self.backend} from {self.least} logits on" if self.least else self.backend

    @property
    def reasons(self) -> str:
        """The better backends and why they do not serve, in words; empty where there are none."""
        return "; ".join(f"{name}: {why}" for name, why in self.rejected.items())


# By operator, device type and dtype: the kernel of calls with at least so many logits, and that of
# smaller ones.
_Kernels = dict[tuple[str, str, torch.dtype], tuple[Kernel, float, Kernel]]
_Settings = tuple[str, bool, bool]  # the backend, whether strict, whether Triton interprets

_lock = threading.Lock()
_forced: tuple[tuple[object, str], ...] = ()  # the one entered last is in force
_settings: _Settings
_kernels: _Kernels  # those of the settings
_kernels_by_settings: dict[_Settings, _Kernels] = {}
_fallbacks: dict[tuple[str, str, torch.dtype, str], Served] = {}


def read_environment() -> None:
    """Take MULKI_BACKEND, MULKI_STRICT and TRITON_INTERPRET as they are now.

    That happens at import, and when a `use_backend` begins or ends. Who sets them later calls this.
    """
    global _settings, _kernels
    backend = _forced[-1][1] if _forced else os.environ.get("MULKI_BACKEND", "auto")
    strict = os.environ.get("MULKI_STRICT", "") not in ("", "0")
    _settings = (backend, strict, os.environ.get("TRITON_INTERPRET") == "1")
    _kernels = _kernels_by_settings.setdefault(_settings, {})


def forget_choices() -> None:
    """Choose anew at the next calls, and by the environment as it is now."""
    _kernels_by_settings.clear()
    read_environment()


def share_kernels(group: Any = None) -> None:
    """Have all ranks take the same kernels, see `mulki.ops.wins.share`.

    All ranks of the group call it, once, before the first loss.

    Args:
        group: a process group of torch.distributed; None for the default one.
    """
    wins.share(group)
    forget_choices()


def call(operator: Operator, *args: Any) -> tuple[Tensor, ...]:
    """Check the arguments of an operator and call the kernel that serves them.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError, ValueError: see `kernel`.
    """
    x, request = operator.split(args)
    # Before its gradients are asked for, the values were read in the forward pass.
    check(operator, x, request, values=request.grad is None)
    features, prototypes = x[:2]
    kind = features.device.type
    found = kernel(operator.name, kind, features.dtype, len(features) * len(prototypes))
    if not autocasting(kind):
        return found(x, request)
    # Operands are rounded before the operator; inside, autocast would round the logits.
    with torch.autocast(kind, enabled=False):
        return found(x, request)


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


def kernel(op: str, device_type: str, dtype: torch.dtype, logits: float = math.inf) -> Kernel:
    """The kernel that serves `op` for tensors of this device type and dtype.

    Args:
        logits: of the call, N times P.

    Raises:
        RuntimeError: a backend that should serve it does not, under MULKI_STRICT.
        ValueError: MULKI_BACKEND names no backend.
    """
    found = _kernels.get((op, device_type, dtype))
    if found is None:
        found = _chosen(op, device_type, dtype)
    large, least, small = found
    return large if logits >= least else small


def may_be_triton(op: str, features: Tensor) -> bool:
    """Whether a Triton kernel may serve calls with these features; compiled code leaves it open.

    Raises:
        RuntimeError, ValueError: see `kernel`.
    """
    if features.is_cpu and not _settings[2]:
        return False
    if torch.compiler.is_compiling():
        return True
    found = kernel(op, features.device.type, features.dtype)
    return not isinstance(found, (CppKernel, PlainKernel))


def _chosen(op: str, device_type: str, dtype: torch.dtype) -> tuple[Kernel, float, Kernel]:
    (setting, strict, _), kernels = _settings, _kernels  # which another thread may change
    served = choose(op, device_type, dtype, setting)
    if served.rejected:
        if strict:
            raise RuntimeError(
                f"MULKI_STRICT: mulki::{op} for {device_type} tensors of {dtype} falls back to "
                f"{served.backend} ({served.reasons}); unset MULKI_STRICT to allow it"
            )
        _fallbacks.setdefault((op, device_type, dtype, setting), served)
    found = BACKENDS[served.backend].kernel(op), served.least, BACKENDS["chunked"].kernel(op)
    kernels[op, device_type, dtype] = found
    return found


def choose(op: str, device_type: str, dtype: torch.dtype, setting: str | None = None) -> Served:
    """The first backend that serves `op`, among the candidates or after the forced one.

    Unasked the Triton kernels serve only where they have been seen to win. That they have not is no
    fallback, and no reason is given; `report` gives it.

    Args:
        setting: one of NAMES; None for the one in force.

    Raises:
        ValueError: the setting is none of NAMES.
    """
    setting = _settings[0] if setting is None else setting
    checks.choice("MULKI_BACKEND", setting, NAMES)
    if dtype == torch.float64 and setting != "chunked":
        return Served(op, device_type, dtype, "reference", {})
    names = _candidates(op, device_type, setting)
    rejected: dict[str, str] = {}
    for name in names:
        least = 0.0
        if name == "triton" and setting == "auto":
            least, _ = wins.least(op, device_type, dtype)
            if least == math.inf:
                continue
        reason = BACKENDS[name].why_not(op, device_type, dtype)
        if reason is None:
            return Served(op, device_type, dtype, name, rejected, least)
        rejected[name] = reason
    return Served(op, device_type, dtype, "chunked", rejected)


def _candidates(op: str, device_type: str, setting: str) -> tuple[str, ...]:
    names = CANDIDATES.get(device_type, ELSEWHERE) if setting == "auto" else (setting,)
    # On the CPU similarity is plain PyTorch by design.
    return ("chunked",) if "cpp" in names and op == "similarity" else names


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """A context in which `name` serves the operators: auto, triton, cpp, chunked or reference.

    It holds for the whole process, since autograd runs backward passes in threads of its own, and
    takes precedence over MULKI_BACKEND. Of several contexts, in whatever threads, the one entered
    last is in force. `triton` on CPU tensors needs TRITON_INTERPRET=1.

    Raises:
        ValueError: there is no such backend.
    """
    global _forced
    checks.choice("name", name, NAMES)
    entry = object(), name  # two may name the same backend
    with _lock:
        _forced = (*_forced, entry)
        read_environment()
    try:
        yield
    finally:
        # Threads need not leave in the order in which they came.
        with _lock:
            _forced = tuple(one for one in _forced if one is not entry)
            read_environment()


def report() -> list[Served]:
    """Who serves every operator in float32 and bfloat16 on every device type that is here.

    Where no GPU is, "cuda" is reported all the same: it says why the Triton kernels are not used.

    Raises:
        ValueError: MULKI_BACKEND names no backend.
    """
    available = {"cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available()}
    gpus = [device_type for device_type, here in available.items() if here] or ["cuda"]
    return [
        _explained(choose(op, device_type, dtype))
        for device_type in ("cpu", *gpus)
        for op in OPERATORS
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _explained(served: Served) -> Served:
    # With a reason for each better backend that was not asked.
    better = (*_candidates(served.op, served.device_type, "auto"), "reference")
    place = better.index(served.backend) if served.backend in better else 0
    reasons = dict(served.rejected)
    for name in better[:place]:
        if _settings[0] != "auto":
            reasons.setdefault(name, f"{_settings[0]} is forced")
        elif name not in reasons:
            where = served.op, served.device_type, served.dtype
            reasons[name] = BACKENDS[name].why_not(*where) or wins.least(*where)[1]
    return served._replace(rejected=reasons)


def fallbacks() -> list[Served]:
    """The fallbacks that have happened in this process, each once."""
    return list(_fallbacks.values())


read_environment()
