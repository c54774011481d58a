"""The sigmoid loss alone: its bias, its matrices, and how texts are passed round."""

from __future__ import annotations

import pytest
import torch

from mulki.losses import SigLipLoss
from tests.losses.two_towers import OPEN_CLIP, outputs


def test_siglip_without_a_bias():
    _, out = outputs("siglip")
    out["logit_bias"] = None
    torch.testing.assert_close(SigLipLoss()(**out), OPEN_CLIP["siglip"]()(**out))


def test_bidir_of_older_versions_chooses_the_ring():
    with pytest.warns(UserWarning):
        made = [SigLipLoss(bidir=True), SigLipLoss(bidir=False), SigLipLoss(False, 0, 1, False)]
    with pytest.warns(UserWarning, match=r"bidir \(read as dist_impl='shift'\)"):
        SigLipLoss(bidir=False)
    assert [loss.dist_impl for loss in made] == ["bidir", "shift", "shift"]
    assert SigLipLoss().dist_impl == "bidir"


@pytest.mark.parametrize("bias", [None, torch.tensor(-3.0, dtype=torch.float64)])
def test_helpers_are_those_of_open_clip(bias):
    _, out = outputs("clip")
    operands = out["image_features"], out["text_features"], out["logit_scale"], bias
    mine, theirs = SigLipLoss(), OPEN_CLIP["siglip"]()
    of_one = [v.reshape(1) if v is not None and v.ndim == 0 else v for v in operands]
    for given in (operands, of_one):
        torch.testing.assert_close(mine.get_logits(*given), theirs.get_logits(*operands))
    for negative_only in (False, True):
        arguments = "cpu", torch.float32, 4, negative_only
        assert torch.equal(mine.get_ground_truth(*arguments), theirs.get_ground_truth(*arguments))


def test_logits_name_what_does_not_fit():
    with pytest.raises(ValueError, match="^text_features: got shape"):
        SigLipLoss().get_logits(torch.ones(4, 8), torch.ones(4, 7), 10.0)
    with pytest.raises(TypeError, match="^logit_bias: got str"):
        SigLipLoss().get_logits(torch.ones(4, 8), torch.ones(4, 8), 10.0, "high")


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="^dist_impl: got 'ring'"):
        SigLipLoss(dist_impl="ring")
