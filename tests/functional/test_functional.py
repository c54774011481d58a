from __future__ import annotations

import math
from fractions import Fraction

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck

from mulki import Similarity
from mulki.functional import (
    GATES,
    REDUCTIONS,
    clip_contrastive,
    dual_teacher_kl,
    prototype_cross_entropy,
    prototype_similarity,
    siglip,
    teacher_kl,
)
from mulki.ops import native, use_backend

N, P, D = 6, 5, 4
MASK = torch.tensor([True, False, True, True, False])
TARGET = torch.tensor([0, 2, 3, 3, 2, 0])  # of classes that MASK lets take part


def logits(s):
    return s.scale * s.features @ s.prototypes.T


def scalar(value, **options):
    return torch.tensor(value, dtype=torch.float64, **options)


@pytest.fixture
def student(unit):
    return Similarity(
        unit(N, D).requires_grad_(), unit(P, D).requires_grad_(), scalar(9.0, requires_grad=True)
    )


@pytest.fixture
def teachers(unit):
    """Three teachers, each with its own width and scale."""
    return [Similarity(unit(N, d), unit(P, d), s) for d, s in ((3, 8.0), (4, 10.0), (7, 5.0))]


def leaves(s):
    return s.features, s.prototypes, s.scale


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


def reduced(rows, reduction, count=None):
    """What a reduction of [N] rows is, by its definition."""
    if reduction == "none":
        return rows
    return (
        rows.sum() if reduction == "sum" else rows.sum() / (len(rows) if count is None else count)
    )


def assert_same_gradients(got, expected, inputs):
    upstream = torch.linspace(0.5, 2.0, got.numel(), dtype=got.dtype).reshape(got.shape)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream, retain_graph=True),
        torch.autograd.grad(expected, inputs, upstream, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


class TestPrototypeSimilarity:
    def test_is_the_scaled_matrix(self, student):
        got = prototype_similarity(*leaves(student))
        torch.testing.assert_close(got, logits(student))
        assert_same_gradients(got, logits(student), leaves(student))

    def test_normalize_gives_cosines(self, unit):
        x, w = (3 * unit(N, D)).requires_grad_(), (0.2 * unit(P, D)).requires_grad_()
        got = prototype_similarity(x, w, 10.0, normalize=True)
        expected = 10 * F.cosine_similarity(x[:, None], w[None], dim=2)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, (x, w))

    def test_gradcheck(self, unit):
        inputs = (unit(3, D).requires_grad_(), unit(P, D).requires_grad_(), scalar(2.0))
        inputs[2].requires_grad_()
        for normalize in (False, True):
            assert gradcheck(lambda *o, n=normalize: prototype_similarity(*o, normalize=n), inputs)


