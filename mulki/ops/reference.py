"""The specification of every operator, in plain PyTorch: short, exact in float64, differentiable.

Notation: X [N, D] features, W [P, D] prototypes, s scale, z = s X W^T [N, P] logits, T temperature,
m [P] boolean class mask (True takes part; a masked class has probability zero and no gradient).
Arguments arrive checked (`mulki.functional` does that). Half-precision inputs are multiplied in
float32: rounding logits to bf16 would drown the gradient of a student that is near its teacher.

Beside each loss stands its gradient G = dL/dz, `..._dz`, for an upstream gradient g [N] per row;
`operand_gradients` carries G on to X, W and s. Inside an operator there is no autograd to do so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import gates


def wide(dtype: torch.dtype) -> torch.dtype:
    """What inputs of this dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    class_mask: Tensor | None = None,  # [P] bool
) -> Tensor:  # [N, P] float32, or float64 for float64 inputs
    """z = s X W^T, masked classes at minus infinity."""
    dtype = wide(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        z = scale * (features.to(dtype) @ prototypes.to(dtype).mT)
    z = z.to(dtype)
    return z if class_mask is None else z.masked_fill(~class_mask, -torch.inf)


def reduce(loss: Tensor, reduction: str, count: Tensor | int) -> Tensor:
    """Sum, mean over `count` rows, or the rows as they are."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / count


def operand_gradients(
    dz: Tensor,  # [N, P], dL/dz
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor,  # 0-d
    wanted: Sequence[bool],  # of dX, dW, ds
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = s G W, dW = s G^T X, ds = <X, G W>; those not wanted as empty [0]."""
    x, w = features.to(dz.dtype), prototypes.to(dz.dtype)
    gw = dz @ w if wanted[0] or wanted[2] else None
    dx = dz.new_empty(0) if gw is None or not wanted[0] else scale * gw
    dw = scale * (dz.mT @ x) if wanted[1] else dz.new_empty(0)
    ds = dz.new_empty(0) if gw is None or not wanted[2] else (x * gw).sum()
    return dx, dw, ds


def similarity(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    normalize: bool = False,
) -> Tensor:
    """s X W^T in the dtype of X, the rows of both L2-normalised first if asked for."""
    dtype = features.dtype
    if normalize:
        features, prototypes = (
            F.normalize(v.to(wide(dtype)), dim=1) for v in (features, prototypes)
        )
    return logits(features, prototypes, scale).to(dtype)


def normalize_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient through u = v / max(|v|, 1e-12): (g - u <u, g>) / |v| for a row v of `rows`."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    u = rows / norm.clamp(min=1e-12)
    along = (u * grad).sum(dim=1, keepdim=True).masked_fill(norm < 1e-12, 0)
    return (grad - u * along) / norm.clamp(min=1e-12)


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
    loss = cross_entropy_rows(log_q, target, class_mask, label_smoothing, ignore_index)
    return reduce(loss, reduction, (target != ignore_index).sum())


def cross_entropy_rows(
    log_q: Tensor,  # [N, P]
    target: Tensor,  # [N] int64
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:  # [N]
    """The loss of each row, zero where it is ignored."""
    kept = target != ignore_index
    picked = log_q.gather(1, target.where(kept, 0).unsqueeze(1)).squeeze(1)
    loss = -(1 - label_smoothing) * picked.masked_fill(~kept, 0)
    if label_smoothing:
        if class_mask is None:
            mean_log_q = log_q.mean(dim=1)
        else:
            mean_log_q = log_q.masked_fill(~class_mask, 0).sum(dim=1) / class_mask.sum()
        loss = loss - label_smoothing * mean_log_q.masked_fill(~kept, 0)
    return loss


def cross_entropy_dz(
    log_q: Tensor,  # [N, P]
    target: Tensor,  # [N] int64
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    upstream: Tensor,  # [N]
) -> Tensor:  # [N, P]
    """g_i (q_ij - (1 - e) [j = y_i] - e / C) over the C classes that take part, else zero."""
    kept = (target != ignore_index).unsqueeze(1)
    dz = log_q.exp()
    if label_smoothing:
        spread = dz.new_ones(dz.shape[1]) if class_mask is None else class_mask.to(dz.dtype)
        dz = dz - label_smoothing * spread / spread.sum()
    index = target.unsqueeze(1).where(kept, 0)
    hit = torch.full_like(upstream, label_smoothing - 1).unsqueeze(1)
    # An ignored row may carry 0/0, the mean over no rows; its gradient is zero all the same.
    return (upstream.unsqueeze(1) * dz.scatter_add(1, index, hit)).masked_fill(~kept, 0)


def teacher_kl(
    student: tuple[Tensor, Tensor, Tensor | float],  # X [N, D], W [P, D], scale
    teachers: Sequence[tuple[Tensor, Tensor, Tensor | float]],  # the same, each its own D
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,  # [N, K], or None to take them from the gate
    gate: tuple[float, float],  # its numbers for entropy and label
    gate_temperature: float,
    target: Tensor | None,
    class_mask: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss, kl [N, K], weights [N, K], entropy [N, K]
    """sum_k w_ik KL_ik with KL_ik = T^2 sum_j p_ijk (log p_ijk - log q_ij).

    p = softmax(z_k / T) of teacher k, q = softmax(z / T) of the student: the forward direction of
    Hinton et al. (arXiv 1503.02531), whose T^2 keeps gradients comparable across temperatures.
    """
    log_q, log_p = log_probabilities(student, teachers, temperature, class_mask)
    loss, kl, weights, entropy = weighted_kl(
        log_q,
        log_p,
        temperature,
        scale_by_t2,
        weights,
        gate,
        gate_temperature,
        target,
        class_mask,
    )
    return reduce(loss, reduction, loss.shape[0]), kl, weights, entropy


def log_probabilities(
    student: tuple[Tensor, Tensor, Tensor | float],
    teachers: Sequence[tuple[Tensor, Tensor, Tensor | float]],
    temperature: float,
    class_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # log q [N, P] and, without a gradient, log p [N, K, P]
    """Log-softmax of the logits over T, the teachers' in the dtype of the student's."""
    log_q = F.log_softmax(logits(*student, class_mask) / temperature, dim=1)
    with torch.no_grad():
        rows = [F.log_softmax(logits(*t, class_mask) / temperature, dim=1) for t in teachers]
        return log_q, torch.stack(rows, dim=1).to(log_q.dtype)


def weighted_kl(
    log_q: Tensor,  # [N, P]
    log_p: Tensor,  # [N, K, P]
    temperature: float,
    scale_by_t2: bool,
    weights: Tensor | None,
    gate: tuple[float, float],
    gate_temperature: float,
    target: Tensor | None,
    class_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss [N], kl [N, K], weights [N, K], entropy [N, K]
    """The rows of `teacher_kl` and what it gives beside them."""
    excluded = None if class_mask is None else ~class_mask
    p = log_p.exp()
    entropy = -_without(p * log_p, excluded).sum(dim=2)
    if weights is None:
        weights = gates.row_weights(log_p, entropy, *gate, target, gate_temperature)
    kl = (p * _without(log_p - log_q.unsqueeze(1), excluded)).sum(dim=2)
    if scale_by_t2:
        kl = kl * temperature**2
    return (weights.to(kl.dtype) * kl).sum(dim=1), kl, weights, entropy


def teacher_kl_dz(
    log_q: Tensor,  # [N, P]
    log_p: Tensor,  # [N, K, P]
    weights: Tensor,  # [N, K]
    temperature: float,
    scale_by_t2: bool,
    upstream: Tensor,  # [N]
) -> Tensor:  # [N, P]
    """g_i T sum_k w_ik (q_ij - p_ijk), or 1/T in place of T without the factor T^2."""
    factor = temperature if scale_by_t2 else 1 / temperature
    gap = log_q.exp().unsqueeze(1) - log_p.exp()
    row = (factor * upstream).unsqueeze(1) * weights
    return (row.to(gap.dtype).unsqueeze(2) * gap).sum(dim=1)


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
    rows, columns = F.log_softmax(z, dim=1), F.log_softmax(z, dim=0)
    return reduce(contrastive_rows(rows, columns), reduction, z.shape[0])


def contrastive_rows(log_rows: Tensor, log_columns: Tensor) -> Tensor:
    """The loss of each pair from the log-softmax of z over its rows and over its columns."""
    return -(log_rows.diagonal() + log_columns.diagonal()) / 2


def contrastive_dz(
    log_rows: Tensor,  # [N, N], log-softmax of z over its rows
    log_columns: Tensor,  # [N, N], the same over its columns
    upstream: Tensor,  # [N]
) -> Tensor:  # [N, N]
    """(g_i r_ij + g_j c_ij) / 2 - g_i [i = j], r and c the softmax over rows and over columns."""
    g = upstream
    return (g.unsqueeze(1) * log_rows.exp() + g * log_columns.exp()) / 2 - torch.diag(g)


def siglip(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [P, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    reduction: str,
    offset: int = 0,
) -> Tensor:
    """-sum_j log sigmoid(y_ij (z_ij + b)), y = +1 where j = i + offset and -1 elsewhere.

    The loss of SigLIP (arXiv 2303.15343), a row per image; the mean divides by N, not by N^2. With
    another offset than 0 the rows are a block of a larger batch: image i has its text in column
    i + offset, or in no column of this block.
    """
    z = logits(image_features, text_features, logit_scale) + logit_bias
    return reduce(siglip_rows(z, offset), reduction, z.shape[0])


def siglip_rows(z: Tensor, offset: int) -> Tensor:
    """The loss of each row of logits z [N, P] that hold the bias."""
    return -F.logsigmoid(_signs(z, offset) * z).sum(dim=1)


def siglip_dz(z: Tensor, offset: int, upstream: Tensor) -> Tensor:
    """-g_i y_ij sigmoid(-y_ij z_ij) for logits that hold the bias; the bias's is its sum."""
    signs = _signs(z, offset)
    return -upstream.unsqueeze(1) * signs * torch.sigmoid(-signs * z)


def _signs(z: Tensor, offset: int) -> Tensor:
    rows, columns = (torch.arange(count, device=z.device) for count in z.shape)
    return 2 * (columns == rows.unsqueeze(1) + offset).to(z.dtype) - 1
