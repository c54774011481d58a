from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mulki.stages import eliciting


class TestEliciting:
    def test_alignment_is_the_symmetric_cross_entropy(self, student):
        z = student.scale * student.prototypes @ student.texts.T
        diagonal = torch.arange(4)
        expected = (F.cross_entropy(z, diagonal) + F.cross_entropy(z.T, diagonal)) / 2
        torch.testing.assert_close(eliciting.alignment_loss(student), expected)

    def test_gradient_reaches_texts_and_prototypes(self, student):
        loss = eliciting.alignment_loss(student)
        for grad in torch.autograd.grad(loss, (student.texts, student.prototypes)):
            assert grad.abs().max() > 1e-3

    def test_wants_prototypes(self, student):
        with pytest.raises(ValueError, match="^student: "):
            eliciting.alignment_loss(replace(student, prototypes=None))
