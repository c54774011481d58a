"""Distinguishing Ideas: per-sample weights over the two teachers.

    w_b = gate(teachers' class distributions of sample b),   sum_k w_bk = 1
    w_c = mean of w_b over the batch's samples of class c    (for relations with a row per class)

Stated by the source (arXiv 2411.06764 and its published summaries): the knowledge of the two
teachers is re-weighted per sample by what each is good at. Our choice: the gates (see
`mulki.functional.teacher_kl`; "label" asks which teacher gives the true class more probability),
that one weight serves all levels of distillation, and that a class without a sample in the batch
weighs its teachers equally. Weights are constants for autograd. Held on made images, as by
default, the method `mulki` has the gate of Select-and-Distill, "discrepancy". docs/more-results.md
has what gates gave.

The image-to-text relation is the distribution that a gate looks at, so the pass that computes its
divergence gives the weights too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mulki.clip.features import Features
from mulki.clip.prototypes import class_sums
from mulki.ops import teacher_kl
from mulki.ops.gates import Weighting
from mulki.stages.adding import image_text


def gated_relation(
    student: Features,
    teachers: Sequence[Features],
    target: Tensor | None,
    weighting: Weighting,
    temperature: float,
    scale_by_t2: bool,
) -> tuple[Tensor, Tensor]:
    """The image-to-text relation's loss under the gate, and the weights of the gate.

    Args:
        student: features of a batch of B images and C classes; gradients flow to them.
        teachers: the same of K teachers.
        target: [B] int64; None where the gate does not look at it.
        weighting: the gate.
        temperature, scale_by_t2: of the relation, see `mulki.functional.teacher_kl`.

    Returns:
        The mean loss over the batch, and the weights [B, K], whose rows sum to 1.
    """
    options = temperature, scale_by_t2, None, weighting, target, None, "mean"
    others = [image_text(teacher) for teacher in teachers]
    loss, _, weights, _ = teacher_kl.loss(image_text(student), others, *options)
    return loss, weights


@torch.no_grad()
def sample_weights(
    student: Features,
    teachers: Sequence[Features],
    target: Tensor | None,
    weighting: Weighting,
    temperature: float,
) -> Tensor:
    """[B, K] weights of the gate alone, where the image-to-text relation is switched off.

    Arguments as `gated_relation`. The gate "uniform" costs nothing, a gate that is a function what
    that takes, any other one forward pass of the relation.
    """
    if weighting.gate.weights is not None:
        models = [image_text(model) for model in (student, *teachers)]
        return teacher_kl.gate_weights(weighting.gate, models[0], models[1:], target, None)
    if weighting.entropy == weighting.label == 0:
        k, images = len(teachers), student.images
        dtype = torch.promote_types(images.dtype, torch.float32)
        return images.new_full((images.shape[0], k), 1 / k, dtype=dtype)
    return gated_relation(student, teachers, target, weighting, temperature, True)[1]


def class_weights(weights: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """[C, K]: the mean weight of each class's samples, 1/K for a class that has none."""
    sums, counts = class_sums(weights, target, num_classes)
    counts = counts.unsqueeze(1)
    return torch.where(counts > 0, sums / counts, 1 / weights.shape[1])
