"""teacher_kl: loss_i = sum_k w_ik KL_ik, the divergence of a student from K teachers, row by row.

KL_ik = T^2 sum_j p_ijk (log p_ijk - log q_ij) with p = softmax(z_k / T) of teacher k and
q = softmax(z / T) of the student: the forward direction of Hinton et al. (arXiv 1503.02531), whose
T^2 keeps gradients comparable across temperatures (without `scale_by_t2` it is 1). Each model has
its own z = s X W^T. The weights w are given, or come from a row-wise gate (`mulki.ops.gates`), and
sum to 1 over k. Gradient of a row with upstream gradient g: G_j = g T sum_k w_k (q_j - p_jk), with
1/T in place of T without the factor T^2. The gradient of given weights is KL_ik.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import checks, direct, gates
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
    multiplied,
    refuse_double_backward,
    register,
    save,
    saved,
    times,
)
from mulki.ops.gates import Gate
from mulki.ops.logits import Operands, logit_gradients, logits, narrow, reduce, reduced_rows, wide
from mulki.ops.registry import backward_fake, define, reduced_fake

_MODELS = (
    "Tensor features, Tensor prototypes, Tensor scale, Tensor[] teacher_features, "
    "Tensor[] teacher_prototypes, Tensor teacher_scales"
)
# The three numbers of the gate are read only where weights are not given.
_ARGUMENTS = (
    f"{_MODELS}, Tensor? weights, Tensor? target, Tensor? class_mask, float temperature, "
    "float gate_temperature, float gate_entropy, float gate_label, bool scale_by_t2"
)


def check(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    teacher_features: Sequence[Tensor],
    teacher_prototypes: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor | None,
    target: Tensor | None,
    class_mask: Tensor | None,
    temperature: float,
    gate_temperature: float,
    gate_entropy: float,
    gate_label: float,
    scale_by_t2: bool,
    *,
    values: bool = True,
) -> None:
    checks.operands(features, prototypes, scale)
    checks.positive("temperature", temperature)
    checks.positive("gate_temperature", gate_temperature)
    check_teachers(features, prototypes, teacher_features, teacher_prototypes, teacher_scales)
    checks.class_mask(class_mask, prototypes, values)
    if weights is not None:
        checks.shape("weights", weights, (features.shape[0], len(teacher_features)))
        checks.on_device("weights", weights, features.device)
    elif gate_label != 0:
        if target is None:
            raise ValueError("target: got None, wanted [N] class indices for a gate on the label")
        checks.target(target, features, prototypes, class_mask, None, values)


def check_teachers(
    features: Tensor,
    prototypes: Tensor,
    teacher_features: Sequence[Tensor],
    teacher_prototypes: Sequence[Tensor],
    teacher_scales: Tensor,
    names: tuple[str, str] = ("teacher_features", "teacher_prototypes"),
) -> None:
    """Raise a TypeError or ValueError where teachers do not fit each other or the student."""
    k = len(teacher_features)
    if k == 0:
        raise ValueError(f"{names[0]}: got none, wanted at least one teacher")
    if len(teacher_prototypes) != k:
        raise ValueError(f"{names[1]}: got {len(teacher_prototypes)}, wanted {k} as {names[0]} has")
    checks.shape("teacher_scales", teacher_scales, (k,))
    checks.on_device("teacher_scales", teacher_scales, features.device)
    for i, (x, w) in enumerate(zip(teacher_features, teacher_prototypes, strict=True)):
        checks.teacher(i, x, w, features, prototypes)


def check_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    teacher_features: Sequence[Tensor],
    teacher_prototypes: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor,
    class_mask: Tensor | None,
    temperature: float,
    scale_by_t2: bool,
    wanted: Sequence[bool],
    *,
    values: bool = True,
) -> None:
    models = features, prototypes, scale, teacher_features, teacher_prototypes, teacher_scales
    gate = 1.0, 0.0, 0.0
    check(*models, weights, None, class_mask, temperature, *gate, scale_by_t2, values=False)
    checks.shape("grad", grad, features.shape[:1])
    checks.on_device("grad", grad, features.device)


def check_reduced(*args: Any, values: bool = True) -> None:
    *arguments, _, _ = args
    check(*arguments, values=values)


def fake(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    teacher_features: Sequence[Tensor],
    *_: object,
) -> tuple[Tensor, ...]:
    loss = features.new_empty(features.shape[0], dtype=wide(features.dtype))
    k = len(teacher_features)
    return loss, *(loss.new_empty((features.shape[0], k)) for _ in range(3))


class _Rows(NamedTuple):
    """What the reference knows once it has seen all rows."""

    log_q: Tensor  # [N, P]
    log_p: Tensor  # [N, K, P]
    loss: Tensor  # [N]
    kl: Tensor  # [N, K]
    weights: Tensor  # [N, K]
    entropy: Tensor  # [N, K]


def reference(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    teacher_features: Sequence[Tensor],  # K of [N, D_k]
    teacher_prototypes: Sequence[Tensor],  # K of [P, D_k]
    teacher_scales: Tensor | Sequence[float],  # [K]
    weights: Tensor | None = None,  # [N, K]; None: those of the gate
    target: Tensor | None = None,  # [N] int64, where gate_label is not 0
    class_mask: Tensor | None = None,  # [P] bool
    temperature: float = 1.0,
    gate_temperature: float = 1.0,
    gate_entropy: float = 0.0,
    gate_label: float = 0.0,
    scale_by_t2: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss [N]; kl, weights, entropy [N, K]
    """The specification, differentiable in the loss."""
    models = features, prototypes, scale, teacher_features, teacher_prototypes, teacher_scales
    gate = gate_temperature, gate_entropy, gate_label
    rows = _rows(*models, weights, target, class_mask, temperature, *gate, scale_by_t2)
    return rows.loss, rows.kl, rows.weights, rows.entropy


def reference_backward(
    grad: Tensor,  # [N]
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    teacher_features: Sequence[Tensor],
    teacher_prototypes: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor,
    class_mask: Tensor | None,
    temperature: float,
    scale_by_t2: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    student = features, prototypes, scale
    teachers = list(zip(teacher_features, teacher_prototypes, teacher_scales, strict=True))
    log_q, log_p = _log_probabilities(student, teachers, temperature, class_mask)
    dz = _dz(log_q, log_p, weights, temperature, scale_by_t2, grad)
    return narrow(logit_gradients(dz, *student, wanted), features)


def reference_reduced(*args: Any) -> tuple[Tensor, ...]:
    *arguments, mean, wanted = args
    features, prototypes, scale, *_, temperature, _, _, _, scale_by_t2 = arguments
    rows = _rows(*arguments)
    total, upstream = reduced_rows(rows.loss, mean)
    dz = _dz(rows.log_q, rows.log_p, rows.weights, temperature, scale_by_t2, upstream)
    gradients = logit_gradients(dz, features, prototypes, scale, wanted)
    return total, rows.kl, rows.weights, rows.entropy, *gradients


def _rows(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor | float,
    teacher_features: Sequence[Tensor],
    teacher_prototypes: Sequence[Tensor],
    teacher_scales: Tensor | Sequence[float],
    weights: Tensor | None,
    target: Tensor | None,
    class_mask: Tensor | None,
    temperature: float,
    gate_temperature: float,
    gate_entropy: float,
    gate_label: float,
    scale_by_t2: bool,
) -> _Rows:
    student = features, prototypes, scale
    teachers = list(zip(teacher_features, teacher_prototypes, teacher_scales, strict=True))
    log_q, log_p = _log_probabilities(student, teachers, temperature, class_mask)
    excluded = None if class_mask is None else ~class_mask
    p = log_p.exp()
    entropy = -_without(p * log_p, excluded).sum(dim=2)
    if weights is None:
        gate = gate_entropy, gate_label
        weights = gates.row_weights(log_p, entropy, *gate, target, gate_temperature)
    else:
        # The weights that come back are a copy.
        weights = weights.to(log_q.dtype, copy=True).contiguous()
    kl = (p * _without(log_p - log_q.unsqueeze(1), excluded)).sum(dim=2)
    if scale_by_t2:
        kl = kl * temperature**2
    return _Rows(log_q, log_p, (weights * kl).sum(dim=1), kl, weights, entropy)


def _log_probabilities(
    student: Operands, teachers: Sequence[Operands], temperature: float, class_mask: Tensor | None
) -> tuple[Tensor, Tensor]:  # log q [N, P] and, without a gradient, log p [N, K, P]
    log_q = F.log_softmax(logits(*student, class_mask) / temperature, dim=1)
    with torch.no_grad():
        rows = [F.log_softmax(logits(*t, class_mask) / temperature, dim=1) for t in teachers]
        return log_q, torch.stack(rows, dim=1).to(log_q.dtype)


def _without(values: Tensor, excluded: Tensor | None) -> Tensor:
    # Masked classes hold 0 * inf or inf - inf here; both their value and their gradient are zero.
    return values if excluded is None else values.masked_fill(excluded, 0)


def _dz(
    log_q: Tensor,  # [N, P]
    log_p: Tensor,  # [N, K, P]
    weights: Tensor,  # [N, K]
    temperature: float,
    scale_by_t2: bool,
    upstream: Tensor,  # [N]
) -> Tensor:  # [N, P]
    factor = temperature if scale_by_t2 else 1 / temperature
    gap = log_q.exp().unsqueeze(1) - log_p.exp()
    row = (factor * upstream).unsqueeze(1) * weights
    return (row.to(gap.dtype).unsqueeze(2) * gap).sum(dim=1)


define(
    "teacher_kl",
    # loss [N]; kl, weights, entropy [N, K]
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    check=check,
    fake=fake,
    reference=reference,
)
define(
    "teacher_kl_backward",
    f"(Tensor grad, {_MODELS}, Tensor weights, Tensor? class_mask, float temperature, "
    "bool scale_by_t2, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    check=check_backward,
    fake=backward_fake(leaves=3),
    reference=reference_backward,
)
define(
    "teacher_kl_reduced",
    # the total; kl, weights, entropy [N, K]; the gradients of features, prototypes and scale
    f"({_ARGUMENTS}, bool mean, bool[3] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=check_reduced,
    fake=reduced_fake(fake, leaves=3, details=3),
    reference=reference_reduced,
)


# The rules of gradients are written out: teachers come in lists, and weights are a leaf too, whose
# gradient is the divergence that the forward returns anyway.
_WEIGHTS = 6
_LEAVES = (0, 1, 2, _WEIGHTS)


def _keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *student, teacher_features, teacher_prototypes, scales, weights, _, class_mask = inputs[:9]
    temperature, scale_by_t2 = inputs[9], inputs[13]
    _, kl, used, _ = outputs
    ctx.k = len(teacher_features)
    tensors = (*student, *teacher_features, *teacher_prototypes, scales, used, class_mask)
    of_weights = (None, None) if weights is None else (weights, kl)
    save(ctx, (*of_weights, *tensors, temperature, scale_by_t2))


def _gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    weights, kl, *rest = saved(ctx)
    k = ctx.k
    student, teachers, options = rest[:3], rest[3 : 3 + 2 * k], rest[3 + 2 * k :]
    result: dict[int, Tensor] = {}
    wanted = list(ctx.needed[:3])
    if any(wanted):
        models = *student, teachers[:k], teachers[k:]
        result = asked(wanted, torch.ops.mulki.teacher_kl_backward(grad, *models, *options, wanted))
    if ctx.needed[_WEIGHTS]:
        result[_WEIGHTS] = times(grad.unsqueeze(1), kl, weights)
    return result


def _keep_reduced(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    kl, weights, mean = outputs[1], inputs[_WEIGHTS], inputs[-2]
    ctx.rows = kl.shape[0] if mean else 1
    of_weights = (None, None) if weights is None else (weights, kl)
    save(ctx, (*inputs[:3], *outputs[-3:], *of_weights))


def _reduced_gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    *values, weights, kl = saved(ctx)
    result = multiplied("teacher_kl_reduced", ctx, grad, values[:3], values[3:])
    if ctx.needed[_WEIGHTS]:
        result[_WEIGHTS] = times(grad / ctx.rows, kl, weights)
    return result


register("teacher_kl", _LEAVES, _keep, _gradients)
register("teacher_kl_reduced", _LEAVES, _keep_reduced, _reduced_gradients)
refuse_double_backward("teacher_kl_backward")


def loss(
    student: Operands,
    teachers: Sequence[Operands],
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,  # [N, K], of any floating dtype
    gate: Gate,
    gate_numbers: tuple[float, float],  # a and b
    gate_temperature: float,
    target: Tensor | None,  # [N] int64
    class_mask: Tensor | None,  # [P] bool
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, the mean over rows, or a loss per row [N]; then kl, weights and entropy [N, K].

    Student and teachers of different dtypes, none of them float64, are promoted to a common one.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    refuse_transforms(student, *teachers, (weights,))
    models = in_one_dtype([rounded(model) for model in (student, *teachers)])
    (features, prototypes, scale), *teachers = models
    if gate.weights is not None:
        weights = gate_weights(gate, models[0], teachers, target, class_mask)
    elif weights is not None:
        weights = weights.to(wide(features.dtype))
    leaves = features, prototypes, scalar(scale, features)
    teacher_features, teacher_prototypes, scales = ([t[i] for t in teachers] for i in range(3))
    arguments = (
        *(*leaves, teacher_features, teacher_prototypes, scalars(scales, features)),
        *(weights, target, class_mask, temperature, gate_temperature, *gate_numbers, scale_by_t2),
    )
    if takes_reduced_form(reduction, *leaves, weights):
        mean = reduction == "mean"
        total, kl, used, entropy, *_ = direct.call(
            "teacher_kl_reduced", *arguments, mean, wanted_gradients(*leaves)
        )
        return total, kl, used, entropy
    rows, kl, used, entropy = direct.call("teacher_kl", *arguments)
    return reduce(rows, reduction), kl, used, entropy


def in_one_dtype(models: list[Operands]) -> list[Operands]:
    """Student and teachers in the dtype that they are promoted to: a kernel takes one dtype."""
    # Rounding a teacher to the student's would be cheaper, but wrong.
    dtype = models[0][0].dtype
    if all(features.dtype == dtype for features, _, _ in models):
        return models
    for features, _, _ in models:
        dtype = torch.promote_types(dtype, features.dtype)
    return [(x.to(dtype), w.to(dtype), scale) for x, w, scale in models]


@torch.no_grad()
def gate_weights(
    gate: Gate,
    student: Operands,
    teachers: Sequence[Operands],
    target: Tensor | None,
    class_mask: Tensor | None,
) -> Tensor:
    """The weights [N, K] of a gate that is a function, as constants.

    Raises:
        TypeError, ValueError: an argument does not fit, or what the function returns.
    """
    assert gate.weights is not None
    (features, prototypes, _), *models = in_one_dtype(
        [rounded(model) for model in (student, *teachers)]
    )
    teacher_features, teacher_prototypes = [x for x, _, _ in models], [w for _, w, _ in models]
    scales = scalars([scale for _, _, scale in models], features)
    # The function may compute with them, so they are checked before and not by the operator alone.
    check_teachers(features, prototypes, teacher_features, teacher_prototypes, scales)
    values = not torch.compiler.is_compiling()
    checks.class_mask(class_mask, prototypes, values)
    if gate.needs_target and target is not None:
        checks.target(target, features, prototypes, class_mask, None, values)
    tensors = list(zip(teacher_features, teacher_prototypes, scales, strict=True))
    weights = gate.weights(tensors, target, class_mask)
    what = f'weights of gate "{gate.name}"'
    checks.is_tensor(what, weights, "a tensor [N, K] from its function")
    if not weights.is_floating_point():
        raise TypeError(f"{what}: got {weights.dtype}, wanted a floating point tensor [N, K]")
    checks.shape(what, weights, (features.shape[0], len(teachers)))
    return weights.detach().to(wide(features.dtype))
