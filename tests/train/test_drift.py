"""How far a student is from its original model and from the class means that are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mulki.clip.head import ClassStatistics, Moments
from mulki.clip.models import VisionLanguageModel
from mulki.data import Task
from mulki.data.loader import batches
from mulki.data.subset import Subset
from mulki.runs.metrics import MEAN_DISTANCE, WORD_AGREEMENT
from mulki.train.drift import Drift
from mulki.train.start.continuation import NamedTask
from tests.train.learn_helpers import Load

WORDS = [f"word {number}" for number in range(300)]


def loader(model: VisionLanguageModel, task: Task) -> object:
    return batches(task.test, model.preprocess, 4, shuffle=False, seed=0)


@torch.no_grad()
def features(model: VisionLanguageModel, task: Task) -> torch.Tensor:
    images = [model.preprocess(task.test.load(i)) for i in range(len(task.test))]
    return model.encode_images(torch.stack(images))


def statistics(model: VisionLanguageModel, task: Task) -> ClassStatistics:
    found = Moments(len(task.classes))
    found.add(features(model, task), torch.as_tensor(list(task.test.targets)))
    return ClassStatistics().with_task(*found.of(task))


def test_a_student_that_moves_away(load_tiny: Load, task: Task) -> None:
    student = load_tiny(seed=1)
    original = student.frozen_copy()
    kept = statistics(original, task)
    drift = Drift(student, original, [task], [loader(student, task)], WORDS)  # type: ignore[list-item]
    (values,) = drift.of(kept).values()
    assert values[WORD_AGREEMENT] == (100.0, len(task.test))
    assert values[MEAN_DISTANCE] == (pytest.approx(0, abs=1e-6), len(task.test))

    student.copy_from(load_tiny(seed=2))
    (values,) = drift.of(kept).values()
    # 256 of the words, at even distances.
    texts = [f"a picture of a {WORDS[i * 300 // 256]}" for i in range(256)]
    nearest = []
    for model in (student, original):
        with torch.no_grad():
            words = model.encode_texts(model.text_inputs(texts))
        nearest.append((features(model, task) @ words.mT).argmax(dim=1))
    same = 100 * float((nearest[0] == nearest[1]).double().mean())
    assert values[WORD_AGREEMENT][0] == pytest.approx(same) and same < 100
    new = statistics(student, task).tasks[0].means
    cosines = F.cosine_similarity(new, kept.tasks[0].means)
    assert values[MEAN_DISTANCE][0] == pytest.approx(float(1 - cosines.mean()), abs=1e-5)


def test_what_there_is_to_compare(load_tiny: Load, task: Task) -> None:
    student = load_tiny(seed=1)
    # As of a task that was learned before and is not here.
    none = Subset(task.test, [])
    nothing = NamedTask("nothing", task.classes, task.templates, none, none)
    loaders = [loader(student, task), None]
    drift = Drift(student, None, [task, nothing], loaders, ())  # type: ignore[arg-type]
    assert drift.of(ClassStatistics()) == {}
    # A class without a test image in the sample has no say.
    few = replace(task, test=Subset(task.test, [0]))
    drift = Drift(student, None, [few], [loader(student, few)], ())  # type: ignore[list-item]
    (values,) = drift.of(statistics(student, task)).values()
    assert values.keys() == {MEAN_DISTANCE} and 0 <= values[MEAN_DISTANCE][0] < 1