class TestPrototypeCrossEntropy:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("ignored", [(), (1, 4)])
    def test_equals_torch(self, student, reduction, smoothing, ignored):
        target = TARGET.clone()
        target[list(ignored)] = -100
        options = {"label_smoothing": smoothing, "reduction": reduction}
        got = prototype_cross_entropy(student, target, **options)
        expected = F.cross_entropy(logits(student), target, **options)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, leaves(student))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_a_mask_equals_removing_the_prototypes(self, student, reduction, smoothing):
        got = prototype_cross_entropy(
            student, TARGET, class_mask=MASK, label_smoothing=smoothing, reduction=reduction
        )
        place = MASK.cumsum(0) - 1
        expected = F.cross_entropy(
            logits(student)[:, MASK],
            place[TARGET],
            label_smoothing=smoothing,
            reduction=reduction,
        )
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, leaves(student))
        grad = torch.autograd.grad(got.sum(), student.prototypes)[0]
        assert grad[~MASK].eq(0).all() and grad[MASK].ne(0).any(dim=1).all()

    def test_a_class_may_be_the_ignored_index(self, student):
        got = prototype_cross_entropy(student, TARGET, ignore_index=3, label_smoothing=0.1)
        expected = F.cross_entropy(
            logits(student), TARGET, ignore_index=3, label_smoothing=0.1, reduction="none"
        )
        torch.testing.assert_close(got, expected.sum() / 4)

    def test_ignored_rows_do_not_touch_a_masked_first_class(self, student):
        mask = torch.tensor([False, True, True, True, True])
        target = torch.tensor([-100, 2, 3, -100, 2, -100])
        got = prototype_cross_entropy(student, target, class_mask=mask, label_smoothing=0.1)
        expected = F.cross_entropy(
            logits(student)[:, 1:], (target - 1).where(target > 0, -100), label_smoothing=0.1
        )
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, leaves(student))

    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_all_ignored_is_nan_as_in_torch(self, student, smoothing):
        target = torch.full((N,), -100)
        options = {"label_smoothing": smoothing}
        assert F.cross_entropy(logits(student), target, **options).isnan()
        assert prototype_cross_entropy(student, target, **options).isnan()
        for reduction in ("sum", "none"):
            got = prototype_cross_entropy(student, target, reduction=reduction, **options)
            assert got.eq(0).all()
            for grad in torch.autograd.grad(got.sum(), leaves(student)):
                assert grad.eq(0).all()

    def test_no_rows(self, unit):
        s = Similarity(unit(0, D), unit(P, D))
        target = torch.empty(0, dtype=torch.int64)
        assert prototype_cross_entropy(s, target).isnan()
        assert prototype_cross_entropy(s, target, reduction="sum") == 0
        assert prototype_cross_entropy(s, target, reduction="none").shape == (0,)

    def test_one_class_costs_nothing(self, unit):
        s = Similarity(unit(N, D).requires_grad_(), unit(1, D).requires_grad_(), 9.0)
        got = prototype_cross_entropy(s, torch.zeros(N).long(), label_smoothing=0.2)
        assert got == 0
        for grad in torch.autograd.grad(got, (s.features, s.prototypes)):
            torch.testing.assert_close(grad, torch.zeros_like(grad))

    @pytest.mark.parametrize("mask", [None, MASK])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_gradcheck(self, student, mask, reduction):
        target = TARGET.clone()
        target[1] = -100
        assert gradcheck(
            lambda *o: prototype_cross_entropy(
                Similarity(*o), target, label_smoothing=0.2, class_mask=mask, reduction=reduction
            ),
            leaves(student),
        )

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        n=st.integers(1, 7),
        p=st.integers(1, 9),
        d=st.integers(1, 6),
        scale=st.floats(-50, 100),
        smoothing=st.floats(0, 1),
        data=st.data(),
    )
    def test_any_mask_equals_removing_the_prototypes(self, unit, n, p, d, scale, smoothing, data):
        kept = sorted(data.draw(st.sets(st.integers(0, p - 1), min_size=1)))
        target = torch.tensor(
            data.draw(st.lists(st.sampled_from([*kept, -100]), min_size=n, max_size=n))
        )
        x, w = unit(n, d), unit(p, d)
        mask = torch.zeros(p, dtype=torch.bool)
        mask[kept] = True
        place = torch.tensor([kept.index(t) if t >= 0 else -100 for t in target.tolist()])
        torch.testing.assert_close(
            prototype_cross_entropy(
                Similarity(x, w, scale), target, label_smoothing=smoothing, class_mask=mask
            ),
            F.cross_entropy(scale * x @ w[kept].T, place, label_smoothing=smoothing),
            equal_nan=True,
        )


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

    def test_a_gate_prefers_the_teacher_that_knows_the_label(self, student, unit):
        right = Similarity(torch.eye(P).double()[TARGET], torch.eye(P).double(), 20.0)
        wrong = Similarity(torch.eye(P).double()[(TARGET + 1) % P], torch.eye(P).double(), 20.0)
        _, details = teacher_kl(
            student, [right, wrong], gate="label", target=TARGET, return_details=True
        )
        assert (details.weights[:, 0] > 0.999).all()

    def test_weights_scale_the_rows_and_need_not_sum_to_one(self, student, teachers):
        weights = torch.arange(N * 3).reshape(N, 3).double().requires_grad_()
        got = teacher_kl(student, teachers, temperature=2.0, weights=weights)
        kl = 4.0 * expected_kl(student, teachers, 2.0)
        torch.testing.assert_close(got, (weights * kl).sum() / N)
        assert_same_gradients(got, (weights * kl).sum() / N, (*leaves(student), weights))

    def test_one_hot_weights_pick_a_teacher(self, student, teachers):
        weights = F.one_hot(torch.full((N,), 1), 3).double()
        torch.testing.assert_close(
            teacher_kl(student, teachers, weights=weights), teacher_kl(student, teachers[1:2])
        )

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("gate", ["uniform", "confidence", "label"])
    def test_gradcheck(self, student, teachers, gate, reduction):
        assert gradcheck(
            lambda *o: teacher_kl(
                Similarity(*o),
                teachers,
                gate=gate,
                target=TARGET,
                temperature=2.0,
                class_mask=MASK,
                reduction=reduction,
            ),
            leaves(student),
        )

    @pytest.mark.parametrize("mask", [None, MASK])
    def test_gradcheck_with_weights(self, student, teachers, unit, mask):
        weights = unit(N, 3).abs().requires_grad_()
        assert gradcheck(
            lambda x, w, s, v: teacher_kl(
                Similarity(x, w, s), teachers, weights=v, class_mask=mask, reduction="none"
            ),
            (*leaves(student), weights),
        )

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

    def test_no_rows(self, unit):
        s, t = Similarity(unit(0, D), unit(P, D)), Similarity(unit(0, 3), unit(P, 3))
        target = torch.empty(0, dtype=torch.int64)
        for gate in ("uniform", "confidence", "label"):
            assert teacher_kl(s, [t], gate=gate, target=target, reduction="sum") == 0
            assert teacher_kl(s, [t], gate=gate, target=target).isnan()
            assert teacher_kl(s, [t], gate=gate, target=target, reduction="none").shape == (0,)

    def test_one_class(self, unit):
        s = Similarity(unit(N, D).requires_grad_(), unit(1, D), 5.0)
        loss = teacher_kl(s, [Similarity(unit(N, 3), unit(1, 3), 9.0)])
        assert loss == 0
        assert torch.autograd.grad(loss, s.features)[0].eq(0).all()

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


