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
from torch import Tensor

from mulki.ops import calls, checks, gates, torch_private
from mulki.ops.arguments import rounded, scalar
from mulki.ops.autograd import known
from mulki.ops.gates import Gate, Weighting
from mulki.ops.logits import Operands, autocasting, in_range, logits, product, wide
from mulki.ops.registry import define


class TeacherKl(NamedTuple):
    features: Tensor  # [N, D]
    prototypes: Tensor  # [P, D]
    scale: Tensor  # 0-d
    teacher_features: Sequence[Tensor]  # K of [N, D_k]
    teacher_prototypes: Sequence[Tensor]  # K of [P, D_k]
    teacher_scales: Sequence[Tensor]  # K, each 0-d
    weights: Tensor | None = None  # [N, K]; None: those of the gate
    target: Tensor | None = None  # [N] int64, where gate_label is not 0
    class_mask: Tensor | None = None  # [P] bool
    temperature: float = 1.0
    gate_temperature: float = 1.0
    gate_entropy: float = 0.0
    gate_label: float = 0.0
    scale_by_t2: bool = True


def check(x: TeacherKl, *, values: bool = True) -> None:
    checks.operands(x.features, x.prototypes, x.scale)
    checks.temperature("temperature", x.temperature)
    checks.temperature("gate_temperature", x.gate_temperature)
    check_teachers(x[:2], x[3:6])
    checks.class_mask(x.class_mask, x.prototypes, values)
    if x.weights is not None:
        checks.shape("weights", x.weights, (x.features.shape[0], len(x.teacher_features)))
        checks.on_device("weights", x.weights, x.features.device)
    elif x.gate_label != 0:
        if x.target is None:
            raise ValueError("target: got None, wanted [N] class indices for a gate on the label")
        checks.target(x.target, x.features, x.prototypes, x.class_mask, None, values)


def check_teachers(
    student: tuple[Tensor, Tensor],
    teachers: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    names: tuple[str, str] = ("teacher_features", "teacher_prototypes"),
) -> None:
    """Raise a TypeError or ValueError where teachers do not fit each other or the student."""
    features, prototypes, scales = teachers
    k = len(features)
    if k == 0:
        raise ValueError(f"{names[0]}: got none, wanted at least one teacher")
    for name, found in ((names[1], prototypes), ("teacher_scales", scales)):
        if len(found) != k:
            raise ValueError(f"{name}: got {len(found)}, wanted {k} as {names[0]} has")
    for i, (x, w, scale) in enumerate(zip(features, prototypes, scales, strict=True)):
        checks.teacher(i, x, w, *student)
        checks.number(f"teacher_scales[{i}]", scale, student[0])


