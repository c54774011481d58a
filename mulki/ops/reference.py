"""The specification of every operator, in plain PyTorch: short, exact in float64, differentiable.

Notation: X [N, D] features, W [P, D] prototypes, s scale, z = s X W^T [N, P] logits, T temperature,
m [P] boolean class mask (True takes part; a masked class has probability zero and no gradient).
Arguments arrive checked (`mulki.functional` does that). Half-precision inputs are multiplied in
float32: rounding logits to bf16 would drown the gradient of a student that is near its teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    class_mask: Tensor | None = None,  # [P] bool
) -> Tensor:  # [N, P] float32, or float64 for float64 inputs
    """z = s X W^T, masked classes at minus infinity."""
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    with torch.autocast(features.device.type, enabled=False):
        z = scale * (features.to(wide) @ prototypes.to(wide).mT)
    z = z.to(wide)
    return z if class_mask is None else z.masked_fill(~class_mask, -torch.inf)


def reduce(loss: Tensor, reduction: str, count: Tensor | int) -> Tensor:
    """Sum, mean over `count` rows, or the rows as they are."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / count


def similarity(features: Tensor, prototypes: Tensor, scale: Tensor | float) -> Tensor:
    """s X W^T in the dtype of X."""
    return logits(features, prototypes, scale).to(features.dtype)


def prototype_cross_entropy(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    target: Tensor,  # [N] int64
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """-(1 - e) log q_y - e mean_j log q_j, q = softmax(z), the mean over classes that take part.

    Equals `torch.nn.functional.cross_entropy` of the logits (its label smoothing after Szegedy et
    al., arXiv 1512.00567). The mean is over rows that are not ignored.
    """
    log_q = F.log_softmax(logits(features, prototypes, scale, class_mask), dim=1)
    kept = target != ignore_index
    picked = log_q.gather(1, target.where(kept, 0).unsqueeze(1)).squeeze(1)
    loss = -(1 - label_smoothing) * picked.masked_fill(~kept, 0)
    if label_smoothing:
        if class_mask is None:
            mean_log_q = log_q.mean(dim=1)
        else:
            mean_log_q = log_q.masked_fill(~class_mask, 0).sum(dim=1) / class_mask.sum()
        loss = loss - label_smoothing * mean_log_q.masked_fill(~kept, 0)
    return reduce(loss, reduction, kept.sum())


def gate_weights(
    gate: str,
    log_p: Tensor,  # [N, K, P] teachers' log-probabilities at temperature T
    entropy: Tensor,  # [N, K]
    features: Sequence[Tensor],  # K tensors [N, D_k], the teachers' features
    target: Tensor | None,  # [N] int64, for the gate "label"
    gate_temperature: float,
) -> Tensor:  # [N, K], rows sum to 1
    """How much each teacher counts for each sample.

    uniform: 1/K. confidence: softmax_k(-H(p_k) / t). label: softmax_k(log p_k[y] / t).
    discrepancy: for teachers (original, previous), w_previous = sigmoid(6 (|u_0 - u_1| - 0.2)) on
    their features, the gate of Select-and-Distill (Yu et al., ECCV 2024).
    """
    if gate == "uniform":
        return torch.full_like(entropy, 1 / entropy.shape[1])
    if gate == "confidence":
        return torch.softmax(-entropy / gate_temperature, dim=1)
    if gate == "label":
        assert target is not None
        index = target.reshape(-1, 1, 1).expand(-1, log_p.shape[1], 1)
        return torch.softmax(log_p.gather(2, index).squeeze(2) / gate_temperature, dim=1)
    assert gate == "discrepancy"
    original, previous = (u.to(entropy.dtype) for u in features)
    w = torch.sigmoid(6 * ((original - previous).norm(dim=1) - 0.2))
    return torch.stack([1 - w, w], dim=1)


def teacher_kl(
    student: tuple[Tensor, Tensor, Tensor | float],  # X [N, D], W [P, D], scale
    teachers: Sequence[tuple[Tensor, Tensor, Tensor | float]],  # the same, each its own D
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,  # [N, K], or None to take them from the gate
    gate: str,
    gate_temperature: float,
    target: Tensor | None,
    class_mask: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss, kl [N, K], weights [N, K], entropy [N, K]
    """sum_k w_ik KL_ik with KL_ik = T^2 sum_j p_ijk (log p_ijk - log q_ij).

    p = softmax(z_k / T) of teacher k, q = softmax(z / T) of the student: the forward direction of
    Hinton et al. (arXiv 1503.02531), whose T^2 keeps gradients comparable across temperatures.
    """
    log_q = F.log_softmax(logits(*student, class_mask) / temperature, dim=1)
    with torch.no_grad():
        log_p = torch.stack(
            [F.log_softmax(logits(*t, class_mask) / temperature, dim=1) for t in teachers], dim=1
        ).to(log_q.dtype)
        p = log_p.exp()
        excluded = None if class_mask is None else ~class_mask
        entropy = -_without(p * log_p, excluded).sum(dim=2)
        if weights is None:
            features = [t[0] for t in teachers]
            weights = gate_weights(gate, log_p, entropy, features, target, gate_temperature)
    kl = (p * _without(log_p - log_q.unsqueeze(1), excluded)).sum(dim=2)
    if scale_by_t2:
        kl = kl * temperature**2
    loss = (weights.to(kl.dtype) * kl).sum(dim=1)
    return reduce(loss, reduction, loss.shape[0]), kl, weights, entropy


def _without(values: Tensor, excluded: Tensor | None) -> Tensor:
    # Masked classes hold 0 * inf or inf - inf here; both their value and their gradient are zero.
    return values if excluded is None else values.masked_fill(excluded, 0)


def contrastive(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    reduction: str,
) -> Tensor:
    """1/2 [CE(z, diagonal) + CE(z^T, diagonal)], the loss of CLIP (arXiv 2103.00020)."""
    z = logits(image_features, text_features, logit_scale)
    if logit_bias is not None:
        z = z + logit_bias
    rows, columns = F.log_softmax(z, dim=1).diagonal(), F.log_softmax(z, dim=0).diagonal()
    return reduce(-(rows + columns) / 2, reduction, z.shape[0])


def siglip(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    reduction: str,
) -> Tensor:
    """-sum_j log sigmoid(y_ij (z_ij + b)), y = +1 on the diagonal and -1 off it, a row per image.

    The loss of SigLIP (arXiv 2303.15343); the mean divides by N, not by N^2.
    """
    z = logits(image_features, text_features, logit_scale) + logit_bias
    signs = 2 * torch.eye(z.shape[0], dtype=z.dtype, device=z.device) - 1
    return reduce(-F.logsigmoid(signs * z).sum(dim=1), reduction, z.shape[0])
