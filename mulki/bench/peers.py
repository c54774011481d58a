"""PyTorch's own fused loss, `torch.nn.functional.linear_cross_entropy`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.bench.cases import Case
from mulki.bench.losses import TEMPERATURE, Loss, Matrix, logits, teacher_weights


def torch_lce(case: Case) -> Loss:
    """As it is without options: a product and a cross-entropy."""
    if case.teachers:
        return _torch_lce_of_probabilities
    return lambda x, w, scale, target: F.linear_cross_entropy(scale * x, w, target)


def _torch_lce_of_probabilities(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix, ...], target: Tensor
) -> Tensor:
    """The cross-entropy to the mean of the teachers, less their entropy: all their KLs at once."""
    # Probabilities of half precision do not add up to one.
    log_p = [F.log_softmax(logits(*t).float() / TEMPERATURE, dim=1) for t in teachers]
    if len(teachers) == 2:
        weights = teacher_weights(log_p, target).unbind(1)
    else:
        weights = (x.new_full((len(x),), 1 / len(teachers), dtype=torch.float32),) * len(teachers)
    mean, entropy = torch.zeros_like(log_p[0]), torch.zeros_like(weights[0])
    for weight, log in zip(weights, log_p, strict=True):
        weighted = weight.unsqueeze(1) * log.exp()
        mean += weighted
        entropy -= (weighted * log).sum(1)
    cross_entropy = F.linear_cross_entropy(scale / TEMPERATURE * x, w, mean)
    return (cross_entropy - entropy.mean()) * TEMPERATURE**2


def torch_lce_refusal(case: Case) -> str | None:
    """Why it does not apply to a case."""
    of_teachers = case.teachers and case.operator != "pair_kl"
    if not of_teachers and case.operator != "prototype_cross_entropy":
        return "has cross-entropy to labels or probabilities alone"
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return None


def torch_lce_chunks(case: Case) -> Loss:
    """With its options as they are by default: chunks of logits, gradients in the forward pass."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, scale, target: F.linear_cross_entropy(scale * x, w, target, options=options)


def torch_lce_chunks_refusal(case: Case) -> str | None:
    """Why it does not apply to a case."""
    if case.operator != "prototype_cross_entropy":
        return "has cross-entropy to labels alone"
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunks in linear_cross_entropy"
    return None
