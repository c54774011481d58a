from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mulki.data import Task, class_steps, folder_task, load_sequence
from mulki.data.class_steps import equal_steps
from mulki.errors import InputError
from tests.data.data_helpers import Blank

COUNTS = {
    "embedded-flags": {f"flags-{i}": 29 for i in range(1, 9)},
    "embedded-glyphs": {
        "digits-1": 5, "digits-2": 5, "letters-1": 7, "letters-2": 7, "letters-3": 6, "letters-4": 6
    },
}  # fmt: skip


@pytest.fixture
def task(make_folder: Callable[..., Path]) -> Task:
    return folder_task(make_folder(train=("a", "b", "c", "d", "e")))


def test_every_image_is_in_the_step_of_its_class(task: Task) -> None:
    first, second = class_steps(task, (2, 3))
    assert (first.name, second.name) == ("birds-1", "birds-2")
    assert (first.classes, second.classes) == (("a", "b"), ("c", "d", "e"))
    assert first.templates == second.templates == task.templates
    for split in ("train", "test"):
        whole, seen = getattr(task, split), []
        for step in (first, second):
            part = getattr(step, split)
            for place, target in enumerate(part.targets):
                index = part.indices[place]
                seen.append(index)
                assert step.classes[target] == task.classes[whole.targets[index]]
                assert part.name(place) == whole.name(index)
                assert np.array_equal(part.load(place), whole.load(index))
        assert sorted(seen) == list(range(len(whole)))


def test_a_step_without_validation_images(make_folder: Callable[..., Path]) -> None:
    root = make_folder(train=("a", "b", "c", "d"))
    shutil.copytree(root / "test" / "d", root / "val" / "d")
    first, second = class_steps(folder_task(root), [2, 2])
    assert first.val is None
    assert second.val is not None and list(second.val.targets) == [1] * 3


def test_other_steps_have_other_fingerprints(task: Task) -> None:
    steps = [*class_steps(task, (2, 3)), *class_steps(task, (3, 2))]
    assert len({step.fingerprint() for step in steps}) == 4
    assert class_steps(task, (2, 3))[1].fingerprint() == steps[1].fingerprint()


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((2, 2), "got steps of 2, 2 classes, wanted steps of at least two that sum to its 5 cl"),
        ((4, 1), "4, 1"),
        ((7, -2), "7, -2"),
        ((), "sum to its 5"),
    ],
)
def test_counts_that_do_not_fit(task: Task, counts: tuple[int, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        class_steps(task, counts)


@pytest.mark.parametrize("name", COUNTS)
def test_the_bundled_sequences(name: str) -> None:
    tasks = load_sequence([name])
    assert {task.name: len(task.classes) for task in tasks} == COUNTS[name]
    whole = {task.name: task for task in load_sequence(["embedded"])}
    for stem in dict.fromkeys(task.name.rpartition("-")[0] for task in tasks):
        steps = [task for task in tasks if task.name.startswith(f"{stem}-")]
        assert tuple(c for step in steps for c in step.classes) == whole[stem].classes
        for split in ("train", "test"):
            total = sum(len(getattr(step, split)) for step in steps)
            assert total == len(getattr(whole[stem], split))
    (single,) = load_sequence([f"{name}:{tasks[1].name}"])
    assert single.fingerprint() == tasks[1].fingerprint()


@pytest.mark.parametrize("name", COUNTS)
def test_an_unknown_order(name: str) -> None:
    with pytest.raises(InputError, match=f'order "II": {name} has the order I$'):
        load_sequence([name], "II")


def of_classes(count: int) -> Task:
    images = Blank(tuple(range(count)))
    return Task("zoo", tuple(f"c{i}" for i in range(count)), ("{}",), images, images)


@pytest.mark.parametrize(
    ("increments", "base", "sizes"),
    [(10, 0, [10] * 10), (50, 0, [2] * 50), (5, 50, [50] + [10] * 5), (1, 90, [90, 10])],
)
def test_equal_steps(increments: int, base: int, sizes: list[int]) -> None:
    steps = equal_steps(of_classes(100), increments, base)
    assert [len(step.classes) for step in steps] == sizes
    assert [name for step in steps for name in step.classes] == list(of_classes(100).classes)
    assert [step.name for step in steps] == [f"zoo-{n}" for n in range(1, len(sizes) + 1)]


def test_one_step_is_the_task_itself() -> None:
    whole = of_classes(4)
    assert equal_steps(whole, 1) == [whole]


@pytest.mark.parametrize(
    ("increments", "base", "says"),
    [
        (3, 0, "--increments: got 3, but 10 classes of zoo .*; 1, 2, 5 would do"),
        (10, 0, "--increments: got 10"),
        (2, 9, "^--increments: got 2, "),
        (2, 10, "^--base-classes: got 10, "),
    ],
)
def test_unequal_steps_are_refused(increments: int, base: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        equal_steps(of_classes(10), increments, base)
