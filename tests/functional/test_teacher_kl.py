from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mulki import Similarity
from mulki.functional import (
    REDUCTIONS,
    prototype_cross_entropy,
    teacher_kl,
)
from mulki.ops import loader, use_backend
from tests.functional.formulas import (
    GATES,
    MASK,
    META,
    TARGET,
    D,
    N,
    P,
    S,
    W,
    X,
    assert_same_gradients,
    leaves,
    logits,
    reduced,
)


def expected_kl(student, teachers, temperature, class_mask=None):
    """[N, K] by torch on stored logits, masked classes removed."""
    kept = slice(None) if class_mask is None else class_mask
    log_q = F.log_softmax(logits(student)[:, kept] / temperature, dim=1)
    columns = []
    for t in teachers:
        p = F.softmax(logits(t)[:, kept] / temperature, dim=1)
        columns.append(F.kl_div(log_q, p, reduction="none").sum(dim=1))
    return torch.stack(columns, dim=1)


def probabilities(teacher, temperature, i, class_mask=None):
    """Class probabilities of row i by plain arithmetic."""
    z = (logits(teacher)[i] / temperature).tolist()
    powers = [math.exp(v) if class_mask is None or class_mask[j] else 0.0 for j, v in enumerate(z)]
    return [power / sum(powers) for power in powers]


