"""pair_kl: loss_i = (row_i + column_i) / 2, the divergence of a student from K teachers over pairs.

z = s U W^T of image features U and text features W, both [N, D]. row_i is `teacher_kl` of image i
over all texts, column_i that of text i over all images, so both directions come from one set of
products for each model. Where a gate looks at a label, that is the row's or the column's own pair.
Weights, divergences and entropies are [2, N, K]: of the rows, then of the columns. Gradient for
upstream gradients g: G_ij = 1/2 (g_i R_ij + g_j C_ij), with R and C the G of teacher_kl over rows
and over columns.

`pair_kl_with_labels` computes the loss of `contrastive` beside it, of the same student: the loss
that open_clip distils with. Its two losses come with the gradient of their sum. Where the two have
other upstream gradients, that is no help, and the gradients are computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mulki.ops import checks, contrastive, direct, teacher_kl
from mulki.ops.arguments import (
    refuse_transforms,
    rounded,
    scalar,
    scalars,
    takes_reduced_form,
    wanted_gradients,
)
from mulki.ops.autograd import (
    asked,
    check_stored,
    may_give_away,
    multiplied,
    refuse_double_backward,
    register,
    save,
    saved,
    times,
)
from mulki.ops.gates import Gate
from mulki.ops.logits import Operands, logits, narrow, reduce, wide
from mulki.ops.registry import TAGS, backward_fake, define, library, reduced_fake

_MODELS = (
    "Tensor image_features, Tensor text_features, Tensor logit_scale, "
    "Tensor[] teacher_image_features, Tensor[] teacher_text_features, Tensor teacher_scales"
)
# The three numbers of the gate are read only where weights are not given.
_ARGUMENTS = (
    f"{_MODELS}, Tensor? weights, float temperature, float gate_temperature, float gate_entropy, "
    "float gate_label, bool scale_by_t2"
)
_NAMES = ("image_features", "text_features")


def check(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher_image_features: Sequence[Tensor],
    teacher_text_features: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor | None,
    temperature: float,
    gate_temperature: float,
    *_: object,
    values: bool = True,
) -> None:
    contrastive.check(image_features, text_features, logit_scale)
    checks.positive("temperature", temperature)
    checks.positive("gate_temperature", gate_temperature)
    teachers = teacher_image_features, teacher_text_features, teacher_scales
    names = "teacher_image_features", "teacher_text_features"
    teacher_kl.check_teachers(image_features, text_features, *teachers, names)
    if weights is not None:
        _check_weights(weights, image_features, len(teacher_image_features))


def _check_weights(weights: Tensor, image_features: Tensor, k: int) -> None:
    checks.shape("weights", weights, (2, image_features.shape[0], k))
    checks.on_device("weights", weights, image_features.device)


def check_backward(
    grad: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher_image_features: Sequence[Tensor],
    teacher_text_features: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor,
    lse: Tensor,
    temperature: float,
    *_: object,
    values: bool = True,
) -> None:
    student = image_features, text_features, logit_scale
    teachers = teacher_image_features, teacher_text_features, teacher_scales
    check(*student, *teachers, weights, temperature, 1.0)
    n, k = image_features.shape[0], len(teacher_image_features)
    for name, value, shape in (("grad", grad, (n,)), ("lse", lse, (2, 1 + k, n, 2))):
        checks.shape(name, value, shape)
        checks.on_device(name, value, image_features.device)


def check_reduced(*args: Any, values: bool = True) -> None:
    check(*args[:-2])


def fake(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher_image_features: Sequence[Tensor],
    *_: object,
) -> tuple[Tensor, ...]:
    n, k = image_features.shape[0], len(teacher_image_features)
    loss = image_features.new_empty(n, dtype=wide(image_features.dtype))
    return loss, *(loss.new_empty(2, n, k) for _ in range(3)), loss.new_empty(2, 1 + k, n, 2)


_fake_reduced = reduced_fake(fake, leaves=3, details=3)


def _fake_with_labels(*args: Any) -> tuple[Tensor, ...]:
    total, *rest = _fake_reduced(*args)
    return total.new_empty(2), *rest


def reference(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    teacher_image_features: Sequence[Tensor],  # K of [N, D_k]
    teacher_text_features: Sequence[Tensor],  # K of [N, D_k]
    teacher_scales: Tensor | Sequence[float],  # [K]
    weights: Tensor | None = None,  # [2, N, K]; None: those of the gate
    temperature: float = 1.0,
    gate_temperature: float = 1.0,
    gate_entropy: float = 0.0,
    gate_label: float = 0.0,
    scale_by_t2: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification, differentiable in the loss.

    Returns:
        loss [N]; kl, weights, entropy [2, N, K]; lse [2, 1 + K, N, 2], the logarithms of the sums
        of exponentials of z / T, over rows and columns, of the student and the teachers, each as
        two numbers (`contrastive.log_sum_exp`).
    """
    models = (
        *(image_features, text_features, logit_scale),
        *(teacher_image_features, teacher_text_features, teacher_scales),
    )
    options: list[Any] = [temperature, gate_temperature, gate_entropy, gate_label, scale_by_t2]
    sides = [teacher_kl.reference(*side, *options) for side in _sides(*models, weights)]
    loss, kl, used, entropy = (torch.stack(pair) for pair in zip(*sides, strict=True))
    return loss.sum(0) / 2, kl, used, entropy, _lse(*models, temperature)


