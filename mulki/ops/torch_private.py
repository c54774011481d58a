"""The names of torch that are not public, each with the public way that it replaces.

A later torch may rename or change them. They are looked up here, once, at import. Where one is
missing, where torch is newer than the newest version that was tested, or with
MULKI_TORCH_PRIVATE=0, the public way is taken: the results are the same, small calls are slower.
`reason` says why, and `mulki.info` shows it. MULKI_TORCH_PRIVATE=1 uses them with any torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
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
            "after_autograd": torch._C._after_autograd_keyset,
            "highest_key": torch._C.DispatchKeySet.highestPriorityTypeId,
            "redispatch": torch._ops.OpOverload.redispatch,
            "below_autograd": torch._C._AutoDispatchBelowAutograd,
            "cpu_key": torch._C.DispatchKey.CPU,
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


def forward_mode_is_off() -> bool:
    """Whether no forward-mode differentiation is under way; False where torch does not say."""
    return "forward_level" in _private and _private["forward_level"]._current_level < 0


def transform_is_active() -> bool:
    """Whether a transform of `torch.func` is under way; False where torch does not say."""
    return "transform" in _private and _private["transform"]() is not None


def is_differentiated_by_transform(value: Tensor) -> bool:
    """Whether a transform of `torch.func` differentiates by it; False where torch does not say."""
    if "is_differentiated" not in _private:
        return False
    # Another transform, such as vmap, may have wrapped it again.
    while _private["is_functorch"](value):
        if _private["is_differentiated"](value):
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


def is_watched() -> bool:
    """Whether a mode or a transform sees calls of operators; True where torch does not say."""
    return not _private or _private["modes"]() != 0 or _private["transform"]() is not None


# Keeps for the backward what it needs: of ctx, the inputs and the outputs.
Keep = Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]
# From ctx and the gradient of the first output to gradients by the position of their input.
Gradients = Callable[[Any, Tensor], dict[int, Tensor]]


def register_autograd(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    leaves: Sequence[int],
    keep: Keep,
    gradients: Gradients,
) -> None:
    """Give the operator `mulki::name` its gradients, those of the inputs `leaves`.

    `torch.library.register_autograd` is the public way. It walks through schema and arguments at
    every call, which for the fifteen arguments and the lists of teacher_kl takes longer than the
    kernel on a small batch. The private way calls `kernel`, the operator below autograd, itself.
    """
    if not _private:
        _register_publicly(library, name, keep, gradients)
        return
    overload = getattr(torch.ops.mulki, name).default

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        rest = keyset & _private["after_autograd"]
        with _private["below_autograd"]():
            # Nothing is between here and the kernel, a mode or a transform for example: the
            # dispatcher would do the same, and takes longer for it.
            if _private["highest_key"](rest) == _private["cpu_key"]:
                return kernel(*args)
            return _private["redispatch"](overload, rest, *args)

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        output = below(keyset, args)
        _set_up(ctx, args, output, keep)
        ctx.needed = ctx.needs_input_grad[1:]
        return output

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        return None, *_by_position(ctx, grad, gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"mulki_{name}", (torch.autograd.Function,), methods)

    def differentiable(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            args[i] is not None and args[i].requires_grad for i in leaves
        ):
            return function.apply(keyset, *args)
        return below(keyset, args)

    library.impl(name, differentiable, "Autograd", with_keyset=True)


def _register_publicly(
    library: torch.library.Library, name: str, keep: Keep, gradients: Gradients
) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _set_up(ctx, inputs, output, keep)
        ctx.lists = {i: len(value) for i, value in enumerate(inputs) if _is_tensors(value)}

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        ctx.needed = ctx.needs_input_grad
        result: list[Any] = _by_position(ctx, grad, gradients)
        for position, length in ctx.lists.items():
            result[position] = [None] * length
        return tuple(result)

    torch.library.register_autograd(
        f"mulki::{name}", backward, setup_context=setup_context, lib=library
    )


def _is_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Any, keep: Keep) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.mark_non_differentiable(*outputs[1:])
    # Autograd would otherwise make zeros of the shapes of those.
    ctx.set_materialize_grads(False)
    ctx.count = len(inputs)
    keep(ctx, inputs, outputs)


def _by_position(ctx: Any, grad: Tensor | None, gradients: Gradients) -> list[Tensor | None]:
    result: list[Tensor | None] = [None] * ctx.count
    if grad is not None:
        for position, gradient in gradients(ctx, grad).items():
            result[position] = gradient
    return result