def entropy_of(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def expected_weights(gate, teachers, temperature, gate_temperature, class_mask=None):
    """[N, K] row by row from the written formula of each gate."""
    rows = []
    for i in range(N):
        ps = [probabilities(t, temperature, i, class_mask) for t in teachers]
        if gate == "discrepancy":
            gap = math.dist(teachers[0].features[i].tolist(), teachers[1].features[i].tolist())
            previous = 1 / (1 + math.exp(-6 * (gap - 0.2)))
            rows.append([1 - previous, previous])
            continue
        scores = {
            "uniform": [0.0 for _ in ps],
            "confidence": [-entropy_of(p) / gate_temperature for p in ps],
            "label": [math.log(p[TARGET[i]]) / gate_temperature for p in ps],
        }[gate]
        powers = [math.exp(score) for score in scores]
        rows.append([power / sum(powers) for power in powers])
    return torch.tensor(rows, dtype=torch.float64)


class TestTeacherKL:
    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize(("temperature", "t2"), [(1.0, True), (2.5, True), (2.5, False)])
    @pytest.mark.parametrize("mask", [None, MASK])
    def test_equals_kl_div(self, student, teachers, count, reduction, temperature, t2, mask):
        teachers = teachers[:count]
        got = teacher_kl(
            student,
            teachers,
            temperature=temperature,
            scale_by_t2=t2,
            class_mask=mask,
            reduction=reduction,
        )
        rows = expected_kl(student, teachers, temperature, mask).mean(dim=1)
        expected = reduced(rows * temperature**2 if t2 else rows, reduction)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, leaves(student))
        if mask is not None:
            grad = torch.autograd.grad(got.sum(), student.prototypes)[0]
            assert grad[~mask].eq(0).all() and grad[mask].ne(0).any(dim=1).all()

    def test_equals_a_loop(self, student, teachers):
        total = 0.0
        for i in range(N):
            q = probabilities(student.detach(), 2.0, i)
            for t in teachers:
                p = probabilities(t, 2.0, i)
                kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
                total += 4.0 * kl / 3
        got = teacher_kl(student, teachers, temperature=2.0, reduction="sum")
        assert got.item() == pytest.approx(total, rel=1e-12)

    @pytest.mark.parametrize("gate", GATES)
    @pytest.mark.parametrize("gate_temperature", [1.0, 0.3])
    @pytest.mark.parametrize("mask", [None, MASK])
    def test_gates_follow_their_formulas(self, student, unit, gate, gate_temperature, mask):
        # Discrepancies from 0 to 0.5, around the threshold of 0.2.
        x, gap = unit(N, D), torch.linspace(0, 0.5, N, dtype=torch.float64).unsqueeze(1)
        pair = [Similarity(x, unit(P, D), 8.0), Similarity(x + gap * unit(N, D), unit(P, D), 9.0)]
        options = {"temperature": 2.0, "gate_temperature": gate_temperature, "target": TARGET}
        loss, details = teacher_kl(
            student, pair, gate=gate, class_mask=mask, return_details=True, **options
        )
        weights = expected_weights(gate, pair, 2.0, gate_temperature, mask)
        torch.testing.assert_close(details.weights, weights)
        torch.testing.assert_close(details.weights.sum(dim=1), torch.ones(N).double())
        # Taking the weights as constants must give the same gradient: none flows through a gate.
        expected = (4.0 * weights * expected_kl(student, pair, 2.0, mask)).sum(dim=1).mean()
        torch.testing.assert_close(loss, expected)
        assert_same_gradients(loss, expected, leaves(student))

    @pytest.mark.parametrize("gate", ["uniform", "confidence", "label"])
    def test_gates_of_three_teachers_of_differing_width(self, student, teachers, gate):
        _, details = teacher_kl(
            student, teachers, gate=gate, target=TARGET, temperature=1.5, return_details=True
        )
        torch.testing.assert_close(details.weights, expected_weights(gate, teachers, 1.5, 1.0))

    def test_without_a_gate_teachers_count_equally(self, student, teachers):
        loss, details = teacher_kl(student, teachers, return_details=True)
        assert loss == teacher_kl(student, teachers, gate="uniform")
        torch.testing.assert_close(details.weights, torch.full((N, 3), 1 / 3).double())

    def test_weights_scale_the_rows_and_need_not_sum_to_one(self, student, teachers):
        weights = torch.arange(N * 3).reshape(N, 3).double().requires_grad_()
        got = teacher_kl(student, teachers, temperature=2.0, weights=weights)
        kl = 4.0 * expected_kl(student, teachers, 2.0)
        torch.testing.assert_close(got, (weights * kl).sum() / N)
        assert_same_gradients(got, (weights * kl).sum() / N, (*leaves(student), weights))

    @pytest.mark.parametrize("t2", [True, False])
    @pytest.mark.parametrize("mask", [None, MASK])
    def test_details_are_detached_by_products_of_the_loss(self, student, teachers, t2, mask):
        loss, details = teacher_kl(
            student,
            teachers,
            temperature=2.0,
            scale_by_t2=t2,
            weights=torch.rand(N, 3, dtype=torch.float64, requires_grad=True),
            class_mask=mask,
            reduction="none",
            return_details=True,
        )
        for detail in details:
            assert detail.shape == (N, 3)
            assert not detail.requires_grad
        torch.testing.assert_close((details.weights * details.kl).sum(dim=1), loss.detach())
        for i in range(N):
            for k, t in enumerate(teachers):
                entropy = entropy_of(probabilities(t, 2.0, i, mask))
                assert details.entropy[i, k].item() == pytest.approx(entropy, rel=1e-10)

    @pytest.mark.parametrize("mask", [None, MASK])
    def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(self, student, mask):
        loss = teacher_kl(student, [student.detach()], temperature=2.0, class_mask=mask)
        assert loss.item() == pytest.approx(0, abs=1e-15)
        for grad in torch.autograd.grad(loss, leaves(student)):
            torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-14, rtol=0)

    def test_teachers_may_have_another_dtype(self, student, teachers):
        def cast(s, *dtypes):
            for dtype in dtypes:
                s = Similarity(s.features.to(dtype), s.prototypes.to(dtype), s.scale)
            return s

        half, full = torch.float16, torch.float32
        student = cast(student, full)
        rest = [cast(t, full) for t in teachers[1:]]
        got = teacher_kl(student, [cast(teachers[0], half), *rest], temperature=2.0)
        assert got.dtype == full
        assert got == teacher_kl(student, [cast(teachers[0], half, full), *rest], temperature=2.0)
        assert got != teacher_kl(student, [cast(teachers[0], full), *rest], temperature=2.0)

    def test_scale_as_a_number_equals_scale_as_a_tensor(self, student, teachers):
        as_number = Similarity(student.features, student.prototypes, 9.0)
        assert teacher_kl(as_number, teachers) == teacher_kl(student, teachers)
        assert prototype_cross_entropy(as_number, TARGET) == prototype_cross_entropy(
            student, TARGET
        )


