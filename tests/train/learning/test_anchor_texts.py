"""Which texts are a task's anchors, and what encodes them how often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.data import Task
from mulki.data.vocabulary import Vocabulary
from mulki.errors import InputError
from mulki.methods import PREVIOUS, SEEN, VOCABULARY, ZERO_SHOT
from mulki.train.learning.anchor_texts import Anchors, AnchorTexts, anchor_texts
from tests.train.learn_helpers import Load, learn, method_named, two_teachers
from tests.train.run_helpers import Run
from tests.train_helpers import Calls

WORDS = Vocabulary.of(["cat", "Blue", "dark", "dog"])
TEXTS = AnchorTexts(("s0", "s1", "s2"), tuple(f"v{i}" for i in range(20)))


@pytest.fixture
def tasks(task_folders: tuple[str, str]) -> list[Task]:
    from mulki.data import folder_task

    return [folder_task(folder) for folder in task_folders]


def test_a_class_of_the_task_is_no_anchor(tasks: list[Task]) -> None:
    colours, shades = tasks
    assert {"blue"} < set(colours.classes) and {"dark"} < set(shades.classes)
    first = anchor_texts((SEEN, VOCABULARY), tasks, 0, WORDS)
    assert first.seen == ()
    assert first.vocabulary == tuple(f"a picture of a {word}" for word in ("cat", "dark", "dog"))
    assert first.left_out == 1
    second = anchor_texts((SEEN, VOCABULARY), tasks, 1, WORDS)
    assert second.seen == tuple(prompts[0] for prompts in colours.prompts())
    # "Blue" is an earlier class, so it is there already.
    assert second.vocabulary == tuple(f"a picture of a {word}" for word in ("cat", "dog"))
    assert second.left_out == 2


def test_groups_that_are_not_asked_for_are_empty(tasks: list[Task]) -> None:
    assert anchor_texts((SEEN,), tasks, 1, None).vocabulary == ()
    assert anchor_texts((VOCABULARY,), tasks, 1, WORDS).seen == ()


def test_a_class_of_two_earlier_tasks_is_one_anchor(tasks: list[Task]) -> None:
    colours, shades = tasks
    texts = anchor_texts((SEEN,), [colours, colours, shades], 2, None)
    assert len(texts.seen) == len(colours.classes) == texts.left_out


class Numbers:
    """Inputs of prompts: the number of each, counted."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        self.asked.append(len(prompts))
        all_texts = [*TEXTS.seen, *TEXTS.vocabulary]
        return torch.tensor([[all_texts.index(prompt)] for prompt in prompts])


@pytest.mark.parametrize("per_step", [None, 23, 100])
def test_all_anchors_are_prepared_once(per_step: int | None) -> None:
    inputs = Numbers()
    anchors = Anchors(TEXTS, inputs, per_step, seed=0)
    for _ in range(3):
        batch = anchors.draw()
        assert batch is not None and batch.places is None and batch.seen == 3
        assert batch.inputs.flatten().tolist() == list(range(23))
    assert inputs.asked == [23]


@pytest.mark.parametrize(
    ("per_step", "seen"), [(1, {0, 1}), (4, {2}), (5, {2, 3}), (8, {3}), (22, {3})]
)
def test_drawn_anchors(per_step: int, seen: set[int]) -> None:
    anchors = Anchors(TEXTS, Numbers(), per_step, seed=0)
    drawn, of_seen = set(), set()
    for _ in range(300):
        batch = anchors.draw()
        assert batch is not None and batch.places is not None
        places = batch.places.tolist()
        assert len(set(places)) == per_step
        assert batch.inputs.flatten().tolist() == places
        assert all((place < 3) == (row < batch.seen) for row, place in enumerate(places))
        of_seen.add(batch.seen)
        drawn.update(places)
    assert of_seen == seen and drawn == set(range(23))


def test_draws_come_from_the_seed() -> None:
    def draws(seed: int) -> list[list[int]]:
        anchors = Anchors(TEXTS, Numbers(), 5, seed=seed)
        return [anchors.draw().inputs.flatten().tolist() for _ in range(3)]  # type: ignore[union-attr]

    assert draws(1) == draws(1) != draws(2)


def test_no_anchors() -> None:
    assert Anchors(AnchorTexts(), Numbers(), None, seed=0).draw() is None


def anchored(load_tiny: Load, per_step: int | None, **options: Any) -> tuple[Any, ...]:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    anchors = Anchors(TEXTS, student.text_inputs, per_step, seed=0)
    method = method_named("mulki", anchors="both", **options)
    return student, frozen, anchors, method


def test_a_teacher_encodes_each_anchor_once(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen, anchors, method = anchored(load_tiny, None)
    calls = Calls(monkeypatch)
    reports = learn(student, task, method, frozen, anchors=anchors)
    for teacher in frozen.values():
        assert calls.of(teacher, "texts") == [3, 23]
    # Held against the teachers' texts, the student encodes its classes alone.
    assert calls.of(student, "texts") == [3] * 6
    assert all(report.losses["image_anchor_loss"] > 0 for report in reports)


def test_drawn_anchors_are_encoded_when_they_are_drawn(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen, anchors, method = anchored(load_tiny, 4, anchor_texts="student")
    calls = Calls(monkeypatch)
    learn(student, task, method, frozen, anchors=anchors)
    assert calls.of(student, "texts") == [3 + 4] * 6
    for teacher in frozen.values():
        classes, first, *later = calls.of(teacher, "texts")
        assert (classes, first) == (3, 4)
        assert sum(later) + first < 6 * 4


def test_student_and_teacher_that_are_alike_agree_on_anchors(load_tiny: Load, task: Task) -> None:
    for anchor_texts_of in ("student", "teacher"):
        student, _, anchors, method = anchored(load_tiny, 4, anchor_texts=anchor_texts_of)
        original = student.frozen_copy()
        frozen = {ZERO_SHOT: original, PREVIOUS: original}
        first, *_ = learn(student, task, method, frozen, anchors=anchors)
        assert abs(first.losses["image_anchor_loss"]) < 1e-6


def test_anchors_without_need_and_need_without_anchors(load_tiny: Load, task: Task) -> None:
    student, frozen, anchors, method = anchored(load_tiny, None)
    with pytest.raises(ValueError, match="^anchors: got None"):
        learn(student, task, method, frozen)
    with pytest.raises(ValueError, match="^anchors: got 23 texts"):
        learn(student, task, "lwf", frozen, anchors=anchors)


def test_a_run_with_a_vocabulary_of_ones_own(run: Run, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("cat\nblue\ndog\ncat\n")
    folder = run(method="mulki", anchors="both", vocabulary=str(words), log_every_n_steps=1)
    log = (folder.path / "out.log").read_text()
    assert "vocabulary: 3 words; repeated and left out: 1" in log
    assert "text anchors left out for a class of the same name: colours 1, shades 1" in log
    assert "image_anchor" in log
    assert "vocabulary" in (folder.path / "env.json").read_text()


def test_a_bad_vocabulary_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n")
    with pytest.raises(InputError, match="^--vocabulary: "):
        run(method="mulki", anchors="vocabulary", vocabulary=str(tmp_path / "words.txt"))
    assert not list((tmp_path / "logs").glob("*"))
