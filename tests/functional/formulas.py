"""Small inputs, and each loss by the formula that defines it."""

from __future__ import annotations

import torch

from mulki import Similarity
from mulki.functional import (
    clip_contrastive,
    prototype_cross_entropy,
    prototype_similarity,
    siglip,
    teacher_kl,
)

GATES = ("uniform", "confidence", "label", "discrepancy")
N, P, D = 6, 5, 4
MASK = torch.tensor([True, False, True, True, False])
TARGET = torch.tensor([0, 2, 3, 3, 2, 0])  # of classes that MASK lets take part


def logits(s):
    return s.scale * s.features @ s.prototypes.T


def scalar(value, **options):
    return torch.tensor(value, dtype=torch.float64, **options)


def leaves(s):
    return s.features, s.prototypes, s.scale


def reduced(rows, reduction, count=None):
    """What a reduction of [N] rows is, by its definition."""
    if reduction == "none":
        return rows
    return (
        rows.sum() if reduction == "sum" else rows.sum() / (len(rows) if count is None else count)
    )


def assert_same_gradients(got, expected, inputs):
    upstream = torch.linspace(0.5, 2.0, got.numel(), dtype=got.dtype).reshape(got.shape)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream, retain_graph=True),
        torch.autograd.grad(expected, inputs, upstream, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def all_losses(student, teachers, weights, target=TARGET, mask=MASK):
    """Every loss once, by name, at options that use every argument."""
    x, w, scale = student.features, student.prototypes, student.scale
    n = min(len(x), len(w))
    return {
        "similarity": prototype_similarity(x, w, scale, normalize=True).square().mean(),
        "cross_entropy": prototype_cross_entropy(
            student, target, label_smoothing=0.2, class_mask=mask
        ),
        "gated": teacher_kl(
            student, teachers, temperature=2.0, gate="label", target=target, class_mask=mask
        ),
        "weighted": teacher_kl(student, teachers, temperature=2.0, weights=weights),
        "clip": clip_contrastive(x[:n], w[:n], scale),
        "siglip": siglip(x[:n], w[:n], scale, -3.0),
    }


X, W, PAIRS = torch.ones(N, D), torch.ones(P, D), torch.ones(N, D)
S = Similarity(X, W)
META = torch.device("meta")
