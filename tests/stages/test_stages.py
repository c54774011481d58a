from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from mulki.features import Features
from mulki.functional import GATES, clip_contrastive
from mulki.losses import MulKILoss
from mulki.stages import adding, connecting, distinguishing, eliciting

RELATIONS = ("image_text", "image_image", "text_image", "text_text")
COEFFICIENTS = ("alignment", *RELATIONS, "feature")


def expected_relation(model, name):
    """The stored matrix of a relation, by its formula."""
    left, right = {
        "image_text": (model.images, model.texts),
        "image_image": (model.images, model.prototypes),
        "text_image": (model.texts, model.prototypes),
        "text_text": (model.texts, model.texts),
    }[name]
    return model.scale * left @ right.T


def expected_kl(student, teachers, name, weights, temperature=2.0):
    log_q = F.log_softmax(expected_relation(student, name) / temperature, dim=1)
    total = 0.0
    for k, t in enumerate(teachers):
        p = F.softmax(expected_relation(t, name) / temperature, dim=1)
        total = total + weights[:, k] * F.kl_div(log_q, p, reduction="none").sum(dim=1)
    return temperature**2 * total.mean()


def expected_label_weights(teachers, target, temperature=2.0):
    log_p = [F.log_softmax(expected_relation(t, "image_text") / temperature, 1) for t in teachers]
    return torch.stack([v[torch.arange(len(target)), target] for v in log_p], dim=1).softmax(dim=1)


def expected_class_weights(weights, target, num_classes):
    rows = []
    for c in range(num_classes):
        of_class = weights[target == c]
        rows.append(of_class.mean(0) if len(of_class) else torch.full_like(weights[0], 0.5))
    return torch.stack(rows)


def expected_feature(student, teachers, weights):
    total = 0.0
    for b in range(len(weights)):
        for k, t in enumerate(teachers):
            total = total + weights[b, k] * ((student.images[b] - t.images[b]) ** 2).sum()
    return total / len(weights)


@pytest.fixture
def student(model_features):
    return model_features(grad=True)


@pytest.fixture
def teachers(model_features):
    return model_features(scale=9.0), model_features(scale=4.0)


class TestEliciting:
    def test_alignment_is_the_symmetric_cross_entropy(self, student):
        z = student.scale * student.prototypes @ student.texts.T
        diagonal = torch.arange(4)
        expected = (F.cross_entropy(z, diagonal) + F.cross_entropy(z.T, diagonal)) / 2
        torch.testing.assert_close(eliciting.alignment_loss(student), expected)

    def test_gradient_reaches_texts_and_prototypes(self, student):
        loss = eliciting.alignment_loss(student)
        for grad in torch.autograd.grad(loss, (student.texts, student.prototypes)):
            assert grad.abs().max() > 1e-3

    def test_wants_prototypes(self, student):
        with pytest.raises(ValueError, match="^student: has no prototypes"):
            eliciting.alignment_loss(replace(student, prototypes=None))


class TestAdding:
    @pytest.mark.parametrize("name", RELATIONS)
    def test_relations_are_their_matrices(self, student, name):
        relation = {**adding.IMAGE_ROWS, **adding.TEXT_ROWS}[name]
        got = relation(student).materialize()
        torch.testing.assert_close(got, expected_relation(student, name))
        assert len(got) == (6 if name in adding.IMAGE_ROWS else 4)

    def test_relations_that_need_prototypes_say_so(self, student):
        bare = replace(student, prototypes=None)
        for name, relation in {**adding.IMAGE_ROWS, **adding.TEXT_ROWS}.items():
            if name in adding.NEED_PROTOTYPES:
                with pytest.raises(ValueError, match="^prototypes: got None"):
                    relation(bare)
            else:
                relation(bare)

    @pytest.mark.parametrize("t2", [True, False])
    @pytest.mark.parametrize("name", RELATIONS)
    def test_relation_loss(self, student, model_features, name, t2):
        models = model_features(width=3), model_features(width=8)
        relation = {**adding.IMAGE_ROWS, **adding.TEXT_ROWS}[name]
        weights = torch.rand(6 if name in adding.IMAGE_ROWS else 4, 2, dtype=torch.float64)
        got = adding.relation_loss(relation, student, models, weights, 3.0, t2)
        expected = expected_kl(student, models, name, weights, 3.0) / (1 if t2 else 9)
        torch.testing.assert_close(got, expected)

    def test_feature_loss_equals_a_loop(self, student, teachers):
        weights = torch.rand(6, 2, dtype=torch.float64)
        got = adding.feature_loss(student, teachers, weights)
        torch.testing.assert_close(got, expected_feature(student, teachers, weights))

    def test_feature_loss_computes_half_precision_in_the_dtype_of_the_weights(
        self, student, teachers
    ):
        half = [replace(m, images=m.images.detach().bfloat16()) for m in (student, *teachers)]
        exact = [replace(m, images=m.images.float()) for m in half]
        weights = torch.rand(6, 2)
        got = adding.feature_loss(half[0], half[1:], weights)
        assert got.dtype == torch.float32
        assert got == adding.feature_loss(exact[0], exact[1:], weights)

    def test_feature_loss_gives_teachers_no_gradient(self, student, model_features):
        teacher = model_features(grad=True)
        adding.feature_loss(student, [teacher], torch.ones(6, 1).double()).backward()
        assert student.images.grad is not None
        assert teacher.images.grad is None

    def test_feature_loss_wants_one_width(self, student, model_features):
        models = [model_features(), model_features(width=3)]
        with pytest.raises(ValueError, match=r"^teachers\[1\]: got image features \[6, 3\], .*5"):
            adding.feature_loss(student, models, torch.ones(6, 2).double())


