"""The teachers of a task: how often they encode, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision import transforms as tv

from mulki.data import Task
from mulki.data.made_images import MadeImages
from mulki.data.reference import ReferenceSet
from mulki.data.transforms import is_deterministic
from mulki.methods import PREVIOUS, ZERO_SHOT
from tests.train.learn_helpers import BOTH, Load, crop, learn, method_named, two_teachers
from tests.train_helpers import Calls, same_state, state_of


def test_deterministic_transform_encodes_each_image_and_text_once(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls = Calls(monkeypatch)
    learn(student, task, BOTH, frozen)
    for teacher in frozen.values():
        assert calls.of(teacher, "texts") == [3]
        # The pass for the prototypes is the only one: 18 images in batches of batch_size_eval.
        assert calls.of(teacher, "images") == [7, 7, 4]
    assert calls.of(student, "images") == [6] * 6


def test_without_prototypes_images_are_encoded_as_they_come_up(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls = Calls(monkeypatch)
    # 18 images in batches of 6: the first three steps are new images, the next three are known.
    learn(student, task, "lwf", frozen)
    assert calls.of(frozen[PREVIOUS], "images") == [6, 6, 6]
    assert calls.of(frozen[PREVIOUS], "texts") == [3]
    assert calls.of(frozen[ZERO_SHOT], "images") == []
    assert calls.of(frozen[ZERO_SHOT], "texts") == []


@pytest.mark.parametrize(
    ("relation", "of_previous"), [("image_image", [7, 7, 4]), ("text_text", [])]
)
def test_teachers_held_on_made_images_see_those_alone(
    load_tiny: Load,
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
    relation: str,
    of_previous: list[int],
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls = Calls(monkeypatch)
    off = dict.fromkeys(("image_text", "image_image", "text_image", "text_text"), 0.0)
    method = method_named("mulki", hold_on="made", **off | {relation: 0.25})
    made = ReferenceSet.with_words(MadeImages(task.train, ["invert"], seed=0), None)
    learn(student, task, method, frozen, reference=made)
    # The student's prototypes begin at those of the original model, whatever it is held on.
    assert calls.of(frozen[ZERO_SHOT], "images") == [7, 7, 4, 6, 6, 6]
    assert calls.of(frozen[PREVIOUS], "images") == [*of_previous, 6, 6, 6]


def test_random_transform_encodes_images_at_every_step_and_texts_once(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls = Calls(monkeypatch)
    learn(student, task, BOTH, frozen, transform=crop(student))
    for teacher in frozen.values():
        assert calls.of(teacher, "texts") == [3]
        assert calls.of(teacher, "images") == [7, 7, 4] + [6] * 6


def test_another_deterministic_transform_encodes_each_image_once_more(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls = Calls(monkeypatch)
    gray = tv.Compose([tv.Grayscale(3), student.preprocess])
    learn(student, task, BOTH, frozen, transform=gray)
    for teacher in frozen.values():
        # The prototypes are of images with their colours, and the three batches of gray ones.
        assert calls.of(teacher, "images") == [7, 7, 4, 6, 6, 6]


def test_teachers_that_are_one_model_are_asked_once(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load_tiny()
    original = student.frozen_copy()
    calls = Calls(monkeypatch)
    learn(student, task, BOTH, {ZERO_SHOT: original, PREVIOUS: original})
    assert calls.of(original, "texts") == [3]
    assert calls.of(original, "images") == [7, 7, 4]


def test_a_teacher_under_two_names_is_asked_once_a_step(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load_tiny()
    original = student.frozen_copy()
    calls = Calls(monkeypatch)
    frozen = {ZERO_SHOT: original, PREVIOUS: original}
    learn(student, task, BOTH, frozen, transform=crop(student))
    assert calls.of(original, "images") == [7, 7, 4] + [6] * 6


@pytest.mark.parametrize("locked", [False, True])
def test_a_student_at_its_teacher_has_its_texts_to_the_bit_under_autocast(
    load_tiny: Load, task: Task, locked: bool
) -> None:
    student = load_tiny()
    student.lock(text=locked)
    first, *_ = learn(student, task, BOTH, precision="amp_bf16")
    assert abs(first.losses["text_text_loss"]) < 1e-12


def test_finetuning_needs_no_teacher(load_tiny: Load, task: Task) -> None:
    reports = learn(load_tiny(), task, "finetune", frozen={})
    assert reports and all(set(report.losses) == {"ce_loss"} for report in reports)


@pytest.mark.parametrize("name", ["lwf", "mulki"])
def test_cached_and_uncached_teachers_train_the_same_weights(
    load_tiny: Load, task: Task, name: str
) -> None:
    cached, uncached = load_tiny(), load_tiny()
    start = state_of(cached)

    def opaque(image: Any) -> Any:
        return uncached.preprocess(image)

    assert is_deterministic(cached.preprocess) and not is_deterministic(opaque)
    learn(cached, task, name, two_teachers(load_tiny))
    learn(uncached, task, name, two_teachers(load_tiny), transform=opaque)
    for key, value in state_of(cached).items():
        torch.testing.assert_close(value, state_of(uncached)[key], rtol=0, atol=2e-5)
    moved = max(float((v - start[k]).abs().max()) for k, v in state_of(cached).items())
    assert moved > 1e-3, "the comparison would hold for models that did not train"


def test_teachers_matter(load_tiny: Load, task: Task) -> None:
    one, other = load_tiny(), load_tiny()
    learn(one, task, "lwf", {PREVIOUS: load_tiny(seed=1).frozen_copy()})
    learn(other, task, "lwf", {PREVIOUS: load_tiny(seed=2).frozen_copy()})
    assert not same_state(state_of(one), state_of(other))


@pytest.mark.parametrize("architecture", ["tiny-vit", "tiny-resnet"])
def test_teachers_do_not_change(load_tiny: Load, task: Task, architecture: str) -> None:
    student = load_tiny(architecture)
    original = student.frozen_copy()
    before = state_of(original)
    learn(student, task, BOTH, {ZERO_SHOT: original, PREVIOUS: original})
    assert same_state(state_of(original), before)
    assert not same_state(state_of(student), before)
    assert not any(p.requires_grad or p.grad is not None for p in original.clip.parameters())
