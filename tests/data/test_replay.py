from __future__ import annotations

from collections import Counter

import pytest

from mulki.data.replay import BALANCED, RESERVOIR, ReplayImages, kept_places
from mulki.data.task import Task
from tests.data.data_helpers import Blank

# Two tasks: 40 images of one class and 10 of another, then 5 of each of two.
TARGETS = [[0] * 40 + [1] * 10, [0, 1] * 5]


@pytest.mark.parametrize("choice", [BALANCED, RESERVOIR])
def test_a_buffer_repeats_and_has_no_image_twice(choice: str) -> None:
    kept = kept_places(TARGETS, 12, choice, seed=3)
    assert kept == kept_places(TARGETS, 12, choice, seed=3)
    assert len(kept) == len(set(kept)) == 12 and kept == sorted(kept)
    assert kept != kept_places(TARGETS, 12, choice, seed=4)
    every = kept_places(TARGETS, 500, choice, seed=3)
    assert every == [(t, place) for t, of in enumerate(TARGETS) for place in range(len(of))]


def test_equally_many_of_each_class_as_far_as_there_are() -> None:
    def counts(size: int) -> list[int]:
        kept = kept_places(TARGETS, size, BALANCED, seed=0)
        found = Counter((task, TARGETS[task][place]) for task, place in kept)
        return [found[key] for key in ((0, 0), (0, 1), (1, 0), (1, 1))]

    assert counts(12) == [3, 3, 3, 3]
    assert counts(30) == [10, 10, 5, 5]
    assert sorted(counts(6)) == [1, 1, 2, 2]


def test_fewer_images_than_classes_are_of_all_tasks() -> None:
    targets = [[place % 10 for place in range(20)]] * 6
    earlier: set[tuple[int, int]] = set()
    for tasks in range(3, 7):
        kept = kept_places(targets[:tasks], 24, BALANCED, seed=0)
        assert len({(task, targets[task][place]) for task, place in kept}) == len(kept) == 24
        # No image comes back, and the last task has about as many as the others.
        assert {(task, place) for task, place in kept if task < tasks - 1} <= earlier or tasks == 3
        assert sum(task == tasks - 1 for task, _ in kept) >= 24 / tasks - 3
        earlier = set(kept)


def test_a_reservoir_keeps_each_image_with_the_same_chance() -> None:
    found = Counter(
        image for seed in range(600) for image in kept_places(TARGETS, 15, RESERVOIR, seed)
    )
    # 15 of 60 images in 600 draws: 150 each, with a standard deviation of 10.6.
    assert len(found) == 60 and all(105 <= count <= 195 for count in found.values())
    of_first = sum(count for (task, _), count in found.items() if task == 0)
    assert of_first / (600 * 15) == pytest.approx(50 / 60, abs=0.02)


def task(name: str, classes: tuple[str, ...], targets: tuple[int, ...]) -> Task:
    images = Blank(targets)
    return Task(name, classes, ("a photo of a {}.",), images, images)


def test_classes_are_numbered_after_those_of_the_current_task() -> None:
    tasks = [
        task("first", ("cat", "dog"), (0, 1, 1)),
        task("second", ("owl", "cat"), (0, 1)),
        task("third", ("dog", "elk"), (0, 1)),
    ]
    images = ReplayImages(tasks, [(0, 0), (0, 2), (1, 0), (1, 1)], batch_size=3)
    # A cat is one class in both tasks, and a dog one of the current task.
    assert images.texts == ["a photo of a cat.", "a photo of a owl."]
    assert images.targets == [2, 0, 3, 2] and len(images) == 4 and images.batch_size == 3
    assert images.load(1).tobytes() == tasks[0].train.load(2).tobytes()
    assert images.name(2) == tasks[1].train.name(0)
    other = ReplayImages(tasks, [(0, 1), (0, 2), (1, 0), (1, 1)])
    assert images.fingerprint() != other.fingerprint()
