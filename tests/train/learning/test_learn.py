from __future__ import annotations

import time
from dataclasses import replace

import pytest

from mulki.data import Task
from mulki.data.image_files import ImageFiles
from mulki.errors import InputError
from mulki.train.learning.learn import steps_of
from tests.train.learn_helpers import BOTH, CONFIG, Load, learn, method_named, two_teachers
from tests.train_helpers import same_state, state_of


def test_a_task_shorter_than_the_running_mean_is_learned(load_tiny: Load, task: Task) -> None:
    """Six steps, a member every ten: the mean of the start alone would undo the task."""
    student = load_tiny()
    before = state_of(student)
    learn(student, task, method_named("mulki", we_every=10))
    assert not same_state(state_of(student), before)


def test_learns_the_training_images(load_tiny: Load, task: Task) -> None:
    reports = learn(load_tiny(), task, config=replace(CONFIG, iterations=40, lr=3e-3))
    assert reports[-1].losses["ce_loss"] < 0.7 * reports[0].losses["ce_loss"]


def test_ends_in_evaluation_mode_after_training_mode(load_tiny: Load, task: Task) -> None:
    student = load_tiny()
    modes: list[bool] = []
    student.clip.visual.register_forward_hook(lambda m, *_: modes.append(m.training))
    learn(student, task, frozen={})
    assert modes == [True] * 6
    assert not any(m.training for m in student.clip.modules())


def test_reports_of_the_steps(load_tiny: Load, task: Task) -> None:
    config = replace(CONFIG, lr_scheduler="cosine", warmup=2, iterations=6)
    reports = learn(load_tiny(), task, BOTH, two_teachers(load_tiny), config=config)
    assert [r.step for r in reports] == [1, 2, 3, 4, 5, 6]
    assert [r.lr / config.lr for r in reports[:3]] == pytest.approx([0.5, 1.0, 1.0])
    assert reports[-1].lr < reports[3].lr < config.lr
    assert {r.images for r in reports} == {6}
    assert all(r.seconds > 0 for r in reports)
    names = {"ce", "alignment", "image_text", "image_image", "text_image", "text_text", "feature"}
    assert {k.removesuffix("_loss") for k in reports[0].losses} == names
    assert all(isinstance(v, float) for v in reports[0].losses.values())


def test_time_of_reporting_is_not_that_of_loading(load_tiny: Load, task: Task) -> None:
    reports = learn(load_tiny(), task, hear=lambda report: time.sleep(0.05))
    assert all(r.seconds - sum(r.parts.values()) >= 0.05 for r in reports[1:])


def test_a_slow_disk_shows_in_the_time_of_loading(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ImageFiles.load
    monkeypatch.setattr(ImageFiles, "load", lambda *given: (time.sleep(0.02), real(*given))[1])
    reports = learn(load_tiny(), task, frozen={})
    # The first pass over 18 images, in batches of 6.
    assert all(r.parts["loading"] >= 6 * 0.02 for r in reports[:3])


def test_a_task_may_have_a_rate_of_its_own(load_tiny: Load, task: Task) -> None:
    config = replace(CONFIG, lr_scheduler="const", lr_of=("other=1", f"{task.name}=3e-5"))
    assert {r.lr for r in learn(load_tiny(), task, config=config)} == {3e-5}


@pytest.mark.parametrize(
    ("epochs", "images", "steps"),
    [(1.0, 18, 3), (2.0, 19, 7), (0.5, 18, 2), (0.001, 18, 1), (10.0, 4, 10), (1.0, 0, 1)],
)
def test_steps_of_epochs(epochs: float, images: int, steps: int) -> None:
    assert steps_of(replace(CONFIG, epochs=epochs), images) == steps
    assert steps_of(CONFIG, images) == 6


@pytest.mark.parametrize("name", ["finetune", "mulki"])
def test_loss_that_is_not_finite_ends_with_one_line(load_tiny: Load, task: Task, name: str) -> None:
    with pytest.raises(InputError, match=r"^--lr 1e\+30: .* step \d") as info:
        learn(load_tiny(), task, name, config=replace(CONFIG, lr=1e30))
    assert "task colours" in str(info.value) and "ce_loss nan" in str(info.value)
    assert "\n" not in str(info.value)
