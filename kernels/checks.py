"""What keeps a direct call of an operator from reading where it must not.

`mulki.functional` has checked all of it and says more. Values of targets and masks are not read:
that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _want(name: str, got: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name}: got {got}, wanted {wanted}")


def shape(name: str, value: Tensor | None, wanted: Sequence[int]) -> None:
    """A tensor of this shape, or none at all."""
    if value is not None:
        _want(name, f"shape {list(value.shape)}", tuple(value.shape) == tuple(wanted), str(wanted))


def _beside(name: str, value: Tensor, x: Tensor) -> None:
    _want(name, value.device, value.device == x.device, f"{x.device} as x has")


def _matrices(x: Tensor, w: Tensor, name: str = "") -> None:
    """x [N, D] and w [P >= 1, D], on one device."""
    _want(f"{name}x", f"shape {list(x.shape)}", x.ndim == 2, "[N, D]")
    fits = w.ndim == 2 and w.shape[0] > 0 and w.shape[1] == x.shape[1]
    _want(f"{name}w", f"shape {list(w.shape)}", fits, f"[P, {x.shape[1]}] with P > 0")
    if w.dtype != x.dtype:
        raise TypeError(f"{name}w: got {w.dtype}, wanted {x.dtype} as x has; cast one to the other")
    _beside(f"{name}w", w, x)


def operands(x: Tensor, w: Tensor, scale: Tensor) -> None:
    """x [N, D], w [P >= 1, D] and a 0-d scale, on one device."""
    _matrices(x, w)
    _want("scale", f"shape {list(scale.shape)}", scale.numel() == 1, "a 0-d tensor")
    _beside("scale", scale, x)


def pairs(x: Tensor, w: Tensor, *numbers: Tensor) -> None:
    """x and w [N, D], and 0-d numbers."""
    _want("x", f"shape {list(x.shape)}", x.ndim == 2, "[N, D]")
    shape("w", w, x.shape)
    if x.shape[0] > 0:
        for number in numbers:
            operands(x, w, number)


def biased(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> None:
    """x [N, D], w [P, D], and 0-d numbers; N and P may be zero."""
    if w.ndim == 2 and w.shape[0] == 0:
        _want("x", f"shape {list(x.shape)}", x.ndim == 2, "[N, D]")
        shape("w", w, (0, x.shape[1]))
    else:
        operands(x, w, scale)
        operands(x, w, bias)


def labels(x: Tensor, w: Tensor, target: Tensor | None, class_mask: Tensor | None) -> None:
    """int64 targets [N] and a bool mask [P], on the device of x."""
    shape("target", target, x.shape[:1])
    shape("class_mask", class_mask, w.shape[:1])
    for name, value, dtype in (
        ("target", target, torch.int64),
        ("class_mask", class_mask, torch.bool),
    ):
        if value is not None:
            if value.dtype != dtype:
                raise TypeError(f"{name}: got {value.dtype}, wanted {dtype}")
            _beside(name, value, x)


def teachers(
    x: Tensor,
    w: Tensor,
    teacher_x: Sequence[Tensor],
    teacher_w: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor | None,
) -> None:
    """K >= 1 teachers with the student's rows, and weights [N, K]."""
    k = len(teacher_x)
    _want("teacher_x", "no teachers", k > 0, "at least one")
    _want("teacher_w", f"{len(teacher_w)} tensors", len(teacher_w) == k, f"{k} as teacher_x has")
    shape("teacher_scales", teacher_scales, (k,))
    _beside("teacher_scales", teacher_scales, x)
    shape("weights", weights, (x.shape[0], k))
    if weights is not None:
        _beside("weights", weights, x)
    for i, (u, v) in enumerate(zip(teacher_x, teacher_w, strict=True)):
        _matrices(u, v, f"teacher {i} ")
        _beside(f"teacher {i} x", u, x)
        _want(f"teacher {i} x", f"{u.shape[0]} rows", u.shape[0] == x.shape[0], f"{x.shape[0]}")
        _want(f"teacher {i} w", f"{v.shape[0]} rows", v.shape[0] == w.shape[0], f"{w.shape[0]}")


def gate(gate_label: float, weights: Tensor | None, target: Tensor | None) -> None:
    """A target where the gate looks at one."""
    fits = weights is not None or gate_label == 0 or target is not None
    _want("target", None, fits, "[N] class indices for a gate on the label")
