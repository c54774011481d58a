from __future__ import annotations

import pytest
import torch

from mulki.ops.gates import Weighting
from mulki.stages import distinguishing
from tests.stages.formulas import expected_class_weights, expected_label_weights


class TestDistinguishing:
    def test_sample_weights_of_the_label_gate(self, student, teachers, target):
        got = distinguishing.sample_weights(
            student, teachers, target, Weighting.of("label"), temperature=2.0
        )
        torch.testing.assert_close(got, expected_label_weights(teachers, target))

    def test_temperatures_reach_the_gate(self, student, teachers, target):
        got = distinguishing.sample_weights(
            student, teachers, target, Weighting.of("label", 0.5), temperature=3.0
        )
        expected = (expected_label_weights(teachers, target, 3.0).log() / 0.5).softmax(dim=1)
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("gate", ["uniform", "confidence", "label", "discrepancy", "loss"])
    def test_weights_sum_to_one_and_are_constants(self, student, teachers, target, gate):
        gated = student, teachers, target, Weighting.of(gate), 2.0
        got = distinguishing.sample_weights(*gated)
        torch.testing.assert_close(got.sum(dim=1), torch.ones(6).double())
        assert not got.requires_grad
        loss, same = distinguishing.gated_relation(*gated, scale_by_t2=True)
        torch.testing.assert_close(same, got)
        assert loss.requires_grad and not same.requires_grad

    def test_class_weights_are_means_and_equal_for_a_class_without_samples(self, target):
        weights = torch.rand(6, 2, dtype=torch.float64).softmax(dim=1)
        got = distinguishing.class_weights(weights, target, 4)
        torch.testing.assert_close(got, expected_class_weights(weights, target, 4))
        assert got[3].tolist() == [0.5, 0.5]
        torch.testing.assert_close(got.sum(dim=1), torch.ones(4).double())

    @pytest.mark.parametrize("k", [1, 3])
    def test_absent_classes_weigh_k_teachers_equally(self, target, k):
        got = distinguishing.class_weights(torch.rand(6, k), target, 4)
        torch.testing.assert_close(got[3], torch.full((k,), 1 / k))

    def test_class_weights_are_not_rounded_under_autocast(self, target):
        weights = torch.rand(6, 2).softmax(dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            got = distinguishing.class_weights(weights, target, 4)
        assert got.equal(distinguishing.class_weights(weights, target, 4))
