"""pair_kl: loss_i = (row_i + column_i) / 2, the divergence of a student from K teachers over pairs.

z = s U W^T of image features U and text features W, both [N, D]. row_i is `teacher_kl` of image i
over all texts, column_i that of text i over all images, so both directions come from one set of
products for each model. Where a gate looks at a label, that is the row's or the column's own pair.
Weights, divergences and entropies are [2, N, K]: of the rows, then of the columns. Gradient for
upstream gradients g: G_ij = 1/2 (g_i R_ij + g_j C_ij), with R and C the G of teacher_kl over rows
and over columns.

With `labels` there are two losses, that of `contrastive` of the same student and this one: the
losses that open_clip distils with. They come with the gradient of their sum. Where the two have
other upstream gradients, that is no help, and the gradients are computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mulki.ops import checks, contrastive, direct, teacher_kl
from mulki.ops.arguments import refuse_transforms, scalar
from mulki.ops.autograd import refuse_double_backward, scaled
from mulki.ops.contrastive import Contrastive
from mulki.ops.gates import Weighting
from mulki.ops.logits import Operands, wide
from mulki.ops.namespaces import PUBLIC, TAGS
from mulki.ops.operators import OPERATORS
from mulki.ops.registry import define
from mulki.ops.teacher_kl import TeacherKl


class PairKl(NamedTuple):
    image_features: Tensor  # [N, D]
    text_features: Tensor  # [N, D]
    logit_scale: Tensor  # 0-d
    teacher_image_features: Sequence[Tensor]  # K of [N, D_k]
    teacher_text_features: Sequence[Tensor]  # K of [N, D_k]
    teacher_scales: Tensor  # [K]
    weights: Tensor | None = None  # [2, N, K]; None: those of the gate
    temperature: float = 1.0
    gate_temperature: float = 1.0
    gate_entropy: float = 0.0
    gate_label: float = 0.0
    scale_by_t2: bool = True
    labels: bool = False


def check(x: PairKl, *, values: bool = True) -> None:
    contrastive.check(Contrastive(*x[:3]))
    checks.positive("temperature", x.temperature)
    checks.positive("gate_temperature", x.gate_temperature)
    names = "teacher_image_features", "teacher_text_features"
    teacher_kl.check_teachers(x[:2], x[3:6], names)
    if x.weights is not None:
        checks.shape("weights", x.weights, _of_sides(x))
        checks.on_device("weights", x.weights, x.image_features.device)


def _of_sides(x: PairKl) -> tuple[int, int, int]:
    return 2, x.image_features.shape[0], len(x.teacher_image_features)


def reference(x: PairKl) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification, differentiable in the loss.

    Returns:
        loss [N], with labels [2, N]; kl, weights, entropy [2, N, K].
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
    loss = loss.sum(0) / 2
    if x.labels:
        loss = torch.stack([contrastive.reference(Contrastive(*x[:3]))[0], loss])
    return loss, kl, used, entropy


define(
    "pair_kl",
    PairKl,
    check=check,
    reference=reference,
    rows=lambda x: (2, x.image_features.shape[0]) if x.labels else x.image_features.shape[:1],
    details=lambda x: [_of_sides(x)] * 3,
    results=3,
    factor_of_weights=0.5,
)


@torch.no_grad()
def _gradients(stored: Sequence[Tensor], *args: Any) -> tuple[Tensor, ...]:
    x, (grad, reduction, wanted) = OPERATORS["pair_kl"].split(args)
    assert grad is not None
    # A GPU is waited for here, so `mulki.losses` asks for both losses in one on the CPU alone.
    if grad[0] == grad[1]:
        return tuple(
            scaled(grad[0], gradient, leaf) if want else leaf.new_empty(0)
            for leaf, gradient, want in zip(x[:3], stored, wanted, strict=True)
        )
    found: tuple[Tensor, ...] = torch.ops.mulki.pair_kl(*x, grad, reduction, wanted)[-3:]
    return found


def _fake_gradients(stored: Sequence[Tensor], *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        leaf.new_empty(leaf.shape if want else 0)
        for leaf, want in zip(args[:3], args[-1], strict=True)
    )


# The backward of both losses in one: `stored` are the gradients of their sum, grad is [2]. What it
# does depends on a value, so it is one operator for who traces it.
PUBLIC.define(
    "pair_kl_gradients(Tensor[] stored, "
    + OPERATORS["pair_kl"].schema[1:].rpartition("->")[0].replace("Tensor? grad", "Tensor grad")
    + "-> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
PUBLIC.impl("pair_kl_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("mulki::pair_kl_gradients", _fake_gradients, lib=PUBLIC)
refuse_double_backward("pair_kl_gradients", "mulki::pair_kl")


def loss(
    student: Operands,  # image features [N, D], text features [N, D], scale
    teachers: Sequence[Operands],
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,  # [2, N, K], of any floating dtype
    weighting: Weighting,  # where weights are not given
    reduction: str,
    labels: bool = False,
) -> tuple[Tensor, ...]:
    """The sum, the mean over pairs, or a loss per pair [N]; then kl, weights, entropy [2, N, K].

    With `labels` the loss is [2] or [2, N]: that of `contrastive`, then that of this operator.
    Student and teachers of different dtypes, none of them float64, are promoted to a common one.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    refuse_transforms(student, *teachers, (weights,))
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
    options: Any = temperature, *weighting.numbers, scale_by_t2, labels
    x = PairKl(*of_student, *teacher_kl.stacked(others, images), weights, *options)
    return direct.call("pair_kl", x, reduction)[:4]
