"""The losses as functions.

Every function takes unreduced rows of features and checks its arguments; the operators behind it
are defined in `mulki.ops.reference`. Shapes: N samples, P prototypes (class texts, class means),
D feature width, K teachers.

Under autocast, features and prototypes are rounded to the autocast dtype; everything after that
is computed in float32. Losses come back in float32 (float64 for float64 inputs).

Types, shapes and devices are always checked. The values of `target` and `class_mask` are checked in
eager mode on the CPU alone: reading them elsewhere would wait for the GPU or break `torch.compile`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import reference
from mulki.similarity import Similarity, check_number, check_operands

Reduction = Literal["none", "sum", "mean"]
Gate = Literal["uniform", "confidence", "label", "discrepancy"]

REDUCTIONS = ("none", "sum", "mean")
GATES = ("uniform", "confidence", "label", "discrepancy")


class TeacherDetails(NamedTuple):
    """By-products of `teacher_kl`, none of them differentiable."""

    # [N, K], KL of each teacher, with the T^2 factor if that was asked for. A difference of
    # logarithms: near zero rounding can make it negative by some 1e-7 in float32.
    kl: Tensor
    weights: Tensor  # [N, K]
    entropy: Tensor  # [N, K], entropy of each teacher's distribution, in nats


def prototype_similarity(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor | float = 1.0,
    *,
    normalize: bool = False,
) -> Tensor:
    """The matrix ``scale * features @ prototypes.T``.

    Args:
        features: [N, D].
        prototypes: [P, D], same dtype and device.
        scale: a float or a 0-d tensor.
        normalize: L2-normalise the rows of both first, so that the entries are scaled cosines.

    Returns:
        [N, P] in the dtype of the features (the autocast dtype under autocast); gradients flow to
        features, prototypes and scale.

    Raises:
        TypeError, ValueError: as `Similarity`.
    """
    s = Similarity(features, prototypes, scale)
    if not normalize:
        return s.materialize()
    features, prototypes, scale = s.operands()
    wide = torch.promote_types(features.dtype, torch.float32)
    rows, columns = (F.normalize(x.to(wide), dim=1) for x in (features, prototypes))
    return reference.similarity(rows, columns, scale).to(features.dtype)


def prototype_cross_entropy(
    similarity: Similarity,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of the softmax over prototypes against hard targets.

    Equals ``torch.nn.functional.cross_entropy(similarity.materialize(), target, ...)`` without
    rounding the logits.

    Args:
        similarity: [N, P] logits.
        target: [N] int64 class indices in [0, P), or `ignore_index`.
        label_smoothing: in [0, 1]; the mass is spread over the classes that take part.
        class_mask: [P] bool, True for the classes that take part; a masked class has probability
            zero and no gradient.
        ignore_index: rows with this target count for nothing.
        reduction: "mean" (over rows not ignored), "sum", or "none" for [N].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_similarity("similarity", similarity)
    n, p = similarity.shape
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_real("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, wanted a number in [0, 1]")
    _check_class_mask(class_mask, p, similarity.device)
    _check_target(target, n, p, similarity.device, class_mask, ignore_index)
    return reference.prototype_cross_entropy(
        *similarity.operands(), target, class_mask, label_smoothing, ignore_index, reduction
    )


@overload
def teacher_kl(
    student: Similarity,
    teachers: Sequence[Similarity],
    *,
    temperature: float = ...,
    scale_by_t2: bool = ...,
    weights: Tensor | None = ...,
    gate: Gate | None = ...,
    gate_temperature: float = ...,
    target: Tensor | None = ...,
    class_mask: Tensor | None = ...,
    reduction: Reduction = ...,
    return_details: Literal[False] = ...,
) -> Tensor: ...


@overload
def teacher_kl(
    student: Similarity,
    teachers: Sequence[Similarity],
    *,
    temperature: float = ...,
    scale_by_t2: bool = ...,
    weights: Tensor | None = ...,
    gate: Gate | None = ...,
    gate_temperature: float = ...,
    target: Tensor | None = ...,
    class_mask: Tensor | None = ...,
    reduction: Reduction = ...,
    return_details: Literal[True],
) -> tuple[Tensor, TeacherDetails]: ...


def teacher_kl(
    student: Similarity,
    teachers: Sequence[Similarity],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    weights: Tensor | None = None,
    gate: Gate | None = None,
    gate_temperature: float = 1.0,
    target: Tensor | None = None,
    class_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    return_details: bool = False,
) -> Tensor | tuple[Tensor, TeacherDetails]:
    """Weighted KL divergence of K teachers' class distributions from the student's.

    ``loss_i = sum_k w_ik KL_ik``, ``KL_ik = T^2 sum_j p_ijk (log p_ijk - log q_ij)`` with
    ``p = softmax(z_k / T)`` and ``q = softmax(z / T)`` (Hinton et al., arXiv 1503.02531; the T^2
    only with `scale_by_t2`).

    Gates give the weights, which sum to 1 over the teachers and are constants for autograd:

    - ``"uniform"``: 1/K (also when neither `weights` nor `gate` is given).
    - ``"confidence"``: softmax over k of ``-entropy(p_ik) / gate_temperature``.
    - ``"label"``: softmax over k of ``log p_ik[target_i] / gate_temperature``.
    - ``"discrepancy"``: for two teachers (original, previous) of one width,
      ``w_previous = sigmoid(6 (|u_0 - u_1| - 0.2))`` on their features (Select-and-Distill).

    Args:
        student: [N, P] logits; gradients flow to its features, prototypes and scale.
        teachers: K >= 1 of [N, P], each with its own width and scale; none may require grad.
        temperature: T > 0.
        weights: [N, K] used instead of a gate; differentiable, need not sum to 1.
        gate: see above; not together with `weights`.
        gate_temperature: > 0, smaller is sharper.
        target: [N] int64 in [0, P), wanted by the gate "label" alone.
        class_mask: [P] bool, True for the classes that take part.
        reduction: "mean" over rows, "sum", or "none" for [N].
        return_details: also return `TeacherDetails`, by-products of the same pass.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_similarity("student", student)
    if isinstance(teachers, Similarity) or not isinstance(teachers, Sequence):
        raise TypeError(
            f"teachers: got {type(teachers).__name__}, wanted a sequence of Similarity; "
            f"put a single teacher in a list"
        )
    if not teachers:
        raise ValueError("teachers: got none, wanted at least one Similarity")
    n, p = student.shape
    for k, teacher in enumerate(teachers):
        _check_similarity(f"teachers[{k}]", teacher)
        if teacher.shape != student.shape:
            raise ValueError(
                f"teachers[{k}]: got shape {list(teacher.shape)}, wanted [{n}, {p}] as the student"
            )
        if teacher.device != student.device:
            raise ValueError(
                f"teachers[{k}]: got device {teacher.device}, wanted {student.device} as the "
                f"student; move it there"
            )
        if teacher.requires_grad:
            raise ValueError(
                f"teachers[{k}]: requires grad, but no gradient flows to a teacher; "
                f"pass teacher.detach()"
            )
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_positive("temperature", temperature)
    _check_positive("gate_temperature", gate_temperature)
    _check_class_mask(class_mask, p, student.device)
    _check_weights(weights, gate, n, len(teachers), student.device)
    gate = "uniform" if gate is None else gate
    _check_choice("gate", gate, GATES)
    if gate == "label":
        if target is None:
            raise ValueError('target: got None, wanted [N] class indices for gate="label"')
        _check_target(target, n, p, student.device, class_mask)
    if gate == "discrepancy":
        shapes = [list(t.features.shape) for t in teachers]
        if len(teachers) != 2 or shapes[0] != shapes[1]:
            raise ValueError(
                f"teachers: got features of shapes {shapes}, wanted two of one width for gate="
                f'"discrepancy"; use another gate'
            )
    loss, kl, used, entropy = reference.teacher_kl(
        student.operands(),
        [t.operands() for t in teachers],
        temperature,
        scale_by_t2,
        weights,
        gate,
        gate_temperature,
        target,
        class_mask,
        reduction,
    )
    if return_details:
        return loss, TeacherDetails(kl.detach(), used.detach(), entropy)
    return loss


