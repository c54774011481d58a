from __future__ import annotations

import torch
import torch.nn.functional as F

from mulki.functional import (
    prototype_similarity,
)
from tests.functional.formulas import D, N, P, assert_same_gradients, leaves, logits


class TestPrototypeSimilarity:
    def test_is_the_scaled_matrix(self, student):
        got = prototype_similarity(*leaves(student))
        torch.testing.assert_close(got, logits(student))
        assert_same_gradients(got, logits(student), leaves(student))

    def test_normalize_gives_cosines(self, unit):
        x, w = (3 * unit(N, D)).requires_grad_(), (0.2 * unit(P, D)).requires_grad_()
        got = prototype_similarity(x, w, 10.0, normalize=True)
        expected = 10 * F.cosine_similarity(x[:, None], w[None], dim=2)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, (x, w))