class TestContrastive:
    @pytest.mark.parametrize("bias", [None, -3.0])
    def test_clip_equals_open_clip(self, unit, bias):
        x, w = unit(N, D).requires_grad_(), unit(N, D).requires_grad_()
        scale = scalar(9.0, requires_grad=True)
        got = clip_contrastive(x, w, scale, bias)
        expected = open_clip.loss.ClipLoss()(x, w, scale, bias)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, (x, w, scale))

    def test_siglip_equals_open_clip(self, unit):
        x, w = unit(N, D).requires_grad_(), unit(N, D).requires_grad_()
        scale, bias = scalar(9.0, requires_grad=True), scalar(-3.0, requires_grad=True)
        got = siglip(x, w, scale, bias)
        expected = open_clip.loss.SigLipLoss()(x, w, scale, bias)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, (x, w, scale, bias))

    def test_clip_rows_equal_a_loop(self, unit):
        x, w = unit(N, D), unit(N, D)
        z = (9.0 * x @ w.T).tolist()
        rows = []
        for i in range(N):
            of_row = math.log(sum(math.exp(z[i][j]) for j in range(N))) - z[i][i]
            of_column = math.log(sum(math.exp(z[j][i]) for j in range(N))) - z[i][i]
            rows.append((of_row + of_column) / 2)
        got = clip_contrastive(x, w, 9.0, reduction="none")
        torch.testing.assert_close(got, torch.tensor(rows, dtype=torch.float64))

    def test_siglip_rows_equal_a_loop(self, unit):
        x, w = unit(N, D), unit(N, D)
        z = (9.0 * x @ w.T - 3.0).tolist()
        rows = [
            sum(math.log(1 + math.exp(-z[i][j] if i == j else z[i][j])) for j in range(N))
            for i in range(N)
        ]
        got = siglip(x, w, 9.0, -3.0, reduction="none")
        torch.testing.assert_close(got, torch.tensor(rows, dtype=torch.float64))

    @pytest.mark.parametrize("loss", [clip_contrastive, siglip])
    def test_reductions(self, unit, loss):
        x, w = unit(N, D), unit(N, D)
        rows = loss(x, w, 9.0, -3.0, reduction="none")
        for reduction in REDUCTIONS:
            torch.testing.assert_close(
                loss(x, w, 9.0, -3.0, reduction=reduction), reduced(rows, reduction)
            )

    @pytest.mark.parametrize("loss", [clip_contrastive, siglip])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_gradcheck(self, unit, loss, reduction):
        inputs = (unit(N, D), unit(N, D), scalar(5.0), scalar(-2.0))
        for value in inputs:
            value.requires_grad_()
        assert gradcheck(lambda *o: loss(*o, reduction=reduction), inputs)

    def test_one_pair(self, unit):
        x, w = unit(1, D), unit(1, D)
        assert clip_contrastive(x, w, 9.0) == 0
        z = 9.0 * (x @ w.T).item() - 3.0
        assert siglip(x, w, 9.0, -3.0).item() == pytest.approx(math.log(1 + math.exp(-z)))