@overload
def dual_teacher_kl(
    student: Similarity,
    zero_shot: Similarity,
    previous: Similarity,
    *,
    temperature: float = ...,
    scale_by_t2: bool = ...,
    weights: Tensor | None = ...,
    gate: Gate | None = ...,
    gate_temperature: float = ...,
    target: Tensor | None = ...,
    class_mask: Tensor | None = ...,
    reduction: Reduction = ...,
    return_details: Literal[False] = ...,
) -> Tensor: ...


@overload
def dual_teacher_kl(
    student: Similarity,
    zero_shot: Similarity,
    previous: Similarity,
    *,
    temperature: float = ...,
    scale_by_t2: bool = ...,
    weights: Tensor | None = ...,
    gate: Gate | None = ...,
    gate_temperature: float = ...,
    target: Tensor | None = ...,
    class_mask: Tensor | None = ...,
    reduction: Reduction = ...,
    return_details: Literal[True],
) -> tuple[Tensor, TeacherDetails]: ...


def dual_teacher_kl(
    student: Similarity,
    zero_shot: Similarity,
    previous: Similarity,
    *,
    temperature: float = 2.0,
    scale_by_t2: bool = True,
    weights: Tensor | None = None,
    gate: Gate | None = "label",
    gate_temperature: float = 1.0,
    target: Tensor | None = None,
    class_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    return_details: bool = False,
) -> Tensor | tuple[Tensor, TeacherDetails]:
    """`teacher_kl` with the original model and the model after the previous task as teachers.

    The columns of weights and details are (zero_shot, previous). With `weights` given, the gate is
    not used. Arguments, result and errors otherwise as `teacher_kl`.
    """
    return teacher_kl(  # type: ignore[misc, call-overload]
        student,
        (zero_shot, previous),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        weights=weights,
        gate=gate if weights is None else None,
        gate_temperature=gate_temperature,
        target=target,
        class_mask=class_mask,
        reduction=reduction,
        return_details=return_details,
    )


