"""What a run asks the original model for when features of an earlier run lie on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mulki.clip.models import VisionLanguageModel
from mulki.clip.texts import TextInputs
from mulki.data import Task
from mulki.data.made_images import MadeImages
from mulki.data.reference import ReferenceSet
from mulki.data.vocabulary import Vocabulary
from mulki.distributed.world import ALONE
from mulki.errors import InputError
from mulki.methods import PREVIOUS, ZERO_SHOT
from mulki.train.display.outline import images_of_teachers
from mulki.train.display.progress import TEACHERS, RunProgress
from mulki.train.display.reporter import Reporter
from mulki.train.learning.anchor_texts import Anchors, AnchorTexts
from mulki.train.learning.teacher_cache import TeacherCache
from tests.data.data_helpers import Blank
from tests.sweeps import mostly_long
from tests.train.learn_helpers import Load, crop, learn, method_named, two_teachers
from tests.train.run_helpers import Run, check_same, resumed, stop_at
from tests.train_helpers import Calls, same_state, state_of


def cache(folder: Path) -> TeacherCache:
    return TeacherCache(folder, {"weights": "those"}, ALONE, torch.device("cpu"))


def learned(
    load: Load,
    task: Task,
    folder: Path | None,
    method: str,
    patch: pytest.MonkeyPatch,
    options: dict[str, Any],
    **given: Any,
) -> tuple[dict[str, torch.Tensor], list[int], list[int]]:
    """The weights after a task, and what the original model was asked for: images, texts."""
    student, frozen = load(), two_teachers(load)
    if "anchors" in given:
        given["anchors"] = anchors(student)
    with patch.context() as spied:
        calls = Calls(spied)
        chosen = method_named(method, **options)
        learn(student, task, chosen, frozen, teacher_cache=folder and cache(folder), **given)
    original = frozen[ZERO_SHOT]
    return state_of(student), calls.of(original, "images"), calls.of(original, "texts")


def anchors(model: VisionLanguageModel) -> Anchors:
    texts = AnchorTexts(vocabulary=("a photo of a fig.", "a photo of an oar."))
    return Anchors(texts, TextInputs(model), None, seed=0)


def on_reference(task: Task) -> ReferenceSet:
    words = Vocabulary(("fig", "oar", "fig"))
    return ReferenceSet.with_words(MadeImages(task.train, ["invert"], seed=0), words)


@pytest.mark.parametrize(
    ("method", "options", "images", "texts"),
    [
        ("mulki", {"hold_on": "task"}, [7, 7, 4], [3]),
        ("mulki", {"hold_on": "task", "anchors": "vocabulary"}, [7, 7, 4], [3, 2]),
        ("mulki", {"hold_on": "both"}, [7, 7, 4] * 2, [3]),
        ("snd", {}, [7, 7, 4], [3]),
        ("zscl", {}, [7, 7, 4], [3, 2]),
    ],
)
def test_a_second_run_asks_for_nothing_and_has_the_same_bits(
    load_tiny: Load,
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    method: str,
    options: dict[str, Any],
    images: list[int],
    texts: list[int],
) -> None:
    given: dict[str, Any] = {}
    if method != "mulki" or options["hold_on"] != "task":
        given["reference"] = on_reference(task)
    if "anchors" in options:
        given["anchors"] = None
    first = learned(load_tiny, task, tmp_path, method, monkeypatch, options, **given)
    assert first[1:] == (images, texts)
    second = learned(load_tiny, task, tmp_path, method, monkeypatch, options, **given)
    assert second[1:] == ([], [])
    assert same_state(first[0], second[0])
    without, *_ = learned(load_tiny, task, None, method, monkeypatch, options, **given)
    for name, value in without.items():
        torch.testing.assert_close(value, first[0][name], rtol=1e-3, atol=1e-5)


def test_random_changes_of_images_leave_texts_and_prototypes(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {"transform": crop(load_tiny())}
    options = {"hold_on": "task"}
    first, second = (
        learned(load_tiny, task, tmp_path, "mulki", monkeypatch, options, **given) for _ in range(2)
    )
    assert first[1:] == ([7, 7, 4] + [6] * 6, [3]) and second[1:] == ([6] * 6, [])
    assert same_state(first[0], second[0])


class Grey(Blank):
    """Images of one grey, whose fingerprint does not say which."""

    grey = 0

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (32, 32), (self.grey,) * 3)


def test_images_with_the_same_fingerprint_are_not_taken_for_others(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for grey in (0, 200, 200):
        Grey.grey = grey
        other = replace(task, train=Grey(tuple(task.train.targets)))
        options = {"hold_on": "task"}
        found.append(learned(load_tiny, other, tmp_path, "mulki", monkeypatch, options))
    assert [images for _, images, _ in found] == [[7, 7, 4], [7, 7, 4], []]


def test_texts_of_a_frozen_tower_are_others(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def locked() -> VisionLanguageModel:
        model = load_tiny()
        model.lock(text=True)
        return model

    asked = []
    for load in (load_tiny, locked, locked):
        student = load()
        original = student.frozen_copy()
        with monkeypatch.context() as spied:
            calls = Calls(spied)
            frozen = {ZERO_SHOT: original, PREVIOUS: load_tiny(seed=2).frozen_copy()}
            learn(student, task, "mulki", frozen, teacher_cache=cache(tmp_path))
        asked.append((calls.of(original, "images"), calls.of(original, "texts")))
    assert asked == [([7, 7, 4], [3]), ([], [3]), ([], [])]


OPTIONS: dict[str, dict[str, Any]] = {
    "mulki": {"method": "mulki", "hold_on": "both", "anchors": "both"},
    "adapters": {"method": "mulki", "lora_rank": 2},
    "original": {"method": "mulki", "original": "tiny-vit"},
    "snd": {"method": "snd", "reference": "current"},
}


@pytest.mark.parametrize("case", mostly_long(OPTIONS, "adapters", "snd"))
def test_a_stopped_run_goes_on_with_the_cache(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    options = OPTIONS[case] | {"teacher_cache": str(tmp_path / "cache")}
    whole = run("whole", **options)
    files = sorted((tmp_path / "cache").iterdir())
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 3, RuntimeError("stop"))
        run("stopped", **options)
    check_same(resumed(tmp_path / "logs" / "stopped").path, whole.path)
    assert sorted((tmp_path / "cache").iterdir()) == files


def test_another_seed_and_another_method_read_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {"teacher_cache": str(tmp_path / "cache"), "anchors": "none", "hold_on": "task"}
    run("first", method="mulki", **given)
    files = sorted((tmp_path / "cache").iterdir())
    run("seed", method="mulki", seed=1, **given)
    # The images of its reference set are those of the task.
    run("snd", method="snd", teacher_cache=given["teacher_cache"], reference="current")
    assert sorted((tmp_path / "cache").iterdir()) == files and len(files) == 4


@pytest.mark.parametrize("case", mostly_long(OPTIONS, "original", "snd"))
def test_the_images_that_are_announced_are_those_that_are_told_of(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    options = OPTIONS[case] | {"teacher_cache": str(tmp_path / "cache"), "head": False}
    announced: list[int] = []
    told: list[int] = []
    real = Reporter.start_task, RunProgress.advance

    def start(self: Reporter, index: int, task: Task, *given: Any) -> None:
        real[0](self, index, task, *given)
        announced.append(images_of_teachers(self._setup, task))

    def advance(self: RunProgress, count: int = 1) -> None:
        real[1](self, count)
        if self._kind == TEACHERS:
            told.append(count)

    monkeypatch.setattr(Reporter, "start_task", start)
    monkeypatch.setattr(RunProgress, "advance", advance)
    for name in ("first", "second"):
        run(name, **options)
        assert sum(told) == sum(announced) >= 30


def test_a_method_without_an_original_model(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^--teacher-cache: got .* no original model"):
        run("none", method="finetune", teacher_cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists() and not (tmp_path / "logs" / "none").exists()
