"""Learning without Forgetting: cross-entropy and one teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mulki import methods
from mulki.methods import PREVIOUS
from mulki.methods.lwf import LwF


def test_lwf_adds_the_kl_of_the_previous_model(student, model_features, target):
    previous = model_features(width=3)
    method = LwF(LwF.Options(temperature=3.0, distill_weight=0.7, label_smoothing=0.1))
    assert method.needs == methods.Needs(teachers=(PREVIOUS,))
    losses = method.losses(student, (previous,), target)
    z = student.scale * student.images @ student.texts.T
    z_previous = previous.scale * previous.images @ previous.texts.T
    kl = F.kl_div((z / 3).log_softmax(1), (z_previous / 3).softmax(1), reduction="batchmean")
    assert set(losses) == {"ce_loss", "distill_loss"}
    torch.testing.assert_close(losses["distill_loss"], 0.7 * 9 * kl)
    torch.testing.assert_close(losses["ce_loss"], F.cross_entropy(z, target, label_smoothing=0.1))