def clip_contrastive(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """The symmetric contrastive loss of CLIP (arXiv 2103.00020) on N matching pairs.

    ``1/2 [CE(z, diagonal) + CE(z.T, diagonal)]`` with ``z = logit_scale * image @ text.T``.

    Args:
        image_features: [N, D], L2-normalised; row i belongs to row i of the texts.
        text_features: [N, D].
        logit_scale: already exponentiated, a float or a 0-d tensor.
        logit_bias: added to every logit; a softmax does not see it, so its gradient is zero.
        reduction: "mean" over pairs, "sum", or "none" for [N].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    s = _pairs(image_features, text_features, logit_scale, logit_bias, reduction)
    features, prototypes, scale = s.operands()
    return reference.contrastive(features, prototypes, scale, logit_bias, reduction)


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (arXiv 2303.15343) on N matching pairs.

    ``loss_i = -sum_j log sigmoid(y_ij (logit_scale u_i.w_j + logit_bias))`` with y = +1 for
    matching pairs and -1 otherwise; "mean" divides the sum by N, as open_clip does.

    Arguments and errors as `clip_contrastive`; `logit_bias` is a float or a 0-d tensor.
    """
    if logit_bias is None:
        raise TypeError("logit_bias: got None, wanted a float or a 0-d tensor")
    s = _pairs(image_features, text_features, logit_scale, logit_bias, reduction)
    features, prototypes, scale = s.operands()
    return reference.siglip(features, prototypes, scale, logit_bias, reduction)


def _pairs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    reduction: str,
) -> Similarity:
    _check_choice("reduction", reduction, REDUCTIONS)
    names = ("image_features", "text_features", "logit_scale")
    check_operands(image_features, text_features, logit_scale, names)
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"text_features: got shape {list(text_features.shape)}, wanted "
            f"{list(image_features.shape)} as image_features: pairs match row by row"
        )
    if logit_bias is not None:
        check_number("logit_bias", logit_bias, image_features.device)
    return Similarity(image_features, text_features, logit_scale)


def _check_similarity(name: str, value: object) -> None:
    if not isinstance(value, Similarity):
        raise TypeError(
            f"{name}: got {type(value).__name__}, wanted a Similarity; build one with "
            f"Similarity(features, prototypes, scale)"
        )


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}")


def _check_real(name: str, value: object) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")


def _check_positive(name: str, value: float) -> None:
    _check_real(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, wanted a positive number")


def _readable(values: Tensor) -> bool:
    # Reading values stalls a GPU and cannot be traced, so bad ones fail there as they do in torch:
    # an index out of range in the gather, a masked target by a loss of infinity.
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_class_mask(mask: Tensor | None, p: int, device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"class_mask: got {came}, wanted a bool tensor; use mask.bool()")
    if mask.shape != (p,):
        raise ValueError(f"class_mask: got shape {list(mask.shape)}, wanted [{p}]")
    if mask.device != device:
        raise ValueError(f"class_mask: got device {mask.device}, wanted {device}; move it there")
    if _readable(mask) and not mask.any():
        raise ValueError("class_mask: masks every class, wanted at least one True")


def _check_target(
    target: object,
    n: int,
    p: int,
    device: torch.device,
    class_mask: Tensor | None,
    ignore_index: int | None = None,
) -> None:
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        came = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: got {came}, wanted an int64 tensor; use target.long()")
    if target.shape != (n,):
        raise ValueError(f"target: got shape {list(target.shape)}, wanted [{n}]")
    if target.device != device:
        raise ValueError(f"target: got device {target.device}, wanted {device}; move it there")
    if not _readable(target):
        return
    used = target if ignore_index is None else target[target != ignore_index]
    if used.numel() == 0:
        return
    low, high = int(used.min()), int(used.max())
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


def _check_weights(
    weights: Tensor | None, gate: str | None, n: int, k: int, device: torch.device
) -> None:
    if weights is None:
        return
    if gate is not None:
        raise ValueError(f"gate: got {gate!r} together with weights, wanted one of the two")
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        came = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights: got {came}, wanted a floating point tensor [N, K]")
    if weights.shape != (n, k):
        raise ValueError(f"weights: got shape {list(weights.shape)}, wanted [{n}, {k}]")
    if weights.device != device:
        raise ValueError(f"weights: got device {weights.device}, wanted {device}; move it there")
