"""The losses as functions.

Every function takes unreduced rows of features and calls an operator: one file of `mulki.ops`,
whose `reference` defines the result and which the fastest backend at hand computes. Shapes:
N samples, P prototypes (class texts, class means), D feature width, K teachers.

Under autocast, features and prototypes are rounded to the autocast dtype; everything after that
is computed in float32. Losses come back in float32 (float64 for float64 inputs).

Types, shapes and devices are always checked, the values of `target` and `class_mask` on the CPU
alone (in compiled code by the operator): reading them elsewhere would wait for the GPU.
`check_finite=True` makes a NaN or an infinity in features, prototypes, scale, bias or weights a
ValueError that names the argument and the row. It reads values on the host wherever they are, so it
waits for a GPU and does not compile: it is for the search for a fault.

Limits: gradients have no gradients (double backward raises), there is no forward-mode
differentiation, the transforms of `torch.func` that differentiate raise, and so do `vmap` over
`teacher_kl` and `pair_teacher_kl`, and a batch of upstream gradients of their rows, or of the
contrastive loss and the KL that one call of a distilling loss returns. What needs those can call
the `reference` of each operator in `mulki.ops`. Under `torch.compile` every new value of a float
option (`temperature`, `gate_temperature`, `gate_entropy`, `gate_label`, `label_smoothing`) is a
recompilation; a new scale is not, except the second value of a scale that is a float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn, TypedDict, overload

import torch
from torch import Tensor

from mulki import ops
from mulki.ops import checks
from mulki.ops.gates import Weighting
from mulki.similarity import Similarity

if TYPE_CHECKING:
    from typing_extensions import Unpack  # which torch needs

Reduction = Literal["none", "sum", "mean"]

REDUCTIONS = checks.REDUCTIONS
PAIR_NAMES = ("image_features", "text_features", "logit_scale")
_CLASSES = "an int64 tensor of class indices"


class TeacherDetails(NamedTuple):
    """By-products of `teacher_kl`, none of them differentiable.

    Attributes:
        kl: [N, K], KL of each teacher, with the T^2 factor if that was asked for. A difference of
            logarithms: near zero rounding can make it negative by some 1e-7 in float32, times the
            square of the temperature where it is scaled by that.
        weights: [N, K], of the teachers.
        entropy: [N, K], of each teacher's distribution, in nats.
    """

    kl: Tensor
    weights: Tensor
    entropy: Tensor


class PairOptions(TypedDict, total=False):
    """Options of `pair_teacher_kl` that do not change the type of its result."""

    temperature: float
    scale_by_t2: bool
    weights: Tensor | None
    gate: str | None
    gate_temperature: float
    gate_entropy: float | None
    gate_label: float | None
    reduction: Reduction
    check_finite: bool


class TeacherOptions(PairOptions, total=False):
    """The same of `teacher_kl` and `dual_teacher_kl`."""

    target: Tensor | None
    class_mask: Tensor | None


def prototype_similarity(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor | float = 1.0,
    *,
    normalize: bool = False,
    check_finite: bool = False,
) -> Tensor:
    """The matrix ``scale * features @ prototypes.T``.

    Args:
        features: [N, D].
        prototypes: [P, D], same dtype and device.
        scale: a float or a 0-d tensor.
        normalize: L2-normalise the rows of both first, so that the entries are scaled cosines.
        check_finite: read the values and raise a ValueError for NaN or infinity.

    Returns:
        [N, P] in the dtype of the features (the autocast dtype under autocast); gradients flow to
        features, prototypes and scale.

    Raises:
        TypeError, ValueError: as `Similarity`.
    """
    checks.inputs(features, prototypes, scale, ("features", "prototypes", "scale"))
    checks.some_rows("prototypes", prototypes)
    if check_finite:
        checks.finite(features=features, prototypes=prototypes, scale=scale)
    return ops.similarity.matrix((features, prototypes, scale), normalize)


def prototype_cross_entropy(
    similarity: Similarity,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    check_finite: bool = False,
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
        check_finite: read the values and raise a ValueError for NaN or infinity.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(similarity, Similarity):
        _explain_no_similarity("similarity", similarity)
    if not isinstance(target, Tensor):
        checks.is_tensor("target", target, _CLASSES)
    if reduction not in REDUCTIONS:
        checks.choice("reduction", reduction, REDUCTIONS)
    checks.fraction("label_smoothing", label_smoothing)
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, wanted an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: got {ignore_index}, wanted 64 bits, as targets have")
    if class_mask is not None:
        checks.is_tensor("class_mask", class_mask, "a bool tensor")
    if check_finite:
        _check_finite_similarity("similarity", similarity)
    return ops.prototype_cross_entropy.loss(
        similarity.operands, target, class_mask, float(label_smoothing), ignore_index, reduction
    )


@overload
def teacher_kl(
    student: Similarity, teachers: Sequence[Similarity], **options: Unpack[TeacherOptions]
) -> Tensor: ...


@overload
def teacher_kl(
    student: Similarity,
    teachers: Sequence[Similarity],
    *,
    return_details: Literal[True],
    **options: Unpack[TeacherOptions],
) -> tuple[Tensor, TeacherDetails]: ...


def teacher_kl(
    student: Similarity,
    teachers: Sequence[Similarity],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    weights: Tensor | None = None,
    gate: str | None = None,
    gate_temperature: float = 1.0,
    gate_entropy: float | None = None,
    gate_label: float | None = None,
    target: Tensor | None = None,
    class_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    return_details: bool = False,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, TeacherDetails]:
    """Weighted KL divergence of K teachers' class distributions from the student's.

    ``loss_i = sum_k w_ik KL_ik``, ``KL_ik = T^2 sum_j p_ijk (log p_ijk - log q_ij)`` with
    ``p = softmax(z_k / T)`` and ``q = softmax(z / T)`` (Hinton et al., arXiv 1503.02531; the T^2
    only with `scale_by_t2`).

    Gates give the weights, which sum to 1 over the teachers and are constants for autograd. A
    row-wise gate is the softmax over k of
    ``(-a entropy(p_ik) + b log p_ik[target_i]) / gate_temperature``:

    - ``"uniform"``: a = b = 0, so 1/K (also when neither `weights` nor `gate` is given).
    - ``"confidence"``: a = 1, b = 0.  ``"label"``: a = 0, b = 1.
    - ``"blend"``: a = `gate_entropy`, b = `gate_label`.

    Two others take two teachers and compute the weights beforehand, see `mulki.ops.gates`:

    - ``"discrepancy"``: for teachers (original, previous) of one width,
      ``w_previous = sigmoid(6 (|u_0 - u_1| - 0.2))`` on their features (Select-and-Distill).
    - ``"loss"``: ``w_1 = (1 + (l_2 - l_1) / (l_1 + l_2 + eps)) / 2`` on the cross-entropies of the
      two teachers with the target (the code of LfI); one more product per teacher.

    `mulki.ops.gates.register_gate` adds others.

    Args:
        student: [N, P] logits; gradients flow to its features, prototypes and scale.
        teachers: K >= 1 of [N, P], each with its own width and scale; none may require grad.
            Their dtypes may differ, but float64 goes with float64 alone.
        temperature: T > 0.
        scale_by_t2: multiply each divergence by T^2.
        weights: [N, K] used instead of a gate; differentiable, need not sum to 1.
        gate: see above; not together with `weights`.
        gate_temperature: > 0, smaller is sharper; of row-wise gates.
        gate_entropy: a of the gate "blend", and of no other.
        gate_label: b of that gate.
        target: [N] int64 in [0, P), for a gate that looks at it; not looked at otherwise.
        class_mask: [P] bool, True for the classes that take part.
        reduction: "mean" over rows, "sum", or "none" for [N].
        return_details: also return `TeacherDetails`, by-products of the same pass.
        check_finite: read the values and raise a ValueError for NaN or infinity.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    weighting = _checked_weighting(
        student, teachers, weights, gate, gate_temperature, gate_entropy, gate_label
    )
    if reduction not in REDUCTIONS:
        checks.choice("reduction", reduction, REDUCTIONS)
    checks.temperature("temperature", temperature)
    if class_mask is not None:
        checks.is_tensor("class_mask", class_mask, "a bool tensor")
    if not weighting.uses_target:
        target = None
    elif target is None:
        raise ValueError(f'target: got None, wanted [N] class indices for gate="{gate}"')
    elif not isinstance(target, Tensor):
        checks.is_tensor("target", target, _CLASSES)
    if check_finite:
        _check_finite_models(student, teachers, weights)
    options = float(temperature), scale_by_t2, weights, weighting, target, class_mask, reduction
    others = [teacher.operands for teacher in teachers]
    loss, *details = ops.teacher_kl.loss(student.operands, others, *options, return_details)
    return (loss, TeacherDetails(*details)) if return_details else loss


