from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mulki.clip.features import Features
from mulki.functional import clip_contrastive
from mulki.losses import MulKILoss
from mulki.ops.gates import Weighting
from mulki.stages import adding, distinguishing
from tests.stages.formulas import (
    RELATIONS,
    expected_class_weights,
    expected_feature,
    expected_kl,
    expected_label_weights,
    expected_relation,
)

COEFFICIENTS = ("alignment", *RELATIONS, "feature")
# Those of terms that are off, or absent without anchors, at the default options.
OTHERS = ("prototype", "image_anchor", "text_anchor")
# Those of terms of captions alone.
OF_PAIRS = ("image_caption",)


class TestObjective:
    def expected_terms(self, student, teachers, target):
        """Terms with the gate "label" and coefficients of 1."""
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
        objective = MulKILoss(gate="label", label_smoothing=0.2, **coefficients)
        got = objective(student, teachers, target)
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

    def test_the_coefficient_of_captions_has_no_say(self, student, teachers, target):
        one, other = (
            MulKILoss(image_caption=value)(student, teachers, target, output_dict=True)
            for value in (0.0, 9.0)
        )
        assert one == other

    @pytest.mark.parametrize("name", COEFFICIENTS + OTHERS)
    def test_each_term_has_its_needs(self, student, teachers, target, name):
        loss = MulKILoss(**{other: float(other == name) for other in COEFFICIENTS + OTHERS})
        assert loss.needs_teachers == (name not in ("alignment", "prototype"))
        visual = ("alignment", "prototype", "image_image", "text_image")
        assert loss.needs_prototypes == (name in visual)
        assert loss.needs_anchors == (name in ("image_anchor", "text_anchor"))
        if not loss.needs_teachers:
            teachers = []
        if not loss.needs_prototypes:
            student, *teachers = (replace(m, prototypes=None) for m in (student, *teachers))
        assert loss(student, teachers, target).isfinite()

    def test_without_any_term_it_is_cross_entropy(self, student, target):
        loss = MulKILoss(**dict.fromkeys(COEFFICIENTS + OTHERS, 0.0), label_smoothing=0.1)
        assert not loss.needs_teachers and not loss.needs_prototypes
        expected = F.cross_entropy(
            expected_relation(student, "image_text"), target, label_smoothing=0.1
        )
        torch.testing.assert_close(loss(replace(student, prototypes=None), (), target), expected)

    def test_options_reach_their_terms(self, student, teachers, target):
        options = {"temperature": 3.0, "gate_temperature": 0.5, "scale_by_t2": False}
        options |= {"gate": "label"}
        got = MulKILoss(**options)(student, teachers, target, output_dict=True)
        w = distinguishing.sample_weights(
            student, teachers, target, Weighting.of("label", 0.5), temperature=3.0
        )
        for name, weights in {
            "image_image": w,
            "text_text": distinguishing.class_weights(w, target, 4),
        }.items():
            expected = 0.25 * expected_kl(student, teachers, name, weights, 3.0) / 9
            torch.testing.assert_close(got[f"{name}_loss"], expected)
        torch.testing.assert_close(got["feature_loss"], adding.feature_loss(student, teachers, w))

    def test_terms_that_are_off_by_default(self, student, teachers, target, with_anchors):
        student, *teachers = (with_anchors(model) for model in (student, *teachers))
        options = {"gate": "label", "prototype": 0.3, "image_anchor": 0.5, "text_anchor": 0.7}
        objective = MulKILoss(label_smoothing=0.2, **options)
        got = objective(student, teachers, target, output_dict=True)
        logits = expected_relation(student, "image_image")
        expected = 0.3 * F.cross_entropy(logits, target, label_smoothing=0.2)
        torch.testing.assert_close(got["prototype_loss"], expected)
        w = expected_label_weights(teachers, target)
        for name, weights in {
            "image_anchor": w,
            "text_anchor": expected_class_weights(w, target, 4),
        }.items():
            expected = 0.0
            for k, t in enumerate(teachers):
                held = replace(student, anchored=t.anchored)
                expected = expected + expected_kl(held, [t], name, weights[:, k : k + 1])
            torch.testing.assert_close(got[f"{name}_loss"], options[name] * expected)

    @pytest.mark.parametrize("name", ["images", "texts", "prototypes", "scale"])
    def test_a_teacher_that_requires_grad_is_refused(self, student, teachers, target, name):
        part = torch.as_tensor(getattr(teachers[1], name)).detach().clone().requires_grad_()
        models = [teachers[0], replace(teachers[1], **{name: part})]
        with pytest.raises(ValueError, match=r"^teachers\[1\]: requires grad"):
            MulKILoss()(student, models, target)

    def test_a_teacher_in_float32_is_refused_by_a_student_in_float64(
        self, student, teachers, target
    ):
        parts = {n: getattr(teachers[0], n).float() for n in ("images", "texts", "prototypes")}
        models = [replace(teachers[0], **parts), teachers[1]]
        with pytest.raises(TypeError, match=r"^teachers\[0\]: got dtype torch\.float32"):
            MulKILoss(image_text=0, gate="uniform")(student, models, target)

    @pytest.mark.parametrize("scale", [None, "9", torch.ones(1)])
    def test_a_scale_that_is_none_is_refused(self, student, teachers, target, scale):
        models = [teachers[0], replace(teachers[1], scale=scale)]
        with pytest.raises((TypeError, ValueError), match=r"^teachers\[1\]\.scale: got"):
            MulKILoss()(student, models, target)

    def test_what_are_no_features_is_named(self, student, teachers, target):
        with pytest.raises(TypeError, match=r"^student: got Tensor, wanted mulki\.clip\.Features"):
            MulKILoss()(student.images, teachers, target)
        with pytest.raises(TypeError, match=r"^teachers\[1\]: got Tensor"):
            MulKILoss()(student, [teachers[0], student.images], target)
        with pytest.raises(TypeError, match="^teachers: got Features"):
            MulKILoss()(student, teachers[0], target)

    @pytest.mark.parametrize("name", ["images", "texts", "prototypes"])
    def test_features_that_are_no_tensors_are_refused(self, student, teachers, target, name):
        bad = replace(student, **{name: [[1.0]]})
        with pytest.raises(TypeError, match=rf"^student\.{name}: got list"):
            MulKILoss()(bad, teachers, target)

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
            *((name, (-0.1, math.inf, math.nan)) for name in COEFFICIENTS + OTHERS + OF_PAIRS),
            ("anchor_texts", ("teachers",)),
            ("anchor_weights", ("label", None)),
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

    @pytest.mark.parametrize("name", ["image_text", "image_caption", "feature", "temperature"])
    def test_what_is_no_number_is_named(self, name):
        with pytest.raises(TypeError, match=f"^{name}: got str"):
            MulKILoss(**{name: "1"})

    def test_has_no_state(self):
        assert not MulKILoss().state_dict()