def all_losses(student, teachers, weights, target=TARGET, mask=MASK):
    """Every loss once, by name, at options that use every argument."""
    x, w, scale = student.features, student.prototypes, student.scale
    n = min(len(x), len(w))
    return {
        "similarity": prototype_similarity(x, w, scale, normalize=True).square().mean(),
        "cross_entropy": prototype_cross_entropy(
            student, target, label_smoothing=0.2, class_mask=mask
        ),
        "gated": teacher_kl(
            student, teachers, temperature=2.0, gate="label", target=target, class_mask=mask
        ),
        "weighted": teacher_kl(student, teachers, temperature=2.0, weights=weights),
        "clip": clip_contrastive(x[:n], w[:n], scale),
        "siglip": siglip(x[:n], w[:n], scale, -3.0),
    }


def test_a_second_backward_gives_the_same_gradient(student, teachers, unit):
    weights = unit(N, 3).abs().requires_grad_()
    for loss in all_losses(student, teachers, weights).values():
        inputs = (*leaves(student), weights)
        first = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(loss, inputs, allow_unused=True)
        for a, b in zip(first, second, strict=True):
            assert (a is None and b is None) or a.equal(b)


def test_nothing_is_mutated(student, teachers, unit):
    weights = unit(N, 3).abs().requires_grad_()
    inputs = [
        *leaves(student),
        *(tensor for t in teachers for tensor in (t.features, t.prototypes)),
        weights,
        TARGET,
        MASK,
    ]
    before = [tensor.detach().clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    torch.stack(list(all_losses(student, teachers, weights).values())).sum().backward()
    assert [tensor._version for tensor in inputs] == versions
    for tensor, old in zip(inputs, before, strict=True):
        assert tensor.detach().equal(old)


def test_targets_are_not_read_on_a_gpu():
    # Fake tensors have no values, so whatever reads one (and would make the GPU wait) raises. They
    # cannot negate a mask where torch has no GPU support, hence no masks and no cross-entropy.
    with FakeTensorMode():
        x, w = torch.empty(N, D, device="cuda"), torch.empty(P, D, device="cuda")
        scale, target = torch.empty((), device="cuda"), torch.empty(N, device="cuda").long()
        s = Similarity(x, w, scale)
        losses = [dual_teacher_kl(s, s, s, gate=gate, target=target) for gate in GATES]
        losses += [clip_contrastive(x, x, scale, scale), siglip(x, x, scale, scale)]
        assert all(loss.is_cuda for loss in losses)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(student, teachers, unit):
    def there(s):
        return Similarity(*(tensor.detach().float().cuda() for tensor in leaves(s)))

    student = there(student)
    student.features.requires_grad_()
    weights, target, mask = unit(N, 3).cuda(), TARGET.cuda(), MASK.cuda()
    teachers = [
        Similarity(t.features.float().cuda(), t.prototypes.float().cuda(), t.scale)
        for t in teachers
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.stack(
            list(all_losses(student, teachers, weights, target, mask).values())
        ).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_graph_break(student, teachers, unit):
    weights = unit(N, 3).abs()
    inputs = [tensor.detach() for tensor in leaves(student)]
    compiled = torch.compile(
        lambda *o: all_losses(Similarity(*o), teachers, weights), fullgraph=True, backend="eager"
    )
    for name, expected in all_losses(Similarity(*inputs), teachers, weights).items():
        torch.testing.assert_close(compiled(*inputs)[name], expected)


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_new_scale_is_no_recompilation_and_a_new_temperature_is_one(make):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(scale, temperature):
        s = Similarity(X, W, scale)
        return siglip(X, X, scale, -3.0) + teacher_kl(s, [S], temperature=temperature)

    for scale in (2.0, 3.0, 4.0):  # a float becomes symbolic at its second value
        assert loss(make(scale), 2.0).isfinite()
    before = counter.frame_count
    for scale in (5.0, 6.0):
        loss(make(scale), 2.0)
    assert counter.frame_count == before
    for temperature in (3.0, 4.0):
        loss(make(5.0), temperature)
    assert counter.frame_count == before + 2


def test_strides_do_not_matter(unit):
    weights = unit(N, 3).abs()
    strided_weights = weights.T.contiguous().T
    wide = unit(2 * N, 2 * D)
    strided = Similarity(
        wide[::2, ::2].requires_grad_(), unit(D, P).T.requires_grad_(), scalar(9.0)
    )
    expanded = Similarity(
        unit(1, D).expand(N, D).requires_grad_(), unit(1, D).expand(P, D).requires_grad_()
    )
    teachers = [strided.detach(), expanded.detach(), Similarity(unit(N, 3), unit(P, 3))]
    for s in (strided, expanded):
        dense = Similarity(
            s.features.detach().contiguous().requires_grad_(),
            s.prototypes.detach().contiguous().requires_grad_(),
            s.scale,
        )
        dense_teachers = [
            Similarity(t.features.contiguous(), t.prototypes.contiguous(), t.scale)
            for t in teachers
        ]
        target = torch.stack([TARGET, TARGET], dim=1)[:, 0]
        got = all_losses(s, teachers, strided_weights, target)
        for name, expected in all_losses(dense, dense_teachers, weights).items():
            torch.testing.assert_close(got[name], expected)
            for a, b in zip(
                torch.autograd.grad(got[name], (s.features, s.prototypes)),
                torch.autograd.grad(expected, (dense.features, dense.prototypes)),
                strict=True,
            ):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1e-4, 100.0, 1e4])
