"""The operators' schemas, and fake kernels by which tracing learns shapes and dtypes.

N samples, P prototypes, D width, K teachers; x [N, D] features, w [P, D] prototypes, both float32,
bfloat16 or float16 (float64 through the reference alone), z = scale x w^T. "Wide" is float64 for
float64 inputs and float32 otherwise. scale and bias are wide 0-d tensors on the device of x,
teacher_scales [K] likewise; weights [N, K], target [N] int64, class_mask [P] bool.

An operator comes in up to three forms:

    name            one loss per row, [N] wide, and by-products, which are not differentiable
    name_backward   from an upstream gradient per row to those of x and w (in their dtype), scale
                    and bias (0-d, wide)
    name_reduced    the sum, or the mean, and its gradients, all of them wide: a loss scaler must
                    act before a gradient is rounded to half precision

`wanted` says which gradients are computed; one that is not comes back empty, of shape [0]. Nothing
is mutated and no result aliases an argument. Arguments may have any strides. What a `name_reduced`
returns behind the loss may become the gradient of a leaf, memory and all (`mulki.ops.autograd`):
who keeps it beyond a backward pass clones it.

Each is defined in two namespaces: `mulki`, whose kernels choose a backend (`mulki.ops.router`), and
`mulki_cpp`, whose CPU kernels are in csrc/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from mulki.ops import checks
from mulki.ops.reference import wide

_OPERANDS = "Tensor x, Tensor w, Tensor scale"
_BIASED = f"{_OPERANDS}, Tensor bias, int offset"
_LABELS = "Tensor target, Tensor? class_mask, float label_smoothing, int ignore_index"
_TEACHERS = "Tensor[] teacher_x, Tensor[] teacher_w, Tensor teacher_scales"
_TEACHER_KL = (
    f"{_OPERANDS}, {_TEACHERS}, Tensor? weights, Tensor? target, Tensor? class_mask, "
    "float temperature, float gate_temperature, float gate_entropy, float gate_label, "
    "bool scale_by_t2"
)
_THREE = "(Tensor, Tensor, Tensor)"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

SCHEMAS = {
    "similarity": f"({_OPERANDS}, bool normalize) -> Tensor",  # [N, P], dtype of x
    "similarity_backward": (
        f"(Tensor grad, {_OPERANDS}, bool normalize, bool[3] wanted) -> {_THREE}"
    ),
    "prototype_cross_entropy": f"({_OPERANDS}, {_LABELS}) -> Tensor",  # 0 where ignored
    "prototype_cross_entropy_backward": (
        f"(Tensor grad, {_OPERANDS}, {_LABELS}, bool[3] wanted) -> {_THREE}"
    ),
    # total, dx, dw, dscale; the mean is over rows that are not ignored
    "prototype_cross_entropy_reduced": (
        f"({_OPERANDS}, {_LABELS}, bool mean, bool[3] wanted) -> {_FOUR}"
    ),
    # loss [N]; kl, weights, entropy [N, K]. The gate's numbers are read only where
    # weights is None. The weights that come back are a copy.
    "teacher_kl": f"({_TEACHER_KL}) -> {_FOUR}",
    "teacher_kl_backward": (
        f"(Tensor grad, {_OPERANDS}, {_TEACHERS}, Tensor weights, Tensor? class_mask, "
        f"float temperature, bool scale_by_t2, bool[3] wanted) -> {_THREE}"
    ),
    # total; kl, weights, entropy; dx, dw, dscale
    "teacher_kl_reduced": f"({_TEACHER_KL}, bool mean, bool[3] wanted) -> {_SEVEN}",
    # loss_i = (row_lse_i + column_lse_i) / 2 - z_ii, row_lse, column_lse; all [N]
    "contrastive": f"({_OPERANDS}) -> {_THREE}",
    "contrastive_backward": (
        f"(Tensor grad, {_OPERANDS}, Tensor row_lse, Tensor column_lse, bool[3] wanted) -> {_THREE}"
    ),
    "contrastive_reduced": f"({_OPERANDS}, bool mean, bool[3] wanted) -> {_FOUR}",
    # Row i matches column i + offset, or none where that is not in [0, P); N and P may be zero.
    "siglip": f"({_BIASED}) -> Tensor",
    "siglip_backward": f"(Tensor grad, {_BIASED}, bool[4] wanted) -> {_FOUR}",
    # total, dx, dw, dscale, dbias
    "siglip_reduced": f"({_BIASED}, bool mean, bool[4] wanted) -> {_FIVE}",
}

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

library = Library("mulki", "DEF")
_cpp = Library("mulki_cpp", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=TAGS)
    _cpp.define(_name + _schema, tags=TAGS)
# grad * stored in the dtype of `like`: the backward of an operator that stored its gradients.
library.define("scaled(Tensor grad, Tensor stored, Tensor like) -> Tensor", tags=TAGS)


Fake = Callable[..., Any]


def _gradients(leaves: Sequence[Tensor], wanted: Sequence[bool], narrow: bool) -> list[Tensor]:
    # `leaves` are x, w and the numbers. Those of x and w have the dtype of x, if `narrow`.
    x = leaves[0]
    dtypes = [x.dtype if narrow and leaf.ndim else wide(x.dtype) for leaf in leaves]
    return [
        x.new_empty(leaf.shape if asked else (0,), dtype=dtype)
        for leaf, dtype, asked in zip(leaves, dtypes, wanted, strict=True)
    ]


def _backward(leaves: int) -> Fake:
    def fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(_gradients(args[:leaves], args[-1], narrow=True))

    return fake


def _reduced(rows: Fake, leaves: int, details: int) -> Fake:
    def fake(*args: Any) -> tuple[Tensor, ...]:
        out = rows(*args[:-2])
        loss, *rest = out if isinstance(out, tuple) else (out,)
        gradients = _gradients(args[:leaves], args[-1], narrow=False)
        return loss.new_empty(()), *rest[:details], *gradients

    return fake


def _similarity(x: Tensor, w: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    checks.operands(x, w)
    checks.number("scale", scale)
    return x.new_empty((x.shape[0], w.shape[0]))


def _prototype_cross_entropy(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    checks.operands(x, w)
    checks.number("scale", scale)
    checks.labels(x, w, target, class_mask)
    return x.new_empty(x.shape[0], dtype=wide(x.dtype))


def _teacher_kl(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teacher_x: Sequence[Tensor],
    teacher_w: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor | None,
    target: Tensor | None,
    class_mask: Tensor | None,
    temperature: float,
    gate_temperature: float,
    gate_entropy: float,
    gate_label: float,
    scale_by_t2: bool,
) -> tuple[Tensor, ...]:
    checks.operands(x, w)
    checks.number("scale", scale)
    checks.teachers(x, w, teacher_x, teacher_w, teacher_scales, weights)
    checks.gate(gate_label, weights, target)
    checks.labels(x, w, target, class_mask)
    loss = x.new_empty(x.shape[0], dtype=wide(x.dtype))
    return loss, *(loss.new_empty((x.shape[0], len(teacher_x))) for _ in range(3))


def _contrastive(x: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    checks.pairs(x, w, scale)
    return tuple(x.new_empty(x.shape[0], dtype=wide(x.dtype)) for _ in range(3))


def _siglip(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    checks.biased(x, w, scale, bias)
    return x.new_empty(x.shape[0], dtype=wide(x.dtype))


def _scaled(grad: Tensor, stored: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=like.dtype)


FAKES: dict[str, Fake] = {
    "similarity": _similarity,
    "similarity_backward": _backward(3),
    "prototype_cross_entropy": _prototype_cross_entropy,
    "prototype_cross_entropy_backward": _backward(3),
    "prototype_cross_entropy_reduced": _reduced(_prototype_cross_entropy, 3, 0),
    "teacher_kl": _teacher_kl,
    "teacher_kl_backward": _backward(3),
    "teacher_kl_reduced": _reduced(_teacher_kl, 3, 3),
    "contrastive": _contrastive,
    "contrastive_backward": _backward(3),
    "contrastive_reduced": _reduced(_contrastive, 3, 0),
    "siglip": _siglip,
    "siglip_backward": _backward(4),
    "siglip_reduced": _reduced(_siglip, 4, 0),
    "scaled": _scaled,
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"mulki::{_name}", _fake, lib=library)
