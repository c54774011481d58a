from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mulki import methods
from mulki.methods import PREVIOUS
from mulki.methods.finetune import Finetune
from mulki.methods.lwf import LwF
from mulki.methods.mulki import MulKI
from mulki.methods.zero_shot import ZeroShot
from tests.methods.method_helpers import add, start


class TestBaselines:
    def test_zero_shot_does_not_train(self, student, target):
        method = ZeroShot(ZeroShot.Options())
        assert not ZeroShot.trains
        with pytest.raises(TypeError, match="zero_shot does not train"):
            method.losses(student, (), target)

    @pytest.mark.parametrize("method", [Finetune, LwF, ZeroShot])
    def test_baselines_have_no_state_and_leave_weights_alone(self, method, weights):
        made = start(method(method.Options()), weights)
        add(weights, 1.0)
        made.after_step(1)
        made.end_task()
        assert not made.state_dict() and not list(made.parameters())
        assert made.penalties() == {} and made.prototypes() is None
        assert weights["a"].tolist() == [2, 2, 2]

    def test_finetune_is_cross_entropy(self, student, target):
        method = Finetune(Finetune.Options(label_smoothing=0.1))
        assert method.needs == methods.Needs()
        losses = method.losses(student, (), target)
        z = student.scale * student.images @ student.texts.T
        assert list(losses) == ["ce_loss"]
        torch.testing.assert_close(
            losses["ce_loss"], F.cross_entropy(z, target, label_smoothing=0.1)
        )

    def test_lwf_adds_the_kl_of_the_previous_model(self, student, model_features, target):
        previous = model_features(width=3)
        method = LwF(LwF.Options(temperature=3.0, distill_weight=0.7, label_smoothing=0.1))
        assert method.needs == methods.Needs(teachers=(PREVIOUS,))
        losses = method.losses(student, (previous,), target)
        z = student.scale * student.images @ student.texts.T
        z_previous = previous.scale * previous.images @ previous.texts.T
        kl = F.kl_div((z / 3).log_softmax(1), (z_previous / 3).softmax(1), reduction="batchmean")
        assert set(losses) == {"ce_loss", "distill_loss"}
        torch.testing.assert_close(losses["distill_loss"], 0.7 * 9 * kl)
        torch.testing.assert_close(
            losses["ce_loss"], F.cross_entropy(z, target, label_smoothing=0.1)
        )

    def test_defaults_are_those_of_the_benchmark(self):
        assert Finetune.Options().label_smoothing == LwF.Options().label_smoothing == 0.2
        assert MulKI.Options().label_smoothing == 0.2
        assert LwF.Options().temperature == MulKI.Options().temperature == 2.0
