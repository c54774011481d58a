"""The reference behind the operators' signatures: every form of every operator, on any device.

`mulki.ops.schemas` says what goes in and out. Values of targets and masks are read, and checked,
on the CPU alone: elsewhere that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import checks, reference
from mulki.ops.reference import wide

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _narrow(gradients: Three, x: Tensor) -> Three:
    dx, dw, dscale = gradients
    return dx.to(x.dtype), dw.to(x.dtype), dscale


def similarity(x: Tensor, w: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    checks.operands(x, w)
    checks.number("scale", scale)
    return reference.similarity(x, w, scale, normalize)


def similarity_backward(
    grad: Tensor, x: Tensor, w: Tensor, scale: Tensor, normalize: bool, wanted: Sequence[bool]
) -> Three:
    dtype = wide(x.dtype)
    dz, rows, columns = grad.to(dtype), x.to(dtype).contiguous(), w.to(dtype).contiguous()
    if not normalize:
        return _narrow(reference.operand_gradients(dz, rows, columns, scale, wanted), x)
    dx, dw, dscale = reference.operand_gradients(
        dz, F.normalize(rows, dim=1), F.normalize(columns, dim=1), scale, wanted
    )
    if wanted[0]:
        dx = reference.normalize_gradient(dx, rows)
    if wanted[1]:
        dw = reference.normalize_gradient(dw, columns)
    return _narrow((dx, dw, dscale), x)


def _labelled_log_q(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    target: Tensor,
    class_mask: Tensor | None,
    ignore_index: int,
) -> Tensor:
    checks.operands(x, w)
    checks.number("scale", scale)
    checks.labels(x, w, target, class_mask)
    if x.device.type == "cpu":
        checks.class_mask_values(class_mask)
        checks.target_values(target, w.shape[0], class_mask, ignore_index)
    return F.log_softmax(reference.logits(x, w, scale, class_mask), dim=1)


def prototype_cross_entropy(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    log_q = _labelled_log_q(x, w, scale, target, class_mask, ignore_index)
    return reference.cross_entropy_rows(log_q, target, class_mask, label_smoothing, ignore_index)


def prototype_cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    wanted: Sequence[bool],
) -> Three:
    log_q = _labelled_log_q(x, w, scale, target, class_mask, ignore_index)
    dz = reference.cross_entropy_dz(log_q, target, class_mask, label_smoothing, ignore_index, grad)
    return _narrow(reference.operand_gradients(dz, x, w, scale, wanted), x)


def prototype_cross_entropy_reduced(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    wanted: Sequence[bool],
) -> Four:
    log_q = _labelled_log_q(x, w, scale, target, class_mask, ignore_index)
    options = target, class_mask, label_smoothing, ignore_index
    loss = reference.cross_entropy_rows(log_q, *options)
    count = (target != ignore_index).sum() if mean else loss.new_ones(())
    dz = reference.cross_entropy_dz(log_q, *options, (1 / count.to(loss.dtype)).expand_as(loss))
    return loss.sum() / count, *reference.operand_gradients(dz, x, w, scale, wanted)


class _KL(NamedTuple):
    log_q: Tensor  # [N, P]
    log_p: Tensor  # [N, K, P]
    loss: Tensor  # [N]
    kl: Tensor  # [N, K]
    weights: Tensor  # [N, K]
    entropy: Tensor  # [N, K]


def _weighted_kl(
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
) -> _KL:
    checks.operands(x, w)
    checks.number("scale", scale)
    checks.teachers(x, w, teacher_x, teacher_w, teacher_scales, weights)
    checks.gate(gate_label, weights, target)
    checks.labels(x, w, target, class_mask)
    if x.device.type == "cpu":
        checks.class_mask_values(class_mask)
        if weights is None and gate_label and target is not None:
            checks.target_values(target, w.shape[0], class_mask)
    teachers = list(zip(teacher_x, teacher_w, teacher_scales, strict=True))
    log_q, log_p = reference.log_probabilities((x, w, scale), teachers, temperature, class_mask)
    loss, kl, used, entropy = reference.weighted_kl(
        log_q,
        log_p,
        temperature,
        scale_by_t2,
        None if weights is None else weights.to(log_q.dtype, copy=True).contiguous(),
        (gate_entropy, gate_label),
        gate_temperature,
        target,
        class_mask,
    )
    return _KL(log_q, log_p, loss, kl, used, entropy)


def teacher_kl(*args: Any) -> Four:
    made = _weighted_kl(*args)
    return made.loss, made.kl, made.weights, made.entropy


def teacher_kl_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teacher_x: Sequence[Tensor],
    teacher_w: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor,
    class_mask: Tensor | None,
    temperature: float,
    scale_by_t2: bool,
    wanted: Sequence[bool],
) -> Three:
    teachers = list(zip(teacher_x, teacher_w, teacher_scales, strict=True))
    log_q, log_p = reference.log_probabilities((x, w, scale), teachers, temperature, class_mask)
    dz = reference.teacher_kl_dz(log_q, log_p, weights, temperature, scale_by_t2, grad)
    return _narrow(reference.operand_gradients(dz, x, w, scale, wanted), x)


def teacher_kl_reduced(*args: Any) -> tuple[Tensor, ...]:
    *forward, mean, wanted = args
    x, w, scale, *_, temperature, _, _, _, scale_by_t2 = forward
    made = _weighted_kl(*forward)
    total, share = _reduce(made.loss, mean)
    dz = reference.teacher_kl_dz(
        made.log_q, made.log_p, made.weights, temperature, scale_by_t2, share
    )
    gradients = reference.operand_gradients(dz, x, w, scale, wanted)
    return total, made.kl, made.weights, made.entropy, *gradients


def _reduce(loss: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    # The total, and its gradient by each row.
    n = loss.shape[0] if mean else 1
    return loss.sum() / n, torch.full_like(loss, 1 / max(n, 1))


def contrastive(x: Tensor, w: Tensor, scale: Tensor) -> Three:
    checks.pairs(x, w, scale)
    z = reference.logits(x, w, scale)
    rows, columns = F.log_softmax(z, dim=1), F.log_softmax(z, dim=0)
    row_lse, column_lse = (z.diagonal() - log.diagonal() for log in (rows, columns))
    return reference.contrastive_rows(rows, columns), row_lse, column_lse


def contrastive_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    wanted: Sequence[bool],
) -> Three:
    z = reference.logits(x, w, scale)
    dz = reference.contrastive_dz(z - row_lse.unsqueeze(1), z - column_lse, grad)
    return _narrow(reference.operand_gradients(dz, x, w, scale, wanted), x)


def contrastive_reduced(
    x: Tensor, w: Tensor, scale: Tensor, mean: bool, wanted: Sequence[bool]
) -> Four:
    checks.pairs(x, w, scale)
    z = reference.logits(x, w, scale)
    rows, columns = F.log_softmax(z, dim=1), F.log_softmax(z, dim=0)
    total, share = _reduce(reference.contrastive_rows(rows, columns), mean)
    dz = reference.contrastive_dz(rows, columns, share)
    return total, *reference.operand_gradients(dz, x, w, scale, wanted)


def _biased(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    checks.biased(x, w, scale, bias)
    return reference.logits(x, w, scale) + bias


def siglip(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    return reference.siglip_rows(_biased(x, w, scale, bias), offset)


def siglip_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    wanted: Sequence[bool],
) -> Four:
    dz = reference.siglip_dz(_biased(x, w, scale, bias), offset, grad)
    gradients = reference.operand_gradients(dz, x, w, scale, wanted[:3])
    return *_narrow(gradients, x), dz.sum() if wanted[3] else dz.new_empty(0)


def siglip_reduced(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    mean: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = _biased(x, w, scale, bias)
    total, share = _reduce(reference.siglip_rows(z, offset), mean)
    dz = reference.siglip_dz(z, offset, share)
    gradients = reference.operand_gradients(dz, x, w, scale, wanted[:3])
    return total, *gradients, dz.sum() if wanted[3] else dz.new_empty(0)