@overload
def dual_teacher_kl(
    student: Similarity,
    zero_shot: Similarity,
    previous: Similarity,
    **options: Unpack[TeacherOptions],
) -> Tensor: ...


@overload
def dual_teacher_kl(
    student: Similarity,
    zero_shot: Similarity,
    previous: Similarity,
    *,
    return_details: Literal[True],
    **options: Unpack[TeacherOptions],
) -> tuple[Tensor, TeacherDetails]: ...


def dual_teacher_kl(
    student: Similarity,
    zero_shot: Similarity,
    previous: Similarity,
    *,
    temperature: float = 2.0,
    scale_by_t2: bool = True,
    weights: Tensor | None = None,
    gate: str | None = "label",
    gate_temperature: float = 1.0,
    gate_entropy: float | None = None,
    gate_label: float | None = None,
    target: Tensor | None = None,
    class_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    return_details: bool = False,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, TeacherDetails]:
    """`teacher_kl` with the original model and the model after the previous task as teachers.

    The columns of weights and details are (zero_shot, previous). With `weights` given, the gate is
    not used. Arguments, result and errors otherwise as `teacher_kl`, so errors call the two
    ``teachers[0]`` and ``teachers[1]``.
    """
    return teacher_kl(  # type: ignore[misc, call-overload, no-any-return]
        student,
        (zero_shot, previous),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        weights=weights,
        gate=gate if weights is None else None,
        gate_temperature=gate_temperature,
        gate_entropy=gate_entropy if weights is None else None,
        gate_label=gate_label if weights is None else None,
        target=target,
        class_mask=class_mask,
        reduction=reduction,
        return_details=return_details,
        check_finite=check_finite,
    )


