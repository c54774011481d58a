"""What every operator asks of its tensors, for the fake kernels and the reference alike.

`mulki.functional` has checked all of it with better messages; this is for direct calls of
`torch.ops.mulki`. Ranks and sizes can be checked while tracing, values cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _want(name: str, value: Tensor, fits: bool, wanted: str) -> None:
    _check(ValueError, fits, lambda: f"{name}: got shape {list(value.shape)}, wanted {wanted}")


def _want_dtype(name: str, value: Tensor, wanted: torch.dtype) -> None:
    _check(TypeError, value.dtype == wanted, lambda: f"{name}: got {value.dtype}, wanted {wanted}")


def _check(error: type[Exception], fits: bool, message: Callable[[], str]) -> None:
    # torch's own check, which symbolic sizes need, imports sympy at its first use.
    if not isinstance(fits, bool):
        torch._check_with(error, fits, message)
    elif not fits:
        raise error(message())


def operands(x: Tensor, w: Tensor, prefix: str = "") -> None:
    """Features [N, D] and P >= 1 prototypes [P, D] of one dtype."""
    _matrices(x, w, prefix)
    _want(f"{prefix}w", w, w.shape[0] > 0, "at least one row")


def _matrices(x: Tensor, w: Tensor, prefix: str = "") -> None:
    _want(f"{prefix}x", x, x.ndim == 2, "[N, D]")
    _want(f"{prefix}w", w, w.ndim == 2, "[P, D]")
    _want(f"{prefix}w", w, w.shape[1] == x.shape[1], f"[P, {x.shape[1]}] as x has that width")
    _want_dtype(f"{prefix}w", w, x.dtype)


def number(name: str, value: Tensor) -> None:
    """A 0-d tensor."""
    _want(name, value, value.ndim == 0, "a 0-d tensor")


def pairs(x: Tensor, w: Tensor, scale: Tensor) -> None:
    """N >= 0 operands whose rows match one to one."""
    _matrices(x, w)
    _want("w", w, w.shape[0] == x.shape[0], f"[{x.shape[0]}, {x.shape[1]}] as x has")
    number("scale", scale)


def biased(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> None:
    """N >= 0 rows against P >= 0, and what turns products into logits."""
    _matrices(x, w)
    number("scale", scale)
    number("bias", bias)


def labels(x: Tensor, w: Tensor, target: Tensor | None, class_mask: Tensor | None) -> None:
    """int64 targets [N] and a bool class mask [P]."""
    if target is not None:
        _want("target", target, target.ndim == 1, "[N]")
        _want("target", target, target.shape[0] == x.shape[0], f"[{x.shape[0]}]")
        _want_dtype("target", target, torch.int64)
    if class_mask is not None:
        _want("class_mask", class_mask, class_mask.ndim == 1, "[P]")
        _want("class_mask", class_mask, class_mask.shape[0] == w.shape[0], f"[{w.shape[0]}]")
        _want_dtype("class_mask", class_mask, torch.bool)


def teachers(
    x: Tensor,
    w: Tensor,
    teacher_x: Sequence[Tensor],
    teacher_w: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor | None,
) -> None:
    """K >= 1 teachers with as many rows and prototypes as the student, and weights [N, K]."""
    k = len(teacher_x)
    _check(ValueError, k > 0, lambda: "teacher_x: got none, wanted at least one teacher")
    _check(
        ValueError,
        len(teacher_w) == k,
        lambda: f"teacher_x: got {k} teachers, but {len(teacher_w)} teacher_w; wanted as many",
    )
    _want("teacher_scales", teacher_scales, teacher_scales.shape == (k,), f"[{k}]")
    for i, (u, v) in enumerate(zip(teacher_x, teacher_w, strict=True)):
        operands(u, v, f"teacher {i} ")
        _want(f"teacher {i} x", u, u.shape[0] == x.shape[0], f"[{x.shape[0]}, D]")
        _want(f"teacher {i} w", v, v.shape[0] == w.shape[0], f"[{w.shape[0]}, D]")
    if weights is not None:
        _want("weights", weights, weights.ndim == 2, "[N, K]")
        _want("weights", weights, weights.shape[0] == x.shape[0], f"[{x.shape[0]}, {k}]")
        _want("weights", weights, weights.shape[1] == k, f"[{x.shape[0]}, {k}]")


def gate(gate_label: float, weights: Tensor | None, target: Tensor | None) -> None:
    """A target where the gate looks at one."""
    _check(
        ValueError,
        weights is not None or gate_label == 0 or target is not None,
        lambda: "target: got None, wanted [N] class indices for a gate on the label",
    )


def class_mask_values(class_mask: Tensor | None) -> None:
    """At least one class takes part. Reads the mask."""
    if class_mask is not None and not class_mask.any():
        raise ValueError("class_mask: masks every class, wanted at least one True")


def target_values(
    target: Tensor, p: int, class_mask: Tensor | None, ignore_index: int | None = None
) -> None:
    """Targets in [0, P), of classes that take part, or `ignore_index`. Reads them."""
    if target.numel() == 0:
        return
    low, high = (int(value) for value in target.aminmax())
    if low >= 0 and high < p and class_mask is None:
        return
    used = target if ignore_index is None else target[target != ignore_index]
    if used.numel() == 0:
        return
    low, high = (int(value) for value in used.aminmax())
    if low < 0 or high >= p:
        raise ValueError(
            f"target: got values from {low} to {high}, wanted class indices in [0, {p})"
            + ("" if ignore_index is None else f" or ignore_index={ignore_index}")
        )
    if class_mask is not None and not class_mask[used].all():
        masked = int(used[~class_mask[used]][0])
        raise ValueError(
            f"target: holds class {masked}, which class_mask excludes; unmask it or leave its rows "
            f"out"
        )
