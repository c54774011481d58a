"""Operators: what the public functions compute, apart from how their arguments are checked.

`reference` is the specification of every operator. `torch.ops.mulki` holds the operators themselves
(`schemas`), their gradients (`autograd`) and the choice of a backend (`backends`): C++ on the CPU,
Triton on a GPU, the reference elsewhere. None may change a result beyond rounding. The functions
here have the signatures of the reference and choose the form of the operator: one that computes
its gradients together with a sum or a mean, or one that gives a loss per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mulki.ops import autograd as _autograd  # noqa: F401 - registers the gradients
from mulki.ops import router as _router  # noqa: F401 - registers the kernels
from mulki.ops.backends import Served, fallbacks, report, use_backend
from mulki.ops.gates import Gate
from mulki.ops.reference import reduce, wide

__all__ = [
    "Served",
    "contrastive",
    "fallbacks",
    "prototype_cross_entropy",
    "report",
    "siglip",
    "similarity",
    "teacher_kl",
    "use_backend",
]

_OPS = torch.ops.mulki
Operands = tuple[Tensor, Tensor, Tensor | float]  # features [N, D], prototypes [P, D], scale


def similarity(
    features: Tensor, prototypes: Tensor, scale: Tensor | float, normalize: bool = False
) -> Tensor:
    """s X W^T [N, P] in the dtype of X, the rows of both L2-normalised first if asked for."""
    _refuse_tangents(features, prototypes, scale)
    return _OPS.similarity(features, prototypes, _number(scale, features), normalize)


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor | float,
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """See `reference.prototype_cross_entropy`."""
    _refuse_tangents(features, prototypes, scale)
    leaves = features, prototypes, _number(scale, features)
    options = target, class_mask, label_smoothing, ignore_index
    if _with_gradients(reduction, *leaves):
        return _OPS.prototype_cross_entropy_reduced(
            *leaves, *options, reduction == "mean", _wanted(*leaves)
        )[0]
    loss = _OPS.prototype_cross_entropy(*leaves, *options)
    return reduce(loss, reduction, (target != ignore_index).sum())


@torch.no_grad()
def gate_weights(
    gate: Gate, teachers: Sequence[Operands], target: Tensor | None, class_mask: Tensor | None
) -> Tensor:
    """[N, K] of a gate that is not row-wise."""
    assert gate.weights is not None
    return gate.weights([(x, w, _number(s, x)) for x, w, s in teachers], target, class_mask)


def teacher_kl(
    student: Operands,
    teachers: Sequence[Operands],
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,
    gate: tuple[float, float],
    gate_temperature: float,
    target: Tensor | None,
    class_mask: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.teacher_kl`; kl, weights and entropy are not differentiable.

    Student and teachers of different dtypes, none of them float64, are promoted to a common one.
    """
    _refuse_tangents(*student, weights, *(value for teacher in teachers for value in teacher))
    dtype = student[0].dtype
    for teacher in teachers:
        if teacher[0].dtype != dtype:
            dtype = torch.promote_types(dtype, teacher[0].dtype)
    options = temperature, scale_by_t2, weights, gate, gate_temperature, target, class_mask
    if dtype == student[0].dtype and all(t[0].dtype == dtype for t in teachers):
        return _teacher_kl(student, teachers, *options, reduction)
    # A kernel takes one dtype. Rounding a teacher to the student's would be cheaper, but wrong.
    promoted = [(x.to(dtype), w.to(dtype), scale) for x, w, scale in (student, *teachers)]
    return _teacher_kl(promoted[0], promoted[1:], *options, reduction)


def _teacher_kl(
    student: Operands,
    teachers: Sequence[Operands],
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,
    gate: tuple[float, float],
    gate_temperature: float,
    target: Tensor | None,
    class_mask: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = student[0]
    if weights is not None:
        weights = weights.to(wide(x.dtype))
    leaves = x, student[1], _number(student[2], x)
    teacher_x, teacher_w, scales = ([t[i] for t in teachers] for i in range(3))
    operands = *leaves, teacher_x, teacher_w, _numbers(scales, x)
    options = weights, target, class_mask, temperature, gate_temperature, *gate, scale_by_t2
    if _with_gradients(reduction, *leaves, weights):
        loss, kl, used, entropy, *_ = _OPS.teacher_kl_reduced(
            *operands, *options, reduction == "mean", _wanted(*leaves)
        )
        return loss, kl, used, entropy
    loss, kl, used, entropy = _OPS.teacher_kl(*operands, *options)
    return reduce(loss, reduction, loss.shape[0]), kl, used, entropy


def contrastive(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    reduction: str,
) -> Tensor:
    """See `reference.contrastive`. A softmax does not see the bias, and its gradient is zero."""
    _refuse_tangents(image_features, text_features, logit_scale)
    leaves = image_features, text_features, _number(logit_scale, image_features)
    if _with_gradients(reduction, *leaves):
        loss = _OPS.contrastive_reduced(*leaves, reduction == "mean", _wanted(*leaves))[0]
    else:
        loss = _OPS.contrastive(*leaves)[0]
        loss = reduce(loss, reduction, loss.shape[0])
    if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
        loss = loss + 0 * _number(logit_bias, image_features)
    return loss


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    reduction: str,
    offset: int = 0,
) -> Tensor:
    """See `reference.siglip`."""
    _refuse_tangents(image_features, text_features, logit_scale, logit_bias)
    numbers = (_number(value, image_features) for value in (logit_scale, logit_bias))
    leaves = image_features, text_features, *numbers
    if _with_gradients(reduction, *leaves):
        return _OPS.siglip_reduced(*leaves, offset, reduction == "mean", _wanted(*leaves))[0]
    loss = _OPS.siglip(*leaves, offset)
    return reduce(loss, reduction, loss.shape[0])


def _refuse_tangents(*leaves: Tensor | float | None) -> None:
    # Autograd would drop them in silence, and the derivative would be zero.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for leaf in leaves:
        if isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None:
            raise RuntimeError(
                "forward-mode differentiation of mulki is not supported; use reverse mode"
            )


def _with_gradients(reduction: str, *leaves: Tensor | None) -> bool:
    # Gradients of a sum are computed with it; without any to compute, one pass over rows is less.
    return (
        reduction != "none"
        and torch.is_grad_enabled()
        and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    )


def _wanted(*leaves: Tensor) -> list[bool]:
    return [leaf.requires_grad for leaf in leaves]


def _number(value: Tensor | float, like: Tensor) -> Tensor:
    """A 0-d tensor of the wide dtype where `like` is; filling one does not wait for a GPU."""
    dtype = wide(like.dtype)
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=dtype, device=like.device)
    if value.dtype == dtype and value.device == like.device:
        return value
    return value.to(like.device, dtype)


def _numbers(values: Sequence[Tensor | float], like: Tensor) -> Tensor:
    """[K]."""
    first = values[0]
    if isinstance(first, Real) and all(isinstance(v, Real) and v == first for v in values):
        return torch.full((len(values),), float(first), dtype=wide(like.dtype), device=like.device)
    return torch.stack([_number(value, like) for value in values])
