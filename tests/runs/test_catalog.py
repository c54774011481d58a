from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mulki.data import CaptionedImages, CaptionTask, Task
from mulki.errors import InputError
from mulki.runs.answers import Answers
from mulki.runs.catalog import (
    EXAMPLES,
    TASKS,
    DataSet,
    read_examples,
    read_tasks,
    write_examples,
    write_tasks,
)


class Pictures:
    """Images in one colour for each place."""

    def __init__(self, targets: list[int]):
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (200, 100), (10 * index, 0, 0))

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return ""


def task(name: str, classes: tuple[str, ...], targets: list[int]) -> Task:
    return Task(name, classes, ("{}",), Pictures([0, 1, 1]), Pictures(targets))


BOTH = [
    task("a", ("cat", "<b>dog"), [0, 0, 1, 1]),
    task("b", ("x", "y", "z"), [2, 2, 2, 2, 2, 1, 0, 1]),
]


def test_tasks_are_read_as_written(tmp_path: Path) -> None:
    write_tasks(tmp_path, BOTH)
    assert read_tasks(tmp_path) == {
        "a": DataSet("a", ("cat", "<b>dog"), (0, 0, 1, 1), 3),
        "b": DataSet("b", ("x", "y", "z"), (2, 2, 2, 2, 2, 1, 0, 1), 3),
    }


def answers(right: str, said: str | None = None) -> Answers:
    own = np.array([digit == "1" for digit in right])
    return Answers(own, None, None if said is None else np.array([*map(int, said)], dtype=np.int32))


def test_examples_are_what_changed_with_what_was_said(tmp_path: Path) -> None:
    before = {"a": answers("1100", "0000"), "b": answers("00000000", "22222222")}
    after = {"a": answers("1011", "0111"), "b": answers("11111110", "44444332")}
    write_examples(tmp_path, BOTH, before, "b", after)
    found = read_examples(tmp_path)
    said = [(e.data_set, e.kind, e.target, e.before, e.after) for e in found]
    assert said == [
        ("a", "gained", "<b>dog", "cat", "<b>dog"),
        ("a", "gained", "<b>dog", "cat", "<b>dog"),
        ("a", "lost", "cat", "cat", "<b>dog"),
        # One image of each class first: four of seven were chosen.
        ("b", "gained", "z", "x", "z"),
        ("b", "gained", "y", "x", "y"),
        ("b", "gained", "x", "x", "y"),
        ("b", "gained", "z", "x", "z"),
    ]
    image = Image.open(io.BytesIO(base64.b64decode(found[2].image)))
    assert image.size == (96, 48) and image.format == "WEBP"
    assert abs(image.convert("RGB").getpixel((5, 5))[0] - 10) < 6  # type: ignore[index]


def test_answers_without_the_classes_said(tmp_path: Path) -> None:
    before = {"a": answers("0000"), "b": answers("00000000")}
    write_examples(tmp_path, BOTH, before, "a", {**before, "a": answers("1000")})
    (example,) = read_examples(tmp_path)
    assert (example.before, example.after, example.target) == (None, None, "cat")


def test_a_data_set_of_captions_says_captions(tmp_path: Path) -> None:
    test = CaptionedImages(Pictures([0, 0, 0]), (("a red flag",), ("a cat", "a tabby"), ("a dog",)))
    train = CaptionedImages(Pictures([0, 0]), (("one",), ("two",)))
    tasks = [*BOTH, CaptionTask("pets", train, test)]
    write_tasks(tmp_path, tasks)
    assert read_tasks(tmp_path)["pets"] == DataSet("pets", (), (), 2)
    of_classes = {"a": answers("1111", "0011"), "b": answers("1" * 8, "4" * 8)}
    before = {**of_classes, "pets": answers("011", "323")}
    after = {**of_classes, "pets": answers("110", "012")}
    write_examples(tmp_path, tasks, before, "pets", after)
    found = [(e.kind, e.target, e.before, e.after) for e in read_examples(tmp_path)]
    assert found == [
        ("gained", "a red flag", "a dog", "a red flag"),
        ("lost", "a dog", "a dog", "a tabby"),
    ]


def test_a_folder_without_them_has_none(tmp_path: Path) -> None:
    assert read_tasks(tmp_path) == {} and read_examples(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"tasks": 1}',
        '{"tasks": [1]}',
        '{"tasks": [{"name": "a"}]}',
        '{"tasks": [{"name": "a", "classes": ["x"], "targets": [1], "train": 1}]}',
        '{"tasks": [{"name": "a", "classes": ["x"], "targets": ["?"], "train": 1}]}',
    ],
)
def test_damaged_tasks(tmp_path: Path, text: str) -> None:
    (tmp_path / TASKS).write_text(text)
    with pytest.raises(InputError, match="tasks.json: "):
        read_tasks(tmp_path)


@pytest.mark.parametrize("change", [{"image": "<script>"}, {"more": 1}])
def test_damaged_examples(tmp_path: Path, change: dict[str, object]) -> None:
    before = {"a": answers("0000"), "b": answers("00000000")}
    write_examples(tmp_path, BOTH, before, "a", {**before, "a": answers("1000")})
    content = json.loads((tmp_path / EXAMPLES).read_text())
    content["examples"][0] |= change
    (tmp_path / EXAMPLES).write_text(json.dumps(content))
    with pytest.raises(InputError, match="examples.json: "):
        read_examples(tmp_path)
