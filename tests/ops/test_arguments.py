"""The functions of `mulki.ops`: what they make of scales, dtypes and devices."""

from __future__ import annotations

import pytest
import torch

from mulki import ops
from mulki.ops import backends
from mulki.ops.gates import discrepancy_weights, find_gate
from mulki.ops.logits import wide

UNIFORM = find_gate("uniform")


@pytest.fixture
def calls(monkeypatch):
    """The operators that were called and their arguments."""
    made = []

    class Spy(backends.Reference):
        def kernel(self, op):
            kernel = super().kernel(op)
            return lambda *args: (made.append((op, args)), kernel(*args))[1]

    monkeypatch.setitem(backends.BACKENDS, "reference", Spy())
    with ops.use_backend("reference"):
        yield made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [9, 9.0, torch.tensor(9.0), torch.tensor(9.0).bfloat16()])
def test_scales_become_wide_tensors(unit, calls, dtype, scale):
    x, w = unit(6, 4).to(dtype), unit(6, 4).to(dtype)
    ops.siglip.loss((x, w, scale), -3, "mean")
    for number, value in zip(calls[0][1][2:4], (9, -3), strict=True):
        assert (number.shape, number.dtype) == ((), wide(dtype))
        assert number == value


@pytest.mark.parametrize("scales", [(9.0, 9.0), (9.0, 4.0), (9.0, torch.tensor(4.0)), (9, 9.5)])
def test_scales_of_teachers_are_stacked(unit, calls, scales):
    x, w = unit(6, 4).float(), unit(5, 4).float()
    teachers = [(x, w, scale) for scale in scales]
    options = 2.0, True, None, UNIFORM, (0.0, 0.0), 1.0, None, None, "mean"
    ops.teacher_kl.loss((x, w, 5.0), teachers, *options)
    stacked = calls[0][1][5]
    assert stacked.dtype == torch.float32
    assert stacked.tolist() == [float(scale) for scale in scales]


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_dtypes_are_promoted_and_results_stay_the_students(
    unit, calls, student, teacher, kernel
):
    x, w, weights = unit(6, 4).to(student).requires_grad_(), unit(5, 4).to(student), unit(6, 2)
    u, v = unit(6, 3).to(teacher), unit(5, 3).to(teacher)
    teachers = [(u, v, 7.0), (x.detach(), w, 8.0)]
    options = 2.0, True, weights, UNIFORM, (0.0, 0.0), 1.0, None, None, "mean"
    out = ops.teacher_kl.loss((x, w, 5.0), teachers, *options)
    args = calls[0][1]
    assert {t.dtype for t in (*args[:2], *args[3], *args[4])} == {kernel}
    assert all(o.dtype == wide(student) for o in out)
    exact = [(a.detach().double(), b.double(), s) for a, b, s in ((x, w, 5.0), *teachers)]
    want = ops.teacher_kl.loss(exact[0], exact[1:], *options)
    torch.testing.assert_close(out[0].double(), want[0], rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(out[0], x)[0].dtype == student


def test_the_discrepancy_gate_becomes_weights_that_are_constants(unit, calls):
    x, w = unit(6, 4).float().requires_grad_(), unit(5, 4).float()
    u, v = unit(6, 4).float(), unit(6, 4).float()
    teachers = [(u, w, 7.0), (v, w, 8.0)]
    gate = find_gate("discrepancy"), (0.0, 0.0)
    loss, kl, used, _ = ops.teacher_kl.loss(
        (x, w, 5.0), teachers, 2.0, True, None, *gate, 1.0, None, None, "mean"
    )
    given = calls[0][1][6]
    assert given.equal(discrepancy_weights(teachers)) and not given.requires_grad
    assert used.equal(given)
    torch.testing.assert_close(loss, (given * kl).sum(dim=1).mean())


def test_weights_are_differentiable_in_any_floating_dtype(unit):
    x, w = unit(6, 4).float(), unit(5, 4).float()
    teachers = [(unit(6, 3).float(), unit(5, 3).float(), 7.0)]
    for dtype in (torch.float64, torch.float16):
        weights = torch.rand(6, 1).to(dtype).requires_grad_()
        for reduction in ("none", "sum", "mean"):
            options = 2.0, True, weights, UNIFORM, (0.0, 0.0), 1.0, None, None, reduction
            loss, kl, *_ = ops.teacher_kl.loss((x, w, 5.0), teachers, *options)
            (grad,) = torch.autograd.grad(loss.sum(), weights)
            assert grad.dtype == dtype
            torch.testing.assert_close(grad, (kl / 6 if reduction == "mean" else kl).to(dtype))
