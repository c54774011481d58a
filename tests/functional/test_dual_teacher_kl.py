from __future__ import annotations

import pytest
import torch

from mulki.functional import (
    dual_teacher_kl,
    teacher_kl,
)
from tests.functional.formulas import MASK, TARGET, N


class TestDualTeacherKL:
    @pytest.mark.parametrize("mask", [None, MASK])
    def test_equals_teacher_kl(self, student, teachers, mask):
        options = {
            "scale_by_t2": False,
            "gate_temperature": 0.5,
            "target": TARGET,
            "class_mask": mask,
            "reduction": "none",
        }
        for gate in ("uniform", "confidence", "label", None):
            got, details = dual_teacher_kl(
                student,
                *teachers[:2],
                temperature=3.0,
                gate=gate,
                return_details=True,
                **options,
            )
            expected, wanted = teacher_kl(
                student, teachers[:2], temperature=3.0, gate=gate, return_details=True, **options
            )
            assert got.equal(expected)
            for a, b in zip(details, wanted, strict=True):
                assert a.equal(b)

    def test_defaults_are_temperature_2_and_the_label_gate(self, student, teachers):
        expected = teacher_kl(student, teachers[:2], temperature=2.0, gate="label", target=TARGET)
        assert dual_teacher_kl(student, *teachers[:2], target=TARGET) == expected

    def test_weights_replace_the_gate(self, student, teachers):
        weights = torch.rand(N, 2, dtype=torch.float64)
        expected = teacher_kl(student, teachers[:2], temperature=2.0, weights=weights)
        assert dual_teacher_kl(student, *teachers[:2], weights=weights) == expected
