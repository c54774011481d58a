"""Fine-tuning is cross-entropy alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mulki import methods
from mulki.methods.finetune import Finetune


def test_finetune_is_cross_entropy(student, target):
    method = Finetune(Finetune.Options(label_smoothing=0.1))
    assert method.needs == methods.Needs()
    losses = method.losses(student, (), target)
    z = student.scale * student.images @ student.texts.T
    assert list(losses) == ["ce_loss"]
    torch.testing.assert_close(losses["ce_loss"], F.cross_entropy(z, target, label_smoothing=0.1))