@overload
def pair_teacher_kl(
    student: Similarity, teachers: Sequence[Similarity], **options: Unpack[PairOptions]
) -> Tensor: ...


@overload
def pair_teacher_kl(
    student: Similarity,
    teachers: Sequence[Similarity],
    *,
    return_details: Literal[True],
    **options: Unpack[PairOptions],
) -> tuple[Tensor, TeacherDetails]: ...


def pair_teacher_kl(
    student: Similarity,
    teachers: Sequence[Similarity],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    weights: Tensor | None = None,
    gate: str | None = None,
    gate_temperature: float = 1.0,
    gate_entropy: float | None = None,
    gate_label: float | None = None,
    reduction: Reduction = "mean",
    return_details: bool = False,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, TeacherDetails]:
    """`teacher_kl` on N matching pairs in both directions, from one set of products.

    ``loss_i = 1/2 (row_i + column_i)``: half of `teacher_kl` of image i over all texts, and half of
    that of text i over all images. It is the distillation of open_clip and of CLIP-KD (arXiv
    2307.12732) less the teachers' entropies, which have no gradient.

    Args:
        student: [N, N] logits of images against texts; row i belongs to column i.
        teachers: K >= 1 of [N, N], as in `teacher_kl`.
        weights: [2, N, K] used instead of a gate, of the images and of the texts.
        gate: as in `teacher_kl`; the label of an image or text is its own pair.
        return_details: also return `TeacherDetails`, [2, N, K] of the images and of the texts.

    The other arguments, and errors, are those of `teacher_kl`.
    """
    weighting = _checked_weighting(
        student, teachers, weights, gate, gate_temperature, gate_entropy, gate_label
    )
    n, p = student.shape
    if n != p:
        raise ValueError(f"student: got shape [{n}, {p}], wanted as many images as texts")
    if reduction not in REDUCTIONS:
        checks.choice("reduction", reduction, REDUCTIONS)
    checks.temperature("temperature", temperature)
    if check_finite:
        _check_finite_models(student, teachers, weights)
    options = float(temperature), scale_by_t2, weights, weighting, reduction
    others = [teacher.operands for teacher in teachers]
    loss, *details = ops.pair_kl.loss(student.operands, others, *options, details=return_details)
    return (loss, TeacherDetails(*details[:3])) if return_details else loss


