"""The public functions on the Triton kernels, through dispatcher and autograd."""

from __future__ import annotations

import pytest
import torch

from mulki import Similarity, functional
from mulki.ops import use_backend
from tests.kernels.triton_helpers import TOLERANCE, close
from tests.ops.op_cases import unit_rows


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("MULKI_STRICT", "1")


def losses(reduction):
    generator = torch.Generator().manual_seed(0)

    def rows(n, d):
        return unit_rows(generator, n, d).float()

    x, w = rows(18, 8).requires_grad_(), rows(18, 8).requires_grad_()
    scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    target = torch.arange(18) % 5
    student = Similarity(x, w, scale)
    first, second = Similarity(rows(18, 8), rows(18, 8), 9.0), Similarity(rows(18, 6), rows(18, 6))
    pairs = x, w, scale
    return [x, w, scale, bias], [
        functional.prototype_cross_entropy(
            student, target, label_smoothing=0.1, reduction=reduction
        ),
        functional.dual_teacher_kl(student, first, second, target=target, reduction=reduction),
        functional.clip_contrastive(*pairs, reduction=reduction),
        functional.siglip(*pairs, bias, reduction=reduction),
        functional.prototype_similarity(x, w, scale, normalize=True).square().mean(),
    ]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_functions_agree_with_the_reference(reduction):
    found = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            leaves, made = losses(reduction)
            total = sum((i + 1) * loss.square().sum() for i, loss in enumerate(made))
            found.append([*made, *torch.autograd.grad(total, leaves)])
    for one, other in zip(*found, strict=True):
        close(one, other, TOLERANCE[torch.float32])