def reference(x: TeacherKl) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification, differentiable in the loss, by given weights too.

    Returns:
        loss [N]; kl, weights, entropy [N, K].
    """
    log_q, log_sum = _log_probabilities(x, x[:3])
    with torch.no_grad():
        teachers = zip(x.teacher_features, x.teacher_prototypes, x.teacher_scales, strict=True)
        log_p = torch.stack([_log_probabilities(x, teacher)[0] for teacher in teachers], dim=1)
        log_p = log_p.to(log_q.dtype)  # [N, K, P]
        p = log_p.exp()
        entropy = -_of_classes(p * log_p, x.class_mask)
        if x.weights is None:
            at_target = None
            if x.gate_label and x.target is not None:
                index = x.target.reshape(-1, 1, 1).expand(-1, log_p.shape[1], 1)
                at_target = log_p.gather(2, index).squeeze(2)
            weights = gates.weights_of(x, entropy, at_target, like=entropy)
        else:
            # The weights that come back are a copy.
            weights = x.weights.to(log_q.dtype, copy=True).contiguous()
    factors = weights
    if x.weights is not None and x.weights.requires_grad:
        factors = x.weights.to(log_q.dtype)
    kl = _of_classes(p * (log_p - log_q.unsqueeze(1)), x.class_mask)
    # Adds zero, with the gradient q. That of the line above is -p, for the log_sum in `log_q` is a
    # constant. So the gradient is q - p, exactly zero where the student is its teacher.
    kl = kl + (log_sum - log_sum.detach())
    if x.scale_by_t2:
        kl = kl * x.temperature**2
    return (factors * kl).sum(dim=1), kl.detach(), weights, entropy


def _log_probabilities(x: TeacherKl, model: Operands) -> tuple[Tensor, Tensor]:
    # [N, P], and the log-sum-exp [N, 1] that was subtracted as a constant.
    z = logits(*model, x.class_mask) / x.temperature
    # What is left of the sum has more digits.
    z = z - z.detach().logsumexp(dim=1, keepdim=True)
    log_sum = z.logsumexp(dim=1, keepdim=True)
    return z - log_sum.detach(), log_sum


def _of_classes(values: Tensor, class_mask: Tensor | None) -> Tensor:  # the sum over [..., P]
    # Masked classes hold 0 * inf or inf - inf here; both their value and their gradient are zero.
    return (values if class_mask is None else values.masked_fill(~class_mask, 0)).sum(dim=-1)


def formula(x: TeacherKl, reduction: str, details: bool) -> tuple[Tensor, ...]:
    """The sum, or the mean over rows, and the details, by the fewest operations.

    For training on few logits: the gradient by the student's logits is computed with the loss.
    """
    z = product(x.features, x.prototypes, x.scale / x.temperature)
    with torch.no_grad():
        models = [z]
        teachers = zip(x.teacher_features, x.teacher_prototypes, x.teacher_scales, strict=True)
        for of, w, scale in teachers:
            models.append(product(of, w, scale / x.temperature))
        if x.class_mask is not None:
            # Not minus infinity, of which a product with zero is NaN.
            masked, least = ~x.class_mask, torch.finfo(z.dtype).min / 4
            models = [each.masked_fill(masked, least) for each in models]
        index = outside = None
        if x.target is not None and x.weights is None and x.gate_label:
            index, outside = in_range(x.target, len(x.prototypes))
        kl, weights, entropy, g = divergences(models, 1, x, x.weights, index, details)
        if outside is not None:
            weights = weights.masked_fill(outside.unsqueeze(1), torch.nan)
        total = (weights * kl).sum()
    total = known(z, total, g, x[:3])
    if x.weights is not None and x.weights.requires_grad:
        # Adds zero, with the gradient kl.
        total = total + ((x.weights - x.weights.detach()) * kl).sum()
    t2 = x.temperature**2 if x.scale_by_t2 else 1.0
    total = total * (t2 / len(z) if reduction == "mean" else t2)
    return (total, kl * t2, weights, entropy) if entropy is not None and details else (total,)


def divergences(
    models: Sequence[Tensor],  # logits [rows, columns] at the temperature; the student's first
    dim: int,  # along which they are distributions
    gate: Any,  # with the numbers of a gate, as `TeacherKl` has
    weights: Tensor | None,  # [N, K]
    index: Tensor | None,  # [N] int64, of the labels
    entropies: bool,  # whether they are wanted
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """KL without T^2, weights and entropies [N, K], and the gradient of their sum by the logits."""
    log_q, *log_p = (torch.log_softmax(each, dim) for each in models)
    q, *p = (each.exp() for each in (log_q, *log_p))
    kl = torch.stack([(a * (b - log_q)).sum(dim) for a, b in zip(p, log_p, strict=True)], 1)
    entropy = at_target = None
    if entropies or gate.gate_entropy:
        entropy = torch.stack([(a * b).sum(dim) for a, b in zip(p, log_p, strict=True)], 1).neg_()
    if weights is not None:
        weights = weights.to(kl.dtype, copy=True)
    else:
        if index is not None:
            places = index.unsqueeze(dim)
            at_target = torch.cat([each.gather(dim, places).reshape(-1, 1) for each in log_p], 1)
        weights = gates.weights_of(gate, entropy, at_target, like=kl)
    # Each difference is zero where a teacher is the student.
    g = torch.sub(q, p[0]).mul_(weights[:, 0].unsqueeze(dim))
    for k, each in enumerate(p[1:], 1):
        g.addcmul_(torch.sub(q, each), weights[:, k].unsqueeze(dim))
    return kl, weights, entropy, g


define(
    "teacher_kl",
    TeacherKl,
    check=check,
    reference=reference,
    details=lambda x: [(x.features.shape[0], len(x.teacher_features))] * 3,
    results=3,
    formula=formula,
    factor_of_weights=lambda x: 1.0,
)


def loss(
    student: Operands,
    teachers: Sequence[Operands],
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,  # [N, K], of any floating dtype
    weighting: Weighting,  # where weights are not given
    target: Tensor | None,  # [N] int64
    class_mask: Tensor | None,  # [P] bool
    reduction: str,
    details: bool = True,
) -> tuple[Tensor, ...]:
    """The sum, the mean over rows, or a loss per row [N]; then kl, weights and entropy [N, K].

    Without `details` these may be missing.

    Student and teachers of different dtypes, none of them float64, are promoted to a common one.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    models = in_one_dtype(student, teachers)
    (features, prototypes, scale), *others = models
    if weighting.gate.weights is not None:
        weights = gate_weights(weighting.gate, models[0], others, target, class_mask)
    elif weights is not None:
        weights = weights.to(wide(features.dtype))
    of_student = features, prototypes, scalar(scale, features)
    options: Any = target, class_mask, temperature, *weighting.numbers, scale_by_t2
    x = TeacherKl(*of_student, *in_lists(others, features), weights, *options)
    return calls.call("teacher_kl", x, reduction, details)[:4]