def test_large_and_small_scales_stay_finite(unit, scale):
    x, w = unit(N, D).float().requires_grad_(), unit(P, D).float().requires_grad_()
    s = torch.tensor(scale, requires_grad=True)
    teachers = [
        Similarity(unit(N, d).float(), unit(P, d).float(), t)
        for d, t in ((D, scale), (3, 1.0), (D, 1e4))
    ]
    weights = unit(N, 3).abs().float()
    for name, loss in all_losses(Similarity(x, w, s), teachers, weights).items():
        assert loss.isfinite(), name
        for grad in torch.autograd.grad(loss, (x, w, s), allow_unused=True):
            assert grad is None or grad.isfinite().all(), name


def near_teacher(dtype, gap=1e-3):
    """A student [256, 64] and a teacher that differs by `gap`, both rounded to `dtype`."""
    generator = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randn(n, 64, generator=generator, dtype=torch.float64)

    x, w = F.normalize(draw(256), dim=1), F.normalize(draw(100), dim=1)
    teacher = F.normalize(x + gap * draw(256), dim=1)
    return x.to(dtype), w.to(dtype), teacher.to(dtype)


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_gradient_of_a_student_near_its_teacher(dtype):
    x, w, u = near_teacher(dtype)

    def gradient(compute, x, w, u):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(compute(leaf, w, u), leaf)[0]

    def ours(x, w, u):
        return teacher_kl(Similarity(x, w, 50.0), [Similarity(u, w, 50.0)], temperature=2.0)

    def with_rounded_logits(x, w, u):
        student, teacher = (50 * v @ w.T for v in (x, u))
        log_q, log_p = (F.log_softmax(z.float() / 2, dim=1) for z in (student, teacher))
        return 4 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    # The truth is that of the rounded inputs; what is left is the rounding of the gradient itself.
    truth = gradient(with_rounded_logits, x.double(), w.double(), u.double())
    bound = 2 * torch.finfo(dtype).eps
    assert relative_error(gradient(ours, x, w, u), truth) < bound
    assert relative_error(gradient(with_rounded_logits, x, w, u), truth) > 20 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_come_back_in_float32(unit, dtype):
    student = Similarity(unit(N, D).to(dtype), unit(P, D).to(dtype), 9.0)
    teachers = [Similarity(unit(N, 3).to(dtype), unit(P, 3).to(dtype), 9.0)]
    losses = all_losses(student, teachers, torch.ones(N, 1, dtype=dtype))
    for name in losses.keys() - {"similarity"}:
        assert losses[name].dtype == torch.float32, name