def clip_contrastive(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    reduction: Reduction = "mean",
    check_finite: bool = False,
) -> Tensor:
    """The symmetric contrastive loss of CLIP (arXiv 2103.00020) on N matching pairs.

    ``1/2 [CE(z, diagonal) + CE(z.T, diagonal)]`` with ``z = logit_scale * image @ text.T``.

    Args:
        image_features: [N, D], L2-normalised; row i belongs to row i of the texts.
        text_features: [N, D].
        logit_scale: already exponentiated, a float or a 0-d tensor.
        logit_bias: added to every logit; a softmax does not see it, so its gradient is zero.
        reduction: "mean" over pairs, "sum", or "none" for [N].
        check_finite: read the values and raise a ValueError for NaN or infinity.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_pairs(image_features, text_features, logit_scale, logit_bias, reduction, check_finite)
    operands = image_features, text_features, logit_scale
    return ops.contrastive.loss(operands, logit_bias, reduction)


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    reduction: Reduction = "mean",
    check_finite: bool = False,
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (arXiv 2303.15343) on N matching pairs.

    ``loss_i = -sum_j log sigmoid(y_ij (logit_scale u_i.w_j + logit_bias))`` with y = +1 for
    matching pairs and -1 otherwise; "mean" divides the sum by N, as open_clip does.

    Arguments and errors as `clip_contrastive`; `logit_bias` is a float or a 0-d tensor.
    """
    if logit_bias is None:
        raise TypeError("logit_bias: got None, wanted a float or a 0-d tensor")
    _check_pairs(image_features, text_features, logit_scale, logit_bias, reduction, check_finite)
    # The operator takes blocks of a larger batch, in which rows need not match; here they do.
    checks.matching_rows(image_features, text_features)
    operands = image_features, text_features, logit_scale
    return ops.siglip.loss(operands, logit_bias, reduction)


def _check_pairs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    reduction: str,
    check_finite: bool,
) -> None:
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.inputs(image_features, text_features, logit_scale, PAIR_NAMES)
    if logit_bias is not None:
        checks.scalar("logit_bias", logit_bias, image_features.device)
    if check_finite:
        checks.finite(
            image_features=image_features,
            text_features=text_features,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
        )


def _checked_weighting(
    student: Similarity,
    teachers: Sequence[Similarity],
    weights: Tensor | None,
    gate: str | None,
    gate_temperature: float,
    gate_entropy: float | None,
    gate_label: float | None,
) -> Weighting:
    # That of a distillation whose models and weights are what they should be.
    if not isinstance(student, Similarity):
        _explain_no_similarity("student", student)
    if type(teachers) not in (list, tuple) and not isinstance(teachers, Sequence):
        raise TypeError(
            f"teachers: got {type(teachers).__name__}, wanted a sequence of Similarity; "
            f"put a single teacher in a list"
        )
    if not teachers:
        raise ValueError("teachers: got none, wanted at least one Similarity")
    for k, teacher in enumerate(teachers):
        if not isinstance(teacher, Similarity):
            _explain_no_similarity(f"teachers[{k}]", teacher)
        _check_teacher(k, teacher, student)
    if weights is not None:
        _check_weights(weights, gate, gate_entropy, gate_label)
    return Weighting.of(
        "uniform" if gate is None else gate, gate_temperature, gate_entropy, gate_label
    )


def _explain_no_similarity(name: str, value: object) -> NoReturn:
    raise TypeError(
        f"{name}: got {type(value).__name__}, wanted a Similarity; build one with "
        f"Similarity(features, prototypes, scale)"
    )


def _check_teacher(k: int, teacher: Similarity, student: Similarity) -> None:
    got, wanted = teacher.features.dtype, student.features.dtype
    if got != wanted and torch.float64 in (got, wanted):
        raise TypeError(
            f"teachers[{k}]: got dtype {got}, wanted {wanted} as the student; cast one to the other"
        )
    if teacher.requires_grad:
        raise ValueError(
            f"teachers[{k}]: requires grad, but no gradient flows to a teacher; pass "
            f"teacher.detach()"
        )


def _check_weights(
    weights: Tensor, gate: str | None, gate_entropy: float | None, gate_label: float | None
) -> None:
    of_gate = {"gate": gate, "gate_entropy": gate_entropy, "gate_label": gate_label}
    for name, value in of_gate.items():
        if value is not None:
            raise ValueError(f"{name}: got {value!r} together with weights, wanted one of the two")
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        came = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights: got {came}, wanted a floating point tensor [N, K]")


def _check_finite_models(
    student: Similarity, teachers: Sequence[Similarity], weights: Tensor | None
) -> None:
    _check_finite_similarity("student", student)
    for k, teacher in enumerate(teachers):
        _check_finite_similarity(f"teachers[{k}]", teacher)
    checks.finite(weights=weights)


def _check_finite_similarity(name: str, s: Similarity) -> None:
    parts = {"features": s.features, "prototypes": s.prototypes, "scale": s.scale}
    checks.finite(**{f"{name}.{part}": value for part, value in parts.items()})