def reference_backward(
    grad: Tensor,  # [N]
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher_image_features: Sequence[Tensor],
    teacher_text_features: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor,
    lse: Tensor,
    temperature: float,
    scale_by_t2: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    student = image_features, text_features, logit_scale
    teachers = teacher_image_features, teacher_text_features, teacher_scales
    sides = _sides(*student, *teachers, weights)
    gradients = []
    for (*models, used, _, class_mask), of_side in zip(
        sides, _wanted_of_sides(wanted), strict=True
    ):
        arguments: list[Any] = [
            grad / 2,
            *models,
            used,
            class_mask,
            temperature,
            scale_by_t2,
            of_side,
        ]
        gradients.append(teacher_kl.reference_backward(*arguments))
    return tuple(_joined(*gradients))


def reference_reduced(*args: Any) -> tuple[Tensor, ...]:
    *arguments, mean, wanted = args
    sides = [
        teacher_kl.reference_reduced(*side, *arguments[7:], mean, of_side)
        for side, of_side in zip(_sides(*arguments[:7]), _wanted_of_sides(wanted), strict=True)
    ]
    rows, columns = sides
    total, kl, used, entropy = map(torch.stack, zip(rows[:4], columns[:4], strict=True))
    gradients = (gradient / 2 for gradient in _joined(rows[4:], columns[4:]))
    return total.sum() / 2, kl, used, entropy, *gradients


def reference_with_labels(*args: Any) -> tuple[Tensor, ...]:
    *arguments, mean, wanted = args
    images, texts, scale = arguments[:3]
    labels, *of_labels = contrastive.reference_reduced(images, texts, scale, mean, wanted)
    total, kl, used, entropy, *of_teachers = reference_reduced(*args)
    gradients = (a + b for a, b in zip(of_labels, of_teachers, strict=True))
    return torch.stack([labels, total]), kl, used, entropy, *gradients


def _sides(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Sequence[Tensor],
    teacher_text_features: Sequence[Tensor],
    teacher_scales: Tensor | Sequence[float],
    weights: Tensor | None,
) -> list[tuple[Any, ...]]:
    # The arguments of teacher_kl over rows and over columns, up to its class mask.
    own = torch.arange(len(image_features), device=image_features.device)
    sides = (image_features, teacher_image_features), (text_features, teacher_text_features)
    return [
        (x, w, logit_scale, teacher_x, teacher_w, teacher_scales, given, own, None)
        for (x, teacher_x), (w, teacher_w), given in zip(
            sides, sides[::-1], (None, None) if weights is None else weights, strict=True
        )
    ]


def _wanted_of_sides(wanted: Sequence[bool]) -> tuple[Sequence[bool], Sequence[bool]]:
    images, texts, scale = wanted
    return wanted, [texts, images, scale]


def _joined(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> list[Tensor]:
    # The gradients of both sides, each of which has its own features first.
    texts, images, scale = columns
    return [a + b for a, b in zip(rows, (images, texts, scale), strict=True)]


@torch.no_grad()
def _lse(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Sequence[Tensor],
    teacher_text_features: Sequence[Tensor],
    teacher_scales: Tensor | Sequence[float],
    temperature: float,
) -> Tensor:  # [2, 1 + K, N, 2]
    student = image_features, text_features, logit_scale
    teachers = zip(teacher_image_features, teacher_text_features, teacher_scales, strict=True)
    z = torch.stack([logits(*model) for model in (student, *teachers)]) / temperature
    return torch.stack([contrastive.log_sum_exp(z, dim) for dim in (2, 1)])


_RESULTS = "Tensor, Tensor, Tensor, Tensor"
define(
    "pair_kl",
    # loss [N]; kl, weights, entropy [2, N, K]; lse [2, 1 + K, N, 2]
    f"({_ARGUMENTS}) -> ({_RESULTS}, Tensor)",
    check=check,
    fake=fake,
    reference=reference,
)
define(
    "pair_kl_backward",
    f"(Tensor grad, {_MODELS}, Tensor weights, Tensor lse, float temperature, bool scale_by_t2, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    check=check_backward,
    fake=backward_fake(leaves=3),
    reference=reference_backward,
)
define(
    "pair_kl_reduced",
    # the total; kl, weights, entropy [2, N, K]; gradients of image features, text features, scale
    f"({_ARGUMENTS}, bool mean, bool[3] wanted) -> ({_RESULTS}, Tensor, Tensor, Tensor)",
    check=check_reduced,
    fake=_fake_reduced,
    reference=reference_reduced,
)
define(
    "pair_kl_with_labels",
    # the totals of contrastive and of pair_kl [2]; the rest as of pair_kl_reduced, of their sum
    f"({_ARGUMENTS}, bool mean, bool[3] wanted) -> ({_RESULTS}, Tensor, Tensor, Tensor)",
    check=check_reduced,
    fake=_fake_with_labels,
    reference=reference_with_labels,
)

_WEIGHTS = 6
_LEAVES = (0, 1, 2, _WEIGHTS)


def _keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *student, images, texts, scales, weights, temperature = inputs[:8]
    _, kl, used, _, lse = outputs
    ctx.k = len(images)
    of_weights = (None, None) if weights is None else (weights, kl)
    tensors = *student, *images, *texts, scales, used, lse
    save(ctx, (*of_weights, *tensors, temperature, inputs[11]))


def _gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    weights, kl, *rest = saved(ctx)
    k = ctx.k
    models = *rest[:3], rest[3 : 3 + k], rest[3 + k : 3 + 2 * k]
    result: dict[int, Tensor] = {}
    wanted = list(ctx.needed[:3])
    if any(wanted):
        backward = torch.ops.mulki.pair_kl_backward
        result = asked(wanted, backward(grad, *models, *rest[3 + 2 * k :], wanted))
    if ctx.needed[_WEIGHTS]:
        result[_WEIGHTS] = times(grad.unsqueeze(1) / 2, kl, weights)
    return result


def _keep_reduced(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    kl, weights, mean = outputs[1], inputs[_WEIGHTS], inputs[-2]
    ctx.halves = 2 * (kl.shape[1] if mean else 1)
    of_weights = (None, None) if weights is None else (weights, kl)
    save(ctx, (*inputs[:3], *outputs[-3:], *of_weights))


def _reduced_gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    *values, weights, kl = saved(ctx)
    result = multiplied("pair_kl_reduced", ctx, grad, values[:3], values[3:])
    if ctx.needed[_WEIGHTS]:
        result[_WEIGHTS] = times(grad / ctx.halves, kl, weights)
    return result


def _keep_with_labels(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *student, images, texts, scales, _, temperature = inputs[:8]
    ctx.k = len(images)
    ctx.options = inputs[11:13]
    save(ctx, (*outputs[-3:], *student, *images, *texts, scales, outputs[2], temperature))


def _gradients_with_labels(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    values = saved(ctx)
    stored, student, rest = values[:3], values[3:6], values[6:]
    wanted = list(ctx.needed[:3])
    check_stored("pair_kl_with_labels", ctx, student, stored)
    if may_give_away(grad):
        return {i: g.to(student[i].dtype) for i, g in asked(wanted, stored).items()}
    models = *student, rest[: ctx.k], rest[ctx.k : 2 * ctx.k]
    backward = torch.ops.mulki.pair_kl_with_labels_backward
    return asked(wanted, backward(grad, stored, *models, *rest[2 * ctx.k :], *ctx.options, wanted))


@torch.no_grad()
def _with_labels_backward(
    grad: Tensor, stored: Sequence[Tensor], *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *models, weights, temperature, scale_by_t2, mean, wanted = args
    student = models[:3]
    of_labels, of_teachers = grad
    if of_labels == of_teachers:
        gradients = [of_labels * gradient for gradient in stored]
    else:
        forms = torch.ops.mulki.contrastive_reduced, torch.ops.mulki.pair_kl_reduced
        options = temperature, 1.0, 0.0, 0.0, scale_by_t2
        labels = forms[0](*student, mean, wanted)[-3:]
        teachers = forms[1](*models, weights, *options, mean, wanted)[-3:]
        gradients = [of_labels * a + of_teachers * b for a, b in zip(labels, teachers, strict=True)]
    dx, dw, dscale = gradients
    return narrow((dx, dw, dscale), student[0])


def _fake_with_labels_backward(
    grad: Tensor, stored: Sequence[Tensor], *args: Any
) -> tuple[Tensor, ...]:
    return tuple(backward_fake(leaves=3)(grad, *args))


library.define(
    # grad [2]; stored are the gradients of pair_kl_with_labels
    f"pair_kl_with_labels_backward(Tensor grad, Tensor[] stored, {_MODELS}, Tensor weights, "
    "float temperature, bool scale_by_t2, bool mean, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
library.impl("pair_kl_with_labels_backward", _with_labels_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mulki::pair_kl_with_labels_backward", _fake_with_labels_backward, lib=library
)
register("pair_kl", _LEAVES, _keep, _gradients)
register("pair_kl_reduced", _LEAVES, _keep_reduced, _reduced_gradients)
# Weights are constants here: what gives them a gradient is `pair_kl_reduced`.
register("pair_kl_with_labels", _LEAVES[:3], _keep_with_labels, _gradients_with_labels)
refuse_double_backward("pair_kl_backward")
refuse_double_backward("pair_kl_with_labels_backward")


def loss(
    student: Operands,  # image features [N, D], text features [N, D], scale
    teachers: Sequence[Operands],
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,  # [2, N, K], of any floating dtype
    gate: Gate,
    gate_numbers: tuple[float, float],  # a and b
    gate_temperature: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, the mean over pairs, or a loss per pair [N]; then kl, weights, entropy [2, N, K].

    Student and teachers of different dtypes, none of them float64, are promoted to a common one.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    leaves, arguments = _prepared(
        student, teachers, weights, gate, temperature, gate_temperature, *gate_numbers, scale_by_t2
    )
    if takes_reduced_form(reduction, *leaves, arguments[_WEIGHTS]):
        total, kl, used, entropy, *_ = direct.call(
            "pair_kl_reduced", *arguments, reduction == "mean", wanted_gradients(*leaves)
        )
        return total, kl, used, entropy
    rows, kl, used, entropy, _ = direct.call("pair_kl", *arguments)
    return reduce(rows, reduction), kl, used, entropy


def sums_with_labels(
    student: Operands,
    teachers: Sequence[Operands],
    temperature: float,
    gate: Gate,
    gate_numbers: tuple[float, float],
    gate_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of `contrastive` and of `pair_kl` (with the factor T^2); then weights, entropy.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    leaves, arguments = _prepared(
        student, teachers, None, gate, temperature, gate_temperature, *gate_numbers, True
    )
    sums, _, used, entropy, *_ = torch.ops.mulki.pair_kl_with_labels(
        *arguments, False, wanted_gradients(*leaves)
    )
    return *sums.unbind(), used, entropy


def _prepared(
    student: Operands,
    teachers: Sequence[Operands],
    weights: Tensor | None,
    gate: Gate,
    *options: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    # The leaves, and the arguments of the operators.
    refuse_transforms(student, *teachers, (weights,))
    models = teacher_kl.in_one_dtype([rounded(model, _NAMES) for model in (student, *teachers)])
    (images, texts, scale), *others = models
    if gate.weights is not None:
        # Before the function, which computes with them.
        contrastive.check(images, texts, scalar(scale, images))
        own = torch.arange(len(images), device=images.device)
        turned = [(w, x, s) for x, w, s in models]
        weights = torch.stack(
            [
                teacher_kl.gate_weights(gate, of_student, of_teachers, own, None)
                for of_student, *of_teachers in (models, turned)
            ]
        )
    elif weights is not None:
        weights = weights.to(wide(images.dtype))
    leaves = images, texts, scalar(scale, images)
    teacher_images, teacher_texts, scales = ([t[i] for t in others] for i in range(3))
    of_teachers = teacher_images, teacher_texts, scalars(scales, images)
    return leaves, (*leaves, *of_teachers, weights, *options)