def test_autocast_rounds_the_features_and_nothing_else(unit):
    x, w, u = unit(N, D).float().requires_grad_(), unit(P, D).float(), unit(N, 3).float()
    v, scale, weights = unit(P, 3).float(), torch.tensor(9.0), unit(N, 1).abs().float()
    with torch.autocast("cpu", torch.bfloat16):
        got = all_losses(Similarity(x, w, scale), [Similarity(u, v, scale)], weights)
    rounded = Similarity(x.bfloat16(), w.bfloat16(), scale)
    teacher = Similarity(u.bfloat16(), v.bfloat16(), scale)
    expected = all_losses(rounded, [teacher], weights)
    exact = all_losses(Similarity(x, w, scale), [Similarity(u, v, scale)], weights)
    # Normalising comes before the rounding, so it has no equal among the rounded.
    for name in expected.keys() - {"similarity"}:
        assert got[name].dtype == torch.float32
        assert got[name].equal(expected[name]), name
        assert not got[name].equal(exact[name]), name
        (grad,) = torch.autograd.grad(got[name], x)
        assert grad.dtype == torch.float32 and grad.isfinite().all()


def test_autocast_takes_features_beside_frozen_prototypes_in_float32(unit):
    layer, images = torch.nn.Linear(D, D).requires_grad_(), unit(N, D).float()
    texts, scale = unit(P, D).float(), torch.tensor(9.0, requires_grad=True)
    pairs = unit(N, D).float()
    inputs = (layer.weight, scale)

    def losses(x, w, pairs):
        s = Similarity(x, w, scale)
        teacher = Similarity(x.detach().roll(1, 0), w, 7.0)
        return {
            "cross_entropy": prototype_cross_entropy(s, TARGET),
            "kl": teacher_kl(s, [teacher]),
            "clip": clip_contrastive(x, pairs, scale),
            "siglip": siglip(pairs, x, scale, -3.0),
            "similarity": prototype_similarity(x, w, scale).float().square().mean(),
        }

    with torch.autocast("cpu", torch.bfloat16):
        x = layer(images)
        assert x.dtype == torch.bfloat16
        got = losses(x, texts, pairs)
    expected = losses(x, texts.bfloat16(), pairs.bfloat16())
    for name, loss in got.items():
        assert loss.dtype == torch.float32
        assert loss.equal(expected[name]), name
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        wanted = torch.autograd.grad(expected[name], inputs, retain_graph=True)
        for a, b in zip(gradients, wanted, strict=True):
            assert a.dtype == torch.float32 and a.ne(0).any()
            assert a.equal(b), name