class TestDistinguishing:
    def test_sample_weights_of_the_label_gate(self, teachers, target):
        got = distinguishing.sample_weights(teachers, target, "label", 2.0, 1.0)
        torch.testing.assert_close(got, expected_label_weights(teachers, target))

    def test_temperatures_reach_the_gate(self, teachers, target):
        got = distinguishing.sample_weights(teachers, target, "label", 3.0, 0.5)
        expected = (expected_label_weights(teachers, target, 3.0).log() / 0.5).softmax(dim=1)
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("gate", GATES)
    def test_weights_sum_to_one_and_are_constants(self, model_features, target, gate):
        models = model_features(grad=True), model_features(grad=True)
        got = distinguishing.sample_weights(models, target, gate, 2.0, 1.0)
        torch.testing.assert_close(got.sum(dim=1), torch.ones(6).double())
        assert not got.requires_grad

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


class TestConnecting:
    @settings(max_examples=30, deadline=None)
    @given(every=st.integers(1, 5), steps=st.integers(0, 17))
    def test_running_mean_is_the_mean_of_start_and_samples(self, every, steps):
        def weights(step):
            return {"a": torch.full((2,), float(step**2)), "b": torch.tensor(-1.5 * step)}

        mean = connecting.RunningMean(weights(0), every)
        for step in range(1, steps + 1):
            mean.observe(weights(step), step)
        members = [weights(step) for step in range(0, steps + 1, every)]
        for name in ("a", "b"):
            expected = torch.stack([m[name] for m in members]).mean(dim=0)
            torch.testing.assert_close(mean.mean[name], expected)

    def test_running_mean_is_a_copy_without_graph(self):
        live = {"a": torch.nn.Parameter(torch.ones(2))}
        mean = connecting.RunningMean(live, 1)
        with torch.no_grad():
            live["a"].add_(4)
        assert mean.mean["a"].tolist() == [1, 1]
        mean.observe(live, 1)
        assert mean.mean["a"].tolist() == [3, 3]
        assert live["a"].tolist() == [5, 5]
        assert not mean.mean["a"].requires_grad

    @pytest.mark.parametrize("every", [0, -1])
    def test_running_mean_wants_a_positive_period(self, every):
        with pytest.raises(ValueError, match=f"^every: got {every}"):
            connecting.RunningMean({}, every)

    def test_interpolation_and_its_end_points(self):
        old, new = {"a": torch.tensor([0.1, 3.0])}, {"a": torch.tensor([0.7, -1.0])}
        assert connecting.interpolate(old, new, 0.0)["a"].equal(old["a"])
        assert connecting.interpolate(old, new, 1.0)["a"].equal(new["a"])
        torch.testing.assert_close(
            connecting.interpolate(old, new, 0.25)["a"], torch.tensor([0.25, 2.0])
        )
        assert old["a"].tolist() == pytest.approx([0.1, 3.0])

    def test_anchor_sums_squared_differences(self):
        weights = {
            "a": torch.tensor([1.0, 2.0], requires_grad=True),
            "b": torch.tensor(5.0, requires_grad=True),
        }
        loss = connecting.anchor_loss(
            weights, {"a": torch.tensor([0.0, 4.0]), "b": torch.zeros(())}
        )
        assert loss == 1 + 4 + 25
        loss.backward()
        assert weights["a"].grad.tolist() == [2, -4]
        assert weights["b"].grad == 10

    def test_snapshot_is_a_detached_copy(self):
        live = {"a": torch.nn.Parameter(torch.ones(2))}
        copy = connecting.snapshot(live)
        with torch.no_grad():
            live["a"].zero_()
        assert copy["a"].tolist() == [1, 1]
        assert not copy["a"].requires_grad


