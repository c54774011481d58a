"""The names of torch that are not public, each with the public way that it replaces.

A later torch may rename or change them. They are looked up here, once, at import. Where one is
missing, where torch is newer than the newest version that was tested, or with
MULKI_TORCH_PRIVATE=0, the public way is taken: the results are the same, small calls are slower.
Three things need the private names: gradients through vmap of a mean or sum, vmap of `ClipLoss` and
`SigLipLoss`, and float64 in activation checkpointing and under dispatch modes. `reason` says why,
and `mulki.info` shows it. MULKI_TORCH_PRIVATE=1 uses them with any torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

NEWEST_TESTED = (2, 15)


def _find() -> tuple[dict[str, Any], str | None]:
    """The private names by what they are for, or none of them and the reason."""
    setting = os.environ.get("MULKI_TORCH_PRIVATE", "")
    if setting == "0":
        return {}, "MULKI_TORCH_PRIVATE is 0"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version > NEWEST_TESTED and setting != "1":
        newest = ".".join(map(str, NEWEST_TESTED))
        return {}, f"torch {torch.__version__} is newer than {newest}, the newest that was tested"
    try:
        return {
            "keeps_graph": torch._C._autograd._get_current_graph_task_keep_graph,
            "modes": torch._C._len_torch_dispatch_stack,
            "is_functorch": torch._C._functorch.is_functorch_wrapped_tensor,
            "transform": torch._C._functorch.peek_interpreter_stack,
            "is_differentiated": torch._C._functorch.is_gradtrackingtensor,
            "unwrapped": torch._C._functorch.get_unwrapped,
            "is_batched": torch._C._functorch.is_legacy_batchedtensor,
            # The number changes, so what is kept is the module that has it.
            "forward_level": (forward_ad._current_level, forward_ad)[1],
            "check": torch._check_with,
            "excluded": torch._C._SetExcludeDispatchKeyGuard,
            "autograd_keys": (
                torch._C.DispatchKey.AutogradFunctionality,
                torch._C.DispatchKey.ADInplaceOrView,
            ),
        }, None
    except AttributeError as error:
        return {}, f"torch {torch.__version__} has no such name: {error}"


_private, _reason = _find()


def reason() -> str | None:
    """Why the public ways are taken, in one sentence; None where the private names are used."""
    return _reason


def has_cpu_kernel(operator: str) -> bool:
    """Whether `torch.ops.mulki_cpp` has a kernel of that name for CPU tensors.

    True where torch does not say; a call then fails if there is none.
    """
    overload = getattr(torch.ops.mulki_cpp, operator).default
    asked = getattr(overload, "has_kernel_for_dispatch_key", None)
    return asked is None or bool(asked("CPU"))


def check(error: type[Exception], fits: bool, message: Callable[[], str]) -> None:
    """Raise `error` unless `fits`, which may be a comparison of sizes that are not known yet.

    torch's own check turns such a comparison into a check at run time. The public way makes it a
    guard, with which sizes that depend on data do not compile.
    """
    # torch's check imports sympy at its first use, so it is left to sizes that are symbols.
    if "check" in _private and not isinstance(fits, bool):
        _private["check"](error, fits, message)
    elif not fits:
        raise error(message())


def forward_mode_may_be_on() -> bool:
    """Whether forward-mode differentiation is under way; True where torch does not say."""
    return not _private or _private["forward_level"]._current_level >= 0


def transform_is_active() -> bool:
    """Whether a transform of `torch.func` is under way; False where torch does not say."""
    return bool(_private) and _private["transform"]() is not None


def is_differentiated_by_transform(value: Tensor) -> bool:
    """Whether a transform of `torch.func` differentiates by it; False where torch does not say."""
    if "is_differentiated" not in _private:
        return False
    # Another transform, such as vmap, may have wrapped it again.
    while _private["is_functorch"](value):
        # What a transform computes with is wrapped too where nothing is differentiated by it.
        if _private["is_differentiated"](value) and value.requires_grad:
            return True
        value = _private["unwrapped"](value)
    return False


def is_plain(value: Tensor) -> bool:
    """Whether no subclass, transform or compiler stands for it; False where torch does not say."""
    return (
        # Compiled autograd makes one graph of the backward, where what follows would break it; that
        # of torch 2.11 does not even know whether a dict is empty.
        not torch.compiler.is_compiling()
        and bool(_private)
        and type(value) is Tensor
        and not _private["is_functorch"](value)
        and not _private["is_batched"](value)
    )


def has_values(value: Tensor) -> bool:
    """Whether values can be read: there are some, and nothing that compiles or captures is on."""
    return (
        not torch.compiler.is_compiling()
        and type(value) in (Tensor, nn.Parameter)
        and not value.is_meta
        and not (_private and _private["is_functorch"](value))
        and not (value.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def is_last_plain_backward(grad: Tensor) -> bool:
    """Whether nothing will use the graph after this backward pass, and nothing watches it.

    Stored gradients may then be given away, not copied. Without the private names this is never
    known, and False.
    """
    return (
        is_plain(grad)
        and not torch.is_grad_enabled()
        and not _private["keeps_graph"]()
        and not _private["modes"]()
    )


def nothing_listens() -> bool:
    """Whether no compiler, mode, transform or forward-mode differentiation sees what is computed.

    False where torch does not say.
    """
    return (
        not torch.compiler.is_compiling()
        and bool(_private)
        and _private["modes"]() == 0
        and _private["transform"]() is None
        and _private["forward_level"]._current_level < 0
    )


Tensors = tuple[Tensor, ...]


def _same(value: Tensor) -> Tensor:
    return value


def vjp(
    function: Callable[..., tuple[Tensor, Tensors]], *leaves: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensors], Tensors]:
    """`torch.func.vjp` with `has_aux`, inside an operator, where torch has turned autograd off.

    The public way fails under a dispatch mode, and under hooks of saved tensors, as activation
    checkpointing has.
    """
    if not _private:
        found: Any = torch.func.vjp(function, *leaves, has_aux=True)
        return found  # type: ignore[no-any-return]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for key in _private["autograd_keys"]:
            stack.enter_context(_private["excluded"](key, False))
        # The graph ends inside the operator: hooks of the one around it are not for its tensors.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        given = [leaf.detach().requires_grad_() for leaf in leaves]
        value, by_products = function(*given)

    def pull(grad: Tensor) -> Any:
        return torch.autograd.grad(value, given, grad)

    return value.detach(), pull, tuple(one.detach() for one in by_products)