class OperatorCalls(TorchDispatchMode):
    """Counts the calls of mulki's operators, those of the backward pass included."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mulki":
            self.count[func._schema.name.removeprefix("mulki::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"prototype_cross_entropy": 1, "contrastive": 1, "teacher_kl": 4}),
        ({"gate": "uniform", "image_text": 0}, {"teacher_kl": 3}),
        # Without the relation that the gate looks at, its pass is run for the weights alone.
        ({"gate": "label", "image_text": 0}, {"teacher_kl": 4}),
        ({"image_image": 0, "text_image": 0, "text_text": 0, "feature": 0}, {"teacher_kl": 1}),
        # Held against each teacher's own anchors.
        ({"anchors": True}, {"teacher_kl": 6}),
        ({"anchors": True, "anchor_texts": "student"}, {"teacher_kl": 5}),
        # The losses of the two teachers are two more products.
        ({"gate": "loss"}, {"prototype_cross_entropy": 3, "teacher_kl": 4}),
    ],
)
def test_operator_calls_of_one_step(student, teachers, target, with_anchors, options, wanted):
    if options.get("anchors"):
        options = {name: value for name, value in options.items() if name != "anchors"}
        student, *teachers = (with_anchors(model) for model in (student, *teachers))
    loss = MulKILoss(**options)
    with OperatorCalls() as calls:
        loss(student, teachers, target).backward()
    # Gradients of the means come with them: no operator is called in the backward pass.
    calls.count.pop("scaled", None)
    assert calls.count == {"prototype_cross_entropy": 1, "contrastive": 1, **wanted}


class TestHoldOn:
    """Relations and distance on images of a reference set."""

    def with_reference(self, model, images):
        return replace(model, reference=Features(images, images[:0], model.scale))

    def models(self, student, teachers, unit):
        images = unit(3, 5).requires_grad_()
        student = self.with_reference(student, images)
        return student, [self.with_reference(t, unit(3, 5)) for t in teachers]

    def on_made(self, model):
        return replace(model, images=model.reference.images)

    def test_made_images_take_the_place_of_the_tasks(self, student, teachers, target, unit):
        student, teachers = self.models(student, teachers, unit)
        got = MulKILoss(hold_on="made")(student, teachers, target, output_dict=True)
        made, of_teachers = self.on_made(student), [self.on_made(t) for t in teachers]
        rows, per_class = (torch.full((n, 2), 0.5, dtype=torch.float64) for n in (3, 4))
        expected = {
            name: 0.25 * expected_kl(made, of_teachers, name, rows)
            for name in ("image_text", "image_image")
        } | {
            name: 0.25 * expected_kl(student, teachers, name, per_class)
            for name in ("text_image", "text_text")
        }
        expected["feature"] = expected_feature(made, of_teachers, rows)
        for name, value in expected.items():
            torch.testing.assert_close(got[f"{name}_loss"], value)
        plain = MulKILoss()(student, teachers, target, output_dict=True)
        for name in ("ce_loss", "alignment_loss"):
            assert got[name] == plain[name]
        held = sum(
            value for name, value in got.items() if name not in ("ce_loss", "alignment_loss")
        )
        (of_task,) = torch.autograd.grad(held, [student.images], allow_unused=True)
        assert of_task is None, "the task's images teach alone"

    def test_both_is_the_sum_of_the_two(self, student, teachers, target, unit, with_anchors):
        student, teachers = self.models(student, teachers, unit)
        student, *teachers = (with_anchors(model) for model in (student, *teachers))

        def terms(hold_on):
            loss = MulKILoss(hold_on=hold_on, text_image=0, text_text=0)
            return loss(student, teachers, target, output_dict=True)

        task, made, both = map(terms, ("task", "made", "both"))
        assert both.keys() == task.keys() == made.keys() and "image_anchor_loss" in both
        for name, value in both.items():
            once = name in ("ce_loss", "alignment_loss")
            torch.testing.assert_close(value, task[name] if once else task[name] + made[name])

    def test_the_distance_of_select_and_distill(self, student, teachers, target, unit):
        student, teachers = self.models(student, teachers, unit)
        loss = MulKILoss(
            **dict.fromkeys(("image_text", "image_image", "text_image", "text_text"), 0.0),
            gate="discrepancy",
            feature=9.0,
            feature_original=0.5,
            hold_on="made",
        )
        terms, weights = loss.terms(student, teachers, target)
        ours, original, previous = (m.reference.images for m in (student, *teachers))
        w = torch.sigmoid(6 * ((original - previous).norm(dim=1) - 0.2))
        torch.testing.assert_close(weights, torch.stack([1 - w, w], dim=1))
        distances = [(ours - of).square().sum(dim=1) for of in (previous, original)]
        expected = (9 * w * distances[0] + 0.5 * (1 - w) * distances[1]).mean()
        torch.testing.assert_close(terms["feature_loss"], expected)

    def test_without_a_term_of_images_no_reference_is_needed(self, student, teachers, target):
        off = dict.fromkeys(("image_text", "image_image", "image_anchor", "feature"), 0.0)
        loss = MulKILoss(hold_on="made", **off)
        assert not loss.needs_reference and loss.needs_teachers
        got = loss(student, teachers, target)
        torch.testing.assert_close(got, MulKILoss(**off)(student, teachers, target))
        # Nor do the teachers' images of the task have a say.
        gated = MulKILoss(hold_on="made", gate="discrepancy", **off)
        teachers = [replace(teacher, images=teacher.images[:0]) for teacher in teachers]
        torch.testing.assert_close(gated(student, teachers, target), got)
        assert gated.terms(student, teachers, target)[1] is None

    def test_what_is_refused(self, student, teachers, target):
        for gate in ("label", "loss"):
            with pytest.raises(ValueError, match=f'^gate: got "{gate}", which looks at the target'):
                MulKILoss(hold_on="made", gate=gate)
        with pytest.raises(ValueError, match="^hold_on: got"):
            MulKILoss(hold_on="reference")
        with pytest.raises(ValueError, match="without a reference set; pass it, or hold_on="):
            MulKILoss(hold_on="both")(student, teachers, target)
        with pytest.raises(ValueError, match="^teachers: got 1 with a feature_original"):
            MulKILoss(feature_original=0.5)(student, teachers[:1], target)


def test_an_objective_shows_its_arguments():
    assert repr(MulKILoss()) == "MulKILoss()"
    changed = {"gate": "label", "image_text": 0.0, "image_anchor": 0.5, "feature": 2.0}
    shown = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    assert repr(MulKILoss(**changed)) == f"MulKILoss({shown})"
    apart = repr(MulKILoss(feature_original=0.0, hold_on="both"))
    assert apart == "MulKILoss(feature_original=0.0, hold_on='both')"


def test_anchors_and_prototypes_fit_the_texts(student, teachers, target):
    anchored = [
        replace(t, anchored=torch.cat([t.texts, t.texts[:2]]), num_seen=1) for t in teachers
    ]
    MulKILoss(feature=0)(student, anchored, target)
    few = [replace(t, anchored=t.texts[:3]) for t in teachers]
    more_seen = [replace(t, num_seen=3) for t in anchored]
    less = [replace(teachers[0], prototypes=teachers[0].prototypes[:3]), *teachers[1:]]
    for given, said in (
        (few, r"teachers\[0\]\.anchored: got 3 rows, wanted at least 4"),
        (more_seen, r"teachers\[0\]\.anchored: got 6 rows, wanted at least 7"),
        ([anchored[0], *teachers[1:]], r"teachers: got anchored of \[\(6, 1\), None"),
        ([anchored[0], replace(anchored[1], num_seen=2)], r"of \[\(6, 1\), \(6, 2\)\] rows"),
        (less, r"teachers\[0\]\.prototypes: got shape \[3, .*a row for each of teachers\[0\]"),
    ):
        with pytest.raises(ValueError, match=said):
            MulKILoss(feature=0, image_anchor=0.5)(student, given, target)
    MulKILoss(feature=0, image_anchor=0, text_anchor=0)(student, few, target)