class TestObjective:
    def expected_terms(self, student, teachers, target):
        """Unweighted terms at the default options."""
        w = expected_label_weights(teachers, target)
        per_class = expected_class_weights(w, target, 4)
        return {
            "ce": F.cross_entropy(
                expected_relation(student, "image_text"), target, label_smoothing=0.2
            ),
            "alignment": clip_contrastive(student.prototypes, student.texts, student.scale),
            "image_text": expected_kl(student, teachers, "image_text", w),
            "image_image": expected_kl(student, teachers, "image_image", w),
            "text_image": expected_kl(student, teachers, "text_image", per_class),
            "text_text": expected_kl(student, teachers, "text_text", per_class),
            "feature": expected_feature(student, teachers, w),
        }

    def test_total_and_gradient_equal_a_hand_computation(self, student, teachers, target):
        coefficients = {name: 0.3 + 0.1 * i for i, name in enumerate(COEFFICIENTS)}
        terms = self.expected_terms(student, teachers, target)
        expected = terms["ce"] + sum(c * terms[name] for name, c in coefficients.items())
        got = MulKILoss(**coefficients)(student, teachers, target)
        torch.testing.assert_close(got, expected)
        inputs = (student.images, student.texts, student.prototypes)
        for a, b in zip(
            torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)

    def test_terms_sum_to_the_total(self, student, teachers, target):
        loss = MulKILoss()
        terms = loss(student, teachers, target, output_dict=True)
        assert set(terms) == {"ce_loss", *(f"{name}_loss" for name in COEFFICIENTS)}
        torch.testing.assert_close(sum(terms.values()), loss(student, teachers, target))

    @pytest.mark.parametrize("name", COEFFICIENTS)
    def test_a_coefficient_scales_its_term_alone_and_0_removes_it(
        self, student, teachers, target, name
    ):
        def terms(**coefficient):
            return MulKILoss(**coefficient)(student, teachers, target, output_dict=True)

        whole, doubled, without = terms(**{name: 0.5}), terms(**{name: 1.0}), terms(**{name: 0.0})
        assert set(whole) - set(without) == {f"{name}_loss"}
        for key, value in without.items():
            assert value == whole[key] == doubled[key]
        torch.testing.assert_close(doubled[f"{name}_loss"], 2 * whole[f"{name}_loss"])

    @pytest.mark.parametrize("name", COEFFICIENTS)
    def test_each_term_has_its_needs(self, student, teachers, target, name):
        loss = MulKILoss(**{other: float(other == name) for other in COEFFICIENTS})
        assert loss.needs_teachers == (name != "alignment")
        assert loss.needs_prototypes == (name in ("alignment", "image_image", "text_image"))
        if not loss.needs_teachers:
            teachers = []
        if not loss.needs_prototypes:
            student, *teachers = (replace(m, prototypes=None) for m in (student, *teachers))
        assert loss(student, teachers, target).isfinite()

    def test_without_any_term_it_is_cross_entropy(self, student, target):
        loss = MulKILoss(**dict.fromkeys(COEFFICIENTS, 0.0), label_smoothing=0.1)
        assert not loss.needs_teachers and not loss.needs_prototypes
        expected = F.cross_entropy(
            expected_relation(student, "image_text"), target, label_smoothing=0.1
        )
        torch.testing.assert_close(loss(replace(student, prototypes=None), (), target), expected)

    def test_options_reach_their_terms(self, student, teachers, target):
        options = {"temperature": 3.0, "gate_temperature": 0.5, "scale_by_t2": False}
        got = MulKILoss(**options)(student, teachers, target, output_dict=True)
        w = distinguishing.sample_weights(teachers, target, "label", 3.0, 0.5)
        for name, weights in {
            "image_image": w,
            "text_text": distinguishing.class_weights(w, target, 4),
        }.items():
            expected = 0.25 * expected_kl(student, teachers, name, weights, 3.0) / 9
            torch.testing.assert_close(got[f"{name}_loss"], expected)
        torch.testing.assert_close(got["feature_loss"], adding.feature_loss(student, teachers, w))

    @pytest.mark.parametrize("count", [1, 3])
    def test_takes_any_number_of_teachers(self, student, model_features, target, count):
        models = [model_features() for _ in range(count)]
        assert MulKILoss()(student, models, target).isfinite()

    def test_gradcheck(self, student, teachers, target):
        def total(images, texts, prototypes, scale):
            return MulKILoss()(Features(images, texts, scale, prototypes), teachers, target)

        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        assert gradcheck(total, (student.images, student.texts, student.prototypes, scale))

    def test_a_student_that_is_its_teachers_has_cross_entropy_and_alignment_alone(
        self, student, target
    ):
        same = replace(
            student,
            images=student.images.detach(),
            texts=student.texts.detach(),
            prototypes=student.prototypes.detach(),
        )
        terms = MulKILoss()(student, (same, same), target, output_dict=True)
        distilled = sum(v for k, v in terms.items() if k not in ("ce_loss", "alignment_loss"))
        assert distilled.item() == pytest.approx(0, abs=1e-14)
        for grad in torch.autograd.grad(distilled, (student.images, student.texts)):
            torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-13, rtol=0)

    def test_wants_teachers_for_its_terms(self, student, target):
        with pytest.raises(ValueError, match="^teachers: got none"):
            MulKILoss()(student, (), target)

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            *((name, (-0.1, math.inf, math.nan)) for name in COEFFICIENTS),
            ("temperature", (0.0, -1.0, math.nan)),
            ("gate_temperature", (0.0, math.inf)),
            ("label_smoothing", (-0.1, 1.1, math.nan)),
            ("gate", ("lable", None)),
        ],
    )
    def test_errors_name_the_argument(self, name, values):
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: got {value!r}"):
                MulKILoss(**{name: value})

    def test_has_no_state(self):
        assert not MulKILoss().state_dict()