def test_autocast_leaves_float64_alone(student, teachers, unit):
    weights = unit(N, 3).abs()
    expected = all_losses(student, teachers, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = all_losses(student, teachers, weights)
    for name, loss in got.items():
        assert loss.dtype == torch.float64
        assert loss.equal(expected[name]), name


X, W, PAIRS = torch.ones(N, D), torch.ones(P, D), torch.ones(N, D)
S = Similarity(X, W)
META = torch.device("meta")
ON_META = Similarity(X.to(META), W.to(META))
DOUBLE = Similarity(X.double(), W.double())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"similarity": X}, TypeError, "^similarity: got Tensor, wanted a Similarity"),
        ({"target": [0] * N}, TypeError, "^target: got list"),
        ({"target": TARGET.float()}, TypeError, "^target: got torch.float32"),
        ({"target": TARGET[:2]}, ValueError, r"^target: got shape \[2\], wanted \[6\]"),
        ({"target": TARGET.to(META)}, ValueError, "^target: got device meta"),
        ({"target": TARGET + 3}, ValueError, r"^target: .*3 to 6, wanted .* \[0, 5\) or ignore"),
        ({"target": TARGET - 1}, ValueError, "^target: got values from -1 to 2"),
        ({"target": TARGET + 1, "class_mask": MASK}, ValueError, "^target: holds class [14]"),
        ({"ignore_index": 3.0}, TypeError, "^ignore_index: got float, wanted an int"),
        ({"ignore_index": None}, TypeError, "^ignore_index: got NoneType"),
        ({"ignore_index": True}, TypeError, "^ignore_index: got bool"),
        ({"label_smoothing": "0.1"}, TypeError, "^label_smoothing: got str"),
        ({"label_smoothing": -0.1}, ValueError, "^label_smoothing: got -0.1"),
        ({"label_smoothing": 1.1}, ValueError, "^label_smoothing: got 1.1"),
        ({"label_smoothing": math.nan}, ValueError, "^label_smoothing: got nan"),
        ({"class_mask": [True] * P}, TypeError, "^class_mask: got list"),
        ({"class_mask": MASK.long()}, TypeError, "^class_mask: got torch.int64"),
        ({"class_mask": MASK[:4]}, ValueError, r"^class_mask: got shape \[4\], wanted \[5\]"),
        ({"class_mask": MASK[None]}, ValueError, r"^class_mask: got shape \[1, 5\]"),
        ({"class_mask": MASK.to(META)}, ValueError, "^class_mask: got device meta"),
        ({"class_mask": torch.zeros_like(MASK)}, ValueError, "^class_mask: masks every class"),
        ({"reduction": "batchmean"}, ValueError, "^reduction: got 'batchmean', .*none, sum, mean"),
    ],
)
def test_errors_of_cross_entropy_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        prototype_cross_entropy(**{"similarity": S, "target": TARGET, **arguments})


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


