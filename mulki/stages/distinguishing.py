"""Distinguishing Ideas: per-sample weights over the two teachers.

    w_b = gate(teachers' class distributions of sample b),   sum_k w_bk = 1
    w_c = mean of w_b over the batch's samples of class c    (for relations with a row per class)

Stated by the source (arXiv 2411.06764 and its published summaries): the knowledge of the two
teachers is re-weighted per sample by what each is good at. Our choice: the gates (see
`mulki.functional.teacher_kl`; the default asks which teacher gives the true class more
probability), that one weight serves all levels of distillation, and that a class without a sample
in the batch weighs its teachers equally. Weights are constants for autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mulki.features import Features
from mulki.functional import Gate, teacher_kl
from mulki.prototypes import class_sums


@torch.no_grad()
def sample_weights(
    teachers: Sequence[Features],
    target: Tensor,
    gate: Gate,
    temperature: float,
    gate_temperature: float,
) -> Tensor:
    """[B, K] weights of K teachers for the B samples of a batch; rows sum to 1."""
    logits = [t.image_text().detach() for t in teachers]
    # The gate reads the teachers alone, so any student will do to get at the details.
    _, details = teacher_kl(
        logits[0],
        logits,
        temperature=temperature,
        gate=gate,
        gate_temperature=gate_temperature,
        target=target,
        return_details=True,
    )
    return details.weights


def class_weights(weights: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """[C, K]: the mean weight of each class's samples, 1/K for a class that has none."""
    sums, counts = class_sums(weights, target, num_classes)
    means = sums / counts.clamp(min=1).unsqueeze(1)
    return torch.where((counts > 0).unsqueeze(1), means, 1 / weights.shape[1])