ON_META = Similarity(X.to(META), W.to(META))
DOUBLE = Similarity(X.double(), W.double())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"student": X}, TypeError, "^student: got Tensor"),
        ({"teachers": S}, TypeError, "^teachers: got Similarity.*list"),
        ({"teachers": None}, TypeError, "^teachers: got NoneType"),
        ({"teachers": []}, ValueError, "^teachers: got none"),
        ({"teachers": [S, X]}, TypeError, r"^teachers\[1\]: got Tensor"),
        (
            {"teachers": [S, S.T]},
            ValueError,
            r"^teachers\[1\]: got shape \[5, 6\], wanted \[6, 5\]",
        ),
        ({"teachers": [ON_META]}, ValueError, r"^teachers\[0\]: got device meta"),
        (
            {"teachers": [S, Similarity(X, W.clone().requires_grad_())]},
            ValueError,
            r"^teachers\[1\]: requires grad",
        ),
        ({"teachers": [S, DOUBLE]}, TypeError, r"^teachers\[1\]: got dtype .*float64, .*float32"),
        ({"student": DOUBLE}, TypeError, r"^teachers\[0\]: got dtype .*float32, .*float64"),
        ({"temperature": "2"}, TypeError, "^temperature: got str"),
        ({"gate_temperature": None}, TypeError, "^gate_temperature: got NoneType"),
        ({"gate": ""}, ValueError, "^gate: got ''"),
        ({"temperature": 0}, ValueError, "^temperature: got 0"),
        ({"temperature": -1.0}, ValueError, "^temperature: got -1"),
        ({"temperature": math.inf}, ValueError, "^temperature: got inf"),
        ({"gate_temperature": 0.0}, ValueError, "^gate_temperature: got 0"),
        ({"gate": "lable"}, ValueError, "^gate: got 'lable', wanted one of uniform"),
        ({"gate": "label"}, ValueError, "^target: got None"),
        ({"gate": "label", "target": TARGET - 100}, ValueError, "^target: got values from -100"),
        ({"gate": "discrepancy"}, ValueError, "^teachers: got features of shapes.*discrepancy"),
        (
            {"gate": "discrepancy", "teachers": [S, Similarity(X[:, :2], W[:, :2])]},
            ValueError,
            "^teachers: got features of shapes",
        ),
        ({"weights": torch.ones(N, 1), "gate": "uniform"}, ValueError, "^gate: got 'uniform' tog"),
        ({"weights": 0.5}, TypeError, "^weights: got float"),
        ({"weights": torch.ones(N, 1).long()}, TypeError, "^weights: got torch.int64"),
        ({"weights": torch.ones(N)}, ValueError, r"^weights: got shape \[6\], wanted \[6, 1\]"),
        ({"weights": torch.ones(N, 2)}, ValueError, r"^weights: got shape \[6, 2\]"),
        ({"weights": torch.ones(N, 1, device=META)}, ValueError, "^weights: got device meta"),
        ({"class_mask": MASK.long()}, TypeError, "^class_mask: got torch.int64"),
        ({"reduction": "avg"}, ValueError, "^reduction: got 'avg'"),
    ],
)
def test_errors_of_teacher_kl_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        teacher_kl(**{"student": S, "teachers": [S], **arguments})


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_target_that_the_gate_does_not_want_is_not_looked_at(backend, monkeypatch):
    if backend == "cpp" and (reason := loader.load()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("MULKI_STRICT", "1")
    with use_backend(backend):
        for options in ({"gate": "confidence"}, {"weights": torch.ones(N, 1)}, {}):
            expected = teacher_kl(S, [S.detach()], **options)
            for target in (TARGET[:2], TARGET + 100, TARGET.int(), TARGET.float()):
                assert teacher_kl(S, [S.detach()], **options, target=target).equal(expected)
