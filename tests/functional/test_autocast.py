"""All losses under autocast."""

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
from tests.functional.formulas import TARGET, D, N, P, all_losses


def test_autocast_rounds_the_features_and_nothing_else(unit):
    x, w, u = unit(N, D).float().requires_grad_(), unit(P, D).float(), unit(N, 3).float()
    v, scale, weights = unit(P, 3).float(), torch.tensor(9.0), unit(N, 1).abs().float()
    with torch.autocast("cpu", torch.bfloat16):
        got = all_losses(Similarity(x, w, scale), [Similarity(u, v, scale)], weights)
    rounded = Similarity(x.bfloat16(), w.bfloat16(), scale)
    teacher = Similarity(u.bfloat16(), v.bfloat16(), scale)
    expected = all_losses(rounded, [teacher], weights)
    exact = all_losses(Similarity(x, w, scale), [Similarity(u, v, scale)], weights)
    # Normalising comes before the rounding, so it has no equal among the rounded.
    for name in expected.keys() - {"similarity"}:
        assert got[name].dtype == torch.float32
        assert got[name].equal(expected[name]), name
        assert not got[name].equal(exact[name]), name
        (grad,) = torch.autograd.grad(got[name], x)
        assert grad.dtype == torch.float32 and grad.isfinite().all()


def test_autocast_takes_features_beside_frozen_prototypes_in_float32(unit):
    layer, images = torch.nn.Linear(D, D).requires_grad_(), unit(N, D).float()
    texts, scale = unit(P, D).float(), torch.tensor(9.0, requires_grad=True)
    pairs = unit(N, D).float()
    inputs = (layer.weight, scale)

    def losses(x, w, pairs):
        s = Similarity(x, w, scale)
        teacher = Similarity(x.detach().roll(1, 0), w, 7.0)
        return {
            "cross_entropy": prototype_cross_entropy(s, TARGET),
            "kl": teacher_kl(s, [teacher]),
            "clip": clip_contrastive(x, pairs, scale),
            "siglip": siglip(pairs, x, scale, -3.0),
            "similarity": prototype_similarity(x, w, scale).float().square().mean(),
        }

    with torch.autocast("cpu", torch.bfloat16):
        x = layer(images)
        assert x.dtype == torch.bfloat16
        got = losses(x, texts, pairs)
    expected = losses(x, texts.bfloat16(), pairs.bfloat16())
    for name, loss in got.items():
        assert loss.dtype == torch.float32
        assert loss.equal(expected[name]), name
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        wanted = torch.autograd.grad(expected[name], inputs, retain_graph=True)
        for a, b in zip(gradients, wanted, strict=True):
            assert a.dtype == torch.float32 and a.ne(0).any()
            assert a.equal(b), name


def test_autocast_leaves_float64_alone(student, teachers, unit):
    weights = unit(N, 3).abs()
    expected = all_losses(student, teachers, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = all_losses(student, teachers, weights)
    for name, loss in got.items():
        assert loss.dtype == torch.float64
        assert loss.equal(expected[name]), name