@pytest.mark.parametrize("loss", [clip_contrastive, siglip])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_features": None}, TypeError, "^image_features: got NoneType"),
        ({"text_features": PAIRS.long()}, TypeError, "^text_features: got dtype torch.int64"),
        ({"image_features": PAIRS[0]}, ValueError, r"^image_features: got shape \[4\]"),
        ({"text_features": PAIRS[:3]}, ValueError, r"^text_features: got shape \[3, 4\]"),
        ({"text_features": PAIRS[:0]}, ValueError, r"^text_features: got shape \[0, 4\], .*6, 4"),
        ({"text_features": PAIRS[:, :3]}, ValueError, r"^text_features: got shape \[6, 3\]"),
        ({"text_features": PAIRS.half()}, TypeError, "^text_features: got dtype torch.float16"),
        ({"text_features": PAIRS.to(META)}, ValueError, "^text_features: got device meta"),
        ({"logit_scale": torch.ones(N)}, ValueError, r"^logit_scale: got shape \[6\]"),
        ({"logit_scale": None}, TypeError, "^logit_scale: got NoneType"),
        ({"logit_bias": torch.ones(N)}, ValueError, r"^logit_bias: got shape \[6\]"),
        ({"logit_bias": "0"}, TypeError, "^logit_bias: got str"),
        ({"reduction": "avg"}, ValueError, "^reduction: got 'avg'"),
    ],
)
def test_errors_of_contrastive_losses_name_the_argument(loss, arguments, error, message):
    given = {"image_features": PAIRS, "text_features": PAIRS, "logit_scale": 1.0, "logit_bias": 0.0}
    with pytest.raises(error, match=message):
        loss(**{**given, **arguments})


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_no_pairs(backend, monkeypatch):
    if backend == "cpp" and (reason := native.load()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("MULKI_STRICT", "1")
    for grad in (False, True):
        x, w = (PAIRS[:0].clone().requires_grad_(grad) for _ in range(2))
        for loss in (clip_contrastive, siglip):
            with use_backend(backend):
                rows, total, mean = (loss(x, w, 1.0, 0.0, reduction=r) for r in REDUCTIONS)
                assert rows.shape == (0,) and total == 0 and mean.isnan()
                if grad:
                    (dx,) = torch.autograd.grad(rows.sum() + total + mean, x)
                    assert dx.shape == (0, D)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_target_that_the_gate_does_not_want_is_not_looked_at(backend, monkeypatch):
    if backend == "cpp" and (reason := native.load()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("MULKI_STRICT", "1")
    with use_backend(backend):
        for options in ({"gate": "confidence"}, {"weights": torch.ones(N, 1)}, {}):
            expected = teacher_kl(S, [S.detach()], **options)
            for target in (TARGET[:2], TARGET + 100, TARGET.int(), TARGET.float()):
                assert teacher_kl(S, [S.detach()], **options, target=target).equal(expected)


def test_any_real_number_will_do(unit):
    x, w, pairs = unit(N, D).float(), unit(P, D).float(), unit(N, D).float()

    def losses(half):
        s, teachers = Similarity(x, w, half), [Similarity(pairs, w, t) for t in (half, 9.0, half)]
        return [
            prototype_cross_entropy(s, TARGET, label_smoothing=half, check_finite=True),
            teacher_kl(s, teachers, temperature=half, gate="confidence", gate_temperature=half),
            teacher_kl(s, [teachers[0]] * 2),
            siglip(x, pairs, half, half, check_finite=True),
        ]

    for got, want in zip(losses(Fraction(1, 2)), losses(0.5), strict=True):
        assert got.equal(want)


def test_siglip_wants_a_bias():
    with pytest.raises(TypeError, match="^logit_bias: got None"):
        siglip(PAIRS, PAIRS, 1.0, None)


def spoilt(s, part, value):
    """The similarity with one bad value, in row 3 of features or prototypes."""
    parts = {"features": s.features.clone(), "prototypes": s.prototypes.clone(), "scale": s.scale}
    if part == "scale":
        parts["scale"] = value
    else:
        parts[part][3, 1] = value
    return Similarity(**parts)


@pytest.mark.parametrize(("value", "told"), [(math.nan, "NaN"), (-math.inf, "infinity")])
@pytest.mark.parametrize("part", ["features", "prototypes", "scale"])
def test_check_finite_names_the_argument_and_the_row(part, value, told):
    bad = spoilt(S, part, value)
    where = "" if part == "scale" else " in row 3"
    for name, call in {
        "similarity": lambda: prototype_cross_entropy(bad, TARGET, check_finite=True),
        "student": lambda: teacher_kl(bad, [S], check_finite=True),
        r"teachers\[1\]": lambda: dual_teacher_kl(S, S, bad, target=TARGET, check_finite=True),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}\.{part}: got {told}{where}, wanted finite"):
            call()
    with pytest.raises(ValueError, match=rf"^{part}: got {told}{where}, wanted finite"):
        prototype_similarity(bad.features, bad.prototypes, bad.scale, check_finite=True)


@pytest.mark.parametrize("loss", [clip_contrastive, siglip])
@pytest.mark.parametrize("name", ["image_features", "text_features", "logit_scale", "logit_bias"])
def test_check_finite_of_contrastive_losses(loss, name):
    given = {"image_features": PAIRS, "text_features": PAIRS, "logit_scale": 1.0, "logit_bias": 0.0}
    assert loss(**given, check_finite=True).isfinite()
    bad = PAIRS * torch.tensor(math.nan) if name.endswith("features") else torch.tensor(math.nan)
    with pytest.raises(ValueError, match=rf"^{name}: got NaN.*, wanted finite"):
        loss(**{**given, name: bad}, check_finite=True)


def test_check_finite_of_weights_and_of_what_is_fine():
    weights = torch.ones(N, 1)
    assert teacher_kl(S, [S], weights=weights, check_finite=True).isfinite()
    weights[4] = math.inf
    with pytest.raises(ValueError, match="^weights: got infinity in row 4, wanted finite"):
        teacher_kl(S, [S], weights=weights, check_finite=True)


def test_without_check_finite_values_pass_through():
    bad = spoilt(S, "features", math.nan)
    rows = prototype_cross_entropy(bad, TARGET, reduction="none")
    assert rows.isnan().tolist() == [i == 3 for i in range(N)]