def in_lists(
    teachers: Sequence[Operands], like: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features, prototypes and scales of K teachers."""
    xs, ws, scales = [], [], []
    for x, w, scale in teachers:
        xs.append(x)
        ws.append(w)
        scales.append(scalar(scale, like))
    return xs, ws, scales


def in_one_dtype(student: Operands, teachers: Sequence[Operands]) -> list[Operands]:
    """Student and teachers, `rounded`, in the dtype of all: a kernel takes one dtype.

    Raises:
        TypeError: the dtypes of one of them differ outside autocast.
    """
    models = [student, *teachers]
    dtype = student[0].dtype
    if not autocasting(student[0].device.type):
        for x, w, _ in models:
            if not x.dtype == w.dtype == dtype:
                break
        else:
            return models
    named = {"student": student} | {f"teachers[{k}]": each for k, each in enumerate(teachers)}
    models = [
        rounded(model, (f"{name}.features", f"{name}.prototypes")) for name, model in named.items()
    ]
    # Rounding a teacher to the student's would be cheaper, but wrong.
    dtype = models[0][0].dtype
    for x, _, _ in models:
        dtype = torch.promote_types(dtype, x.dtype)
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
    (features, prototypes, _), *models = in_one_dtype(student, teachers)
    of_teachers = in_lists(models, features)
    # The function may compute with them, so they are checked before and not by the operator alone.
    check_teachers((features, prototypes), of_teachers)
    values = torch_private.has_values(features)
    checks.class_mask(class_mask, prototypes, values)
    if gate.needs_target and target is not None:
        checks.target(target, features, prototypes, class_mask, None, values)
    weights = gate.weights(list(zip(*of_teachers, strict=True)), target, class_mask)
    what = f'weights of gate "{gate.name}"'
    checks.is_tensor(what, weights, "a tensor [N, K] from its function")
    if not weights.is_floating_point():
        raise TypeError(f"{what}: got {weights.dtype}, wanted a floating point tensor [N, K]")
    checks.shape(what, weights, (features.shape[0], len(teachers)))
    return weights.detach().to(wide(features.dtype))
