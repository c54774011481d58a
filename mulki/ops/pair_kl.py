"""pair_kl: loss_i = (row_i + column_i) / 2, the divergence of a student from K teachers over pairs.

z = s U W^T of image features U and text features W, both [N, D]. row_i is `teacher_kl` of image i
over all texts, column_i that of text i over all images, so both directions come from one set of
products for each model. Where a gate looks at a label, that is the row's or the column's own pair.
Weights, divergences and entropies are [2, N, K]: of the rows, then of the columns. Gradient for
upstream gradients g: G_ij = 1/2 (g_i R_ij + g_j C_ij), with R and C the G of teacher_kl over rows
and over columns.

With a `label_weight` there is that of `contrastive` of the same student besides, from the same
products: the losses that open_clip distils with, loss_i = weight (row_i + column_i) / 2 +
label_weight contrastive_i. The losses of `contrastive` alone are one more detail, `labels` [N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mulki.ops import calls, checks, contrastive, teacher_kl
from mulki.ops.arguments import scalar
from mulki.ops.autograd import known
from mulki.ops.contrastive import Contrastive
from mulki.ops.gates import Weighting
from mulki.ops.logits import Operands, product, wide
from mulki.ops.registry import define
from mulki.ops.teacher_kl import TeacherKl


class PairKl(NamedTuple):
    image_features: Tensor  # [N, D]
    text_features: Tensor  # [N, D]
    logit_scale: Tensor  # 0-d
    teacher_image_features: Sequence[Tensor]  # K of [N, D_k]
    teacher_text_features: Sequence[Tensor]  # K of [N, D_k]
    teacher_scales: Sequence[Tensor]  # K, each 0-d
    weights: Tensor | None = None  # [2, N, K]; None: those of the gate
    temperature: float = 1.0
    gate_temperature: float = 1.0
    gate_entropy: float = 0.0
    gate_label: float = 0.0
    scale_by_t2: bool = True
    weight: float = 1.0
    label_weight: float = 0.0


def check(x: PairKl, *, values: bool = True) -> None:
    contrastive.check(Contrastive(*x[:3]))
    checks.temperature("temperature", x.temperature)
    checks.temperature("gate_temperature", x.gate_temperature)
    checks.finite_number("weight", x.weight)
    checks.finite_number("label_weight", x.label_weight)
    names = "teacher_image_features", "teacher_text_features"
    teacher_kl.check_teachers(x[:2], x[3:6], names)
    if x.weights is not None:
        checks.shape("weights", x.weights, _of_sides(x))
        checks.on_device("weights", x.weights, x.image_features.device)


def _of_sides(x: PairKl) -> tuple[int, int, int]:
    return 2, x.image_features.shape[0], len(x.teacher_image_features)


def reference(x: PairKl) -> tuple[Tensor, ...]:
    """The specification, differentiable in the loss.

    Returns:
        loss [N]; kl, weights, entropy [2, N, K]; labels [N], or [0] where their weight is 0.
    """
    own = torch.arange(len(x.image_features), device=x.image_features.device)
    rows = x.image_features, x.text_features, x.logit_scale
    columns = x.text_features, x.image_features, x.logit_scale
    teachers = x.teacher_image_features, x.teacher_text_features
    options: Any = x.temperature, x.gate_temperature, x.gate_entropy, x.gate_label, x.scale_by_t2
    sides = [
        teacher_kl.reference(
            TeacherKl(*student, *of, x.teacher_scales, weights, own, None, *options)
        )
        for student, of, weights in zip(
            (rows, columns),
            (teachers, teachers[::-1]),
            (None, None) if x.weights is None else x.weights,
            strict=True,
        )
    ]
    loss, kl, used, entropy = (torch.stack(pair) for pair in zip(*sides, strict=True))
    loss, labels = loss.sum(0) * (x.weight / 2), loss.new_empty(0)
    if x.label_weight:
        (labels,) = contrastive.reference(Contrastive(*x[:3]))
        loss = loss + labels * x.label_weight
    return loss, kl, used, entropy, labels.detach()


def formula(x: PairKl, reduction: str, details: bool) -> tuple[Tensor, ...]:
    """The sum, or the mean over pairs, and the details, by the fewest operations.

    For training on few logits: the gradient by the student's logits is computed with the loss.
    """
    z = product(x.image_features, x.text_features, x.logit_scale)
    t2 = x.temperature**2 if x.scale_by_t2 else 1.0
    with torch.no_grad():
        models = [z / x.temperature]
        teachers = zip(
            x.teacher_image_features, x.teacher_text_features, x.teacher_scales, strict=True
        )
        for images, texts, scale in teachers:
            models.append(product(images, texts, scale / x.temperature))
        own = torch.arange(len(z), device=z.device) if x.gate_label else None
        given = (None, None) if x.weights is None else x.weights
        sides = [
            teacher_kl.divergences(models, dim, x, weights, own, details)
            for dim, weights in zip((1, 0), given, strict=True)
        ]
        kl = torch.stack([side[0] for side in sides])
        weights = torch.stack([side[1] for side in sides])
        total = (weights * kl).sum() * (x.weight * t2 / 2)
        g = sides[0][3].add_(sides[1][3]).mul_(x.weight * t2 / (2 * x.temperature))
        labels = kl.new_empty(0)
        if x.label_weight:
            log_q, log_p = torch.log_softmax(z, 1), torch.log_softmax(z, 0)
            labels = (log_q.diagonal() + log_p.diagonal()) / -2
            total = total + labels.sum() * x.label_weight
            g.add_(log_q.exp_().add_(log_p.exp_()), alpha=x.label_weight / 2)
            g.diagonal().sub_(x.label_weight)
    total = known(z, total, g, x[:3])
    if x.weights is not None and x.weights.requires_grad:
        # Adds zero, with the gradient kl.
        total = total + ((x.weights - x.weights.detach()) * kl).sum() * (x.weight * t2 / 2)
    if reduction == "mean":
        total = total / len(z)
    if not details:
        return (total,)
    entropy = torch.stack([side[2] for side in sides if side[2] is not None])
    return total, kl * t2, weights, entropy, labels


def _of_labels(x: PairKl) -> tuple[int, ...]:
    return tuple(x.image_features.shape[:1]) if x.label_weight else (0,)


define(
    "pair_kl",
    PairKl,
    check=check,
    reference=reference,
    details=lambda x: [_of_sides(x)] * 3 + [_of_labels(x)],
    results=4,
    formula=formula,
    factor_of_weights=lambda x: x.weight / 2,
)


def loss(
    student: Operands,  # image features [N, D], text features [N, D], scale
    teachers: Sequence[Operands],
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,  # [2, N, K], of any floating dtype
    weighting: Weighting,  # where weights are not given
    reduction: str,
    weight: float = 1.0,
    label_weight: float = 0.0,
    details: bool = True,
) -> tuple[Tensor, ...]:
    """The sum, the mean over pairs, or a loss per pair [N]; then the details.

    Without `details` these may be missing.
    They are kl, weights and entropy [2, N, K], and with a `label_weight` the losses of
    `contrastive` [N]. Student and teachers of different dtypes, none of them float64, are promoted
    to a common one.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    models = teacher_kl.in_one_dtype(student, teachers)
    (images, texts, scale), *others = models
    of_student = Contrastive(images, texts, scalar(scale, images))
    if weighting.gate.weights is not None:
        # Before the function, which computes with them.
        contrastive.check(of_student)
        own = torch.arange(images.shape[0], device=images.device)
        turned = [(w, x, s) for x, w, s in models]
        weights = torch.stack(
            [
                teacher_kl.gate_weights(weighting.gate, first, rest, own, None)
                for first, *rest in (models, turned)
            ]
        )
    elif weights is not None:
        weights = weights.to(wide(images.dtype))
    options: Any = temperature, *weighting.numbers, scale_by_t2, weight, label_weight
    x = PairKl(*of_student, *teacher_kl.in_lists(others, images), weights, *options)
    return calls.call("pair_kl", x, reduction, details)[:5]
