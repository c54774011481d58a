"""The distillation of pairs in both directions."""

from __future__ import annotations

import pytest
import torch

from mulki import Similarity
from mulki.functional import REDUCTIONS, pair_teacher_kl, teacher_kl

N = 6


@pytest.fixture
def models(unit):
    """A student that requires grad, and two teachers of other widths."""
    student = Similarity(unit(N, 4).requires_grad_(), unit(N, 4).requires_grad_(), 9.0)
    return student, [Similarity(unit(N, d), unit(N, d), 5.0) for d in (4, 7)]


@pytest.mark.parametrize("gate", [None, "label", "confidence", "discrepancy", "loss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_is_half_of_teacher_kl_in_either_direction(models, gate, reduction):
    student, teachers = models
    if gate == "discrepancy":  # which wants teachers of one width
        teachers = [teachers[0], student.detach()]
    options = {"gate": gate, "temperature": 2.0, "gate_temperature": 0.5, "reduction": reduction}
    loss, details = pair_teacher_kl(student, teachers, **options, return_details=True)
    target = torch.arange(N)
    rows, of_rows = teacher_kl(student, teachers, **options, target=target, return_details=True)
    columns, of_columns = teacher_kl(
        student.T, [t.T for t in teachers], **options, target=target, return_details=True
    )
    want = (rows + columns) / 2
    torch.testing.assert_close(loss, want)
    for both, *sides in zip(details, of_rows, of_columns, strict=True):
        torch.testing.assert_close(both, torch.stack(sides))
    leaves = student.features, student.prototypes
    for got, other in zip(
        torch.autograd.grad(loss.sum(), leaves),
        torch.autograd.grad(want.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, other)


def test_weights_have_a_gradient(models, unit):
    student, teachers = models
    weights = unit(2 * N, 2).abs().reshape(2, N, 2).requires_grad_()
    for reduction, factor in (("sum", 1), ("mean", 1 / N), ("none", 1)):
        loss, details = pair_teacher_kl(
            student, teachers, weights=weights, reduction=reduction, return_details=True
        )
        (gradient,) = torch.autograd.grad(loss.sum(), weights)
        torch.testing.assert_close(gradient, factor * details.kl / 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": torch.ones(N, 2)}, ValueError, r"weights: got shape \[6, 2\]"),
        ({"weights": torch.ones(2, N, 2), "gate": "label"}, ValueError, "gate: got 'label' toget"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"temperature": "2"}, TypeError, "temperature: got str"),
        ({"gate": "oracle"}, ValueError, "gate: got 'oracle'"),
        ({"gate": "blend"}, TypeError, "gate_entropy: got NoneType"),
        ({"reduction": "max"}, ValueError, "reduction: got 'max'"),
    ],
)
def test_bad_options(models, options, error, message):
    student, teachers = models
    with pytest.raises(error, match=message):
        pair_teacher_kl(student, teachers, **options)


def test_bad_models(models, unit):
    student, teachers = models
    with pytest.raises(TypeError, match="^teachers: got Similarity"):
        pair_teacher_kl(student, teachers[0])
    with pytest.raises(ValueError, match="teachers: got none"):
        pair_teacher_kl(student, [])
    with pytest.raises(ValueError, match=r"^student: got shape \[6, 5\]"):
        pair_teacher_kl(Similarity(unit(6, 4), unit(5, 4), 1.0), teachers)
    with pytest.raises(ValueError, match=r"teachers\[0\]: got shape \[5, 5\]"):
        pair_teacher_kl(student, [Similarity(unit(5, 4), unit(5, 4), 1.0)])
    student.features.data[2] = torch.nan
    with pytest.raises(ValueError, match="student.features.*row 2"):
        pair_teacher_kl(student, teachers, check_finite=True)
