"""The relations to text anchors, by their formula on stored matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from mulki.stages.anchors import present, text_anchor_kl
from tests.stages.formulas import expected_kl, expected_label_weights


@pytest.fixture
def models(student, teachers, with_anchors):
    return with_anchors(student), [with_anchors(teacher) for teacher in teachers]


def held_against(student, teacher):
    return replace(student, anchored=teacher.anchored)


def only(group, model):
    """The model with the anchors of one group alone."""
    anchors = getattr(model, group)
    count = len(anchors) if group == "seen" else 0
    return replace(model, anchored=torch.cat([model.texts, anchors]), num_seen=count)


def test_images_against_each_teachers_own_texts(models, target):
    student, teachers = models
    w = expected_label_weights(teachers, target)
    expected = sum(
        expected_kl(held_against(student, t), [t], "image_anchor", w[:, k : k + 1])
        for k, t in enumerate(teachers)
    )
    got = text_anchor_kl(student, teachers, w)
    torch.testing.assert_close(got, expected)
    # The student's texts have no part in it.
    grads = torch.autograd.grad(got, (student.images, student.texts), allow_unused=True)
    assert grads[0].abs().max() > 1e-3 and grads[1] is None


def test_images_against_the_students_texts(models, target):
    student, teachers = models
    w = expected_label_weights(teachers, target)
    got = text_anchor_kl(student, teachers, w, anchor_texts="student", temperature=3.0)
    torch.testing.assert_close(got, expected_kl(student, teachers, "image_anchor", w, 3.0))
    unscaled = text_anchor_kl(
        student, teachers, w, anchor_texts="student", temperature=3.0, scale_by_t2=False
    )
    torch.testing.assert_close(unscaled, got / 9)


def test_texts_against_anchors(models):
    student, teachers = models
    w = torch.rand(4, 2, dtype=torch.float64)
    got = text_anchor_kl(student, teachers, w, rows="texts", anchor_texts="student")
    torch.testing.assert_close(got, expected_kl(student, teachers, "text_anchor", w))


@pytest.mark.parametrize("anchor_texts", ["teacher", "student"])
def test_a_group_has_the_teacher_that_knows_it(models, target, anchor_texts):
    student, (original, previous) = models
    w = expected_label_weights([original, previous], target)
    got = text_anchor_kl(
        student,
        [original, previous],
        w,
        anchor_weights="group",
        anchor_texts=anchor_texts,
    )
    half, expected = torch.full((6, 1), 0.5, dtype=torch.float64), 0.0
    for teacher, group in ((previous, "seen"), (original, "vocabulary")):
        s, t = only(group, student), only(group, teacher)
        if anchor_texts == "teacher":
            s = held_against(s, t)
        expected = expected + expected_kl(s, [t], "image_anchor", half)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("group", ["seen", "vocabulary"])
@pytest.mark.parametrize("anchor_weights", ["gate", "group"])
def test_one_group_alone(models, target, group, anchor_weights):
    student, teachers = models
    student, *teachers = (only(group, m) for m in (student, *teachers))
    assert present(teachers)
    w = expected_label_weights(teachers, target)
    if anchor_weights == "group":
        w = torch.zeros_like(w)
        w[:, 1 if group == "seen" else 0] = 1
    got = text_anchor_kl(
        student, teachers, w, anchor_weights=anchor_weights, anchor_texts="student"
    )
    torch.testing.assert_close(got, expected_kl(student, teachers, "image_anchor", w))


@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_groups_are_as_strong_as_a_gate(models, strength):
    """A student without any teacher's knowledge, held against one teacher under two names."""
    student, (teacher, _) = models
    w = torch.full((6, 2), 0.5, dtype=torch.float64)
    for group in ("seen", "vocabulary"):
        s, t = only(group, student), only(group, teacher)
        gate, groups = (
            text_anchor_kl(s, [t, t], strength * w, anchor_weights=by, anchor_texts="student")
            for by in ("gate", "group")
        )
        torch.testing.assert_close(gate, groups)


def test_gradcheck(models, target):
    student, teachers = models
    w = expected_label_weights(teachers, target)

    def loss(images, anchored):
        of = replace(student, images=images, texts=anchored[:4], anchored=anchored)
        return text_anchor_kl(of, teachers, w, anchor_texts="student")

    anchored = student.anchored.detach().requires_grad_()
    assert gradcheck(loss, (student.images, anchored))


def test_a_first_task_may_have_none(student, teachers):
    assert not present(teachers)


def test_errors(models, student, model_features, with_anchors):
    _, teachers = models
    w = torch.ones(6, 2, dtype=torch.float64) / 2
    with pytest.raises(ValueError, match="^student, teachers: one has no anchors"):
        text_anchor_kl(student, teachers, w, anchor_texts="student")
    wider = [with_anchors(model_features(width=7)) for _ in range(2)]
    with pytest.raises(ValueError, match="^teachers: got texts of width 7, wanted the student's"):
        text_anchor_kl(with_anchors(student), wider, w)
    loss = text_anchor_kl(with_anchors(student), wider, w, anchor_texts="student")
    assert loss.isfinite()
