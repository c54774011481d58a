"""Memory that is counted from shapes, beside what torch's own hooks and real steps say."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mulki.train import card
from mulki.train.card import Peak, Way, most, ways
from mulki.train.config.run_config import resolve
from mulki.train.learning.batches import Batch
from mulki.train.learning.class_step import ClassStep
from mulki.train.learning.inputs import Listeners
from mulki.train.start.setup import prepared
from mulki.train.task_learner import TaskLearner
from tests.train.crafted_method import Crafted
from tests.train.run_helpers import SHORT
from tests.train_helpers import COLOURS, same_state, state_of, write_pairs, write_task


@pytest.fixture
def counted(start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path) -> Any:
    def go(count: int | None = None, **options: Any) -> dict[str, Way]:
        given = {"tasks": task_folders, "logs": str(tmp_path / "plans"), "method": "mulki"}
        with prepared(resolve(SHORT | start_model | given | options), write=False) as setup:
            before = state_of(setup.model)
            found = [*islice(ways(setup), count)]
            assert same_state(state_of(setup.model), before)
            weights = [*setup.model.clip.parameters()]
            assert all(w.grad is None and type(w) is nn.Parameter for w in weights)
        return {way.options: way for way in found}

    return go


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the peaks of a step, which take seconds to count."""
    monkeypatch.setattr(card._Step, "peaks", lambda *given: [Peak(0, 0)])


BOTH = "--grad-checkpointing --lora-rank 16"


def test_what_each_option_saves(counted: Any, uncounted: None) -> None:
    found = counted()
    assert list(found) == ["", "--grad-checkpointing", "--lora-rank 16", BOTH]
    plain, recompute, adapters, both = found.values()
    assert recompute.models == plain.models and recompute.optimizer == plain.optimizer
    # Two teachers that are copies, or the student's own weights.
    assert plain.models > 2.9 * adapters.models
    assert adapters.optimizer < plain.optimizer / 3
    assert both.image <= adapters.image
    assert recompute.image <= plain.image


def test_what_an_original_model_of_its_own_takes(
    counted: Any, start_model: dict[str, str], uncounted: None
) -> None:
    # Adapters share the student's weights, but not those of an original model of its own.
    plain, _, adapters = counted(3).values()
    original = counted(3, original="tiny-vit")
    assert plain.models == pytest.approx(original[""].models, rel=1e-3)
    assert original["--lora-rank 16"].models == pytest.approx(2 * adapters.models, rel=0.05)
    # Nor does it share what is frozen, which a copy of the student does.
    alone, copied, own = (
        counted(1, lock_text=True, **options)[""]
        for options in ({"method": "finetune"}, {}, {"original": start_model["model"]})
    )
    trained = alone.optimizer // 2
    assert copied.models == alone.models + 2 * trained
    assert own.models == pytest.approx(2 * alone.models + trained, rel=1e-3)


def test_of_a_method_without_teachers_and_of_frozen_texts(counted: Any) -> None:
    with_two, alone = counted(1, anchors="none")[""], counted(1, method="finetune")[""]
    assert alone.models * 3 == pytest.approx(with_two.models, rel=0.01)
    assert alone.optimizer == pytest.approx(2 * alone.models, rel=0.01)
    frozen = counted(1, method="finetune", lock_text=True)[""]
    assert frozen.optimizer < alone.optimizer and frozen.step(1) < alone.step(1)
    assert frozen.image == alone.image


def test_images_beside_those_of_the_task(
    counted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, a batch has the graphs of all of them; micro-batches come one after another."""

    monkeypatch.setattr(Crafted, "name", "crafted", raising=False)

    def of(**options: Any) -> tuple[float, float]:
        way = counted(1, lock_text=True, **options)[""]
        return way.image / alone.image, of_image(way.whole) / alone.image

    def of_image(whole: tuple[Peak, ...]) -> float:
        return (most(whole, 96) - most(whole, 32)) / 64

    alone = counted(1, method="finetune", lock_text=True)[""]
    assert of_image(alone.whole) == pytest.approx(alone.image, rel=0.02)
    two = pytest.approx((1, 2), rel=0.05)
    assert of(method="snd", reference="current") == two
    # As many replayed ones in every step, however large the batch is.
    assert of(method="er", replay_batch_size=5) == pytest.approx((1, 1), rel=0.05)
    # Images that the method makes of the task's own.
    assert of(method="crafted") == two
    # Made ones by default, but not where all tasks are of captions.
    assert of(method="mulki") == two
    pairs = f"captions:{write_pairs(tmp_path / 'pairs')}"
    assert of(method="mulki", tasks=(pairs,)) == pytest.approx((1, 1), rel=0.05)


def test_of_a_batch_as_a_whole_the_texts_are_there_too(counted: Any) -> None:
    trained, locked = (counted(1, method="finetune", lock_text=lock)[""] for lock in (False, True))
    texts = trained.step(1) - locked.step(1)
    assert texts > 0 and most(trained.whole, 1) - most(locked.whole, 1) >= texts


def test_captions_of_a_task_are_in_the_graph_of_their_images(counted: Any, tmp_path: Path) -> None:
    pairs = f"captions:{write_pairs(tmp_path / 'pairs')}"
    trained, locked = (counted(1, tasks=(pairs,), lock_text=lock)[""] for lock in (False, True))
    assert trained.image > 1.2 * locked.image


def test_tasks_of_both_kinds_are_counted_each_by_itself(
    counted: Any, task_folders: tuple[str, str], tmp_path: Path
) -> None:
    pairs = f"captions:{write_pairs(tmp_path / 'pairs')}"
    each = [counted(1, tasks=of, method="finetune")[""] for of in ((task_folders[0],), (pairs,))]
    both = counted(1, tasks=(task_folders[0], pairs), method="finetune")[""]
    assert both.peaks == (*each[0].peaks, *each[1].peaks)
    assert both.step(8) == max(way.step(8) for way in each)


def test_what_teachers_store_and_what_an_evaluation_takes(
    counted: Any, monkeypatch: pytest.MonkeyPatch, uncounted: None
) -> None:
    # Of the previous model, 18 images of each task: 32 float32.
    assert counted(1, method="lwf")[""].stored == 18 * 32 * 4
    assert counted(1, method="finetune")[""].stored == 0

    def beside_steps(images: int, **options: Any) -> int:
        given = {"method": "finetune", "batch_size_eval": images} | options
        found: int = counted(1, **given)[""].evaluation
        return found

    small, large = map(beside_steps, (10, 20))
    assert large == pytest.approx(2 * small, rel=0.05)
    asked: list[str] = []
    monkeypatch.setattr(card, "as_tested", lambda model, name: asked.append(name) or model)
    assert beside_steps(10, precision_eval="amp_bf16") == small
    assert asked == ["amp_bf16"]
    # Of a vocabulary 256 texts are encoded at a time, by a text tower that trains or is frozen.
    words = [beside_steps(1, method="mulki", lock_text=lock) for lock in (False, True)]
    assert words[0] == words[1] > large
    # The moments of the inputs of each weight.
    plain, directions = (beside_steps(1, method=m, lora_rank=2) for m in ("finetune", "keeplora"))
    assert directions > 2 * plain


def test_options_that_the_run_has_or_cannot_have_are_not_tried(
    counted: Any, uncounted: None
) -> None:
    assert list(counted(method="ewc")) == ["", "--grad-checkpointing"]
    recomputed = counted(method="finetune", grad_checkpointing=True)
    assert list(recomputed) == ["", "--lora-rank 16"]
    assert list(counted(method="lwf", lora_rank=2)) == ["", "--grad-checkpointing"]


def test_images_on_a_card() -> None:
    peaks = Peak(100, 1), Peak(30, 8)
    way = Way("", 300, 190, 10, (Peak(0, 1),), peaks, whole=(Peak(30, 16),), evaluation=100)
    assert way.step(1) == 101 and way.step(10) == 110 and way.step(20) == 190
    # A tenth of the card is left free.
    assert way.images(660, 100) == 0 and way.images(780, 100) == 2 and way.images(1000, 100) == 33
    # Of a batch as a whole both kinds are there at a time.
    assert way.images(1000, 21) == 21 and way.images(1000, 22) == 21
    assert replace(way, evaluation=401).images(1000, 100) == 0


def test_what_is_kept_of_each_image_of_a_batch(
    counted: Any, tmp_path: Path, uncounted: None
) -> None:
    # Vectors of 32 float32: the student's and their gradients, and those of two teachers.
    one, pairs = 4 * 32, f"captions:{write_pairs(tmp_path / 'pairs')}"
    assert counted(1, method="finetune")[""].kept[0] == (0, 2 * one)
    # Held on reference images alone, the teachers do not look at the task's.
    assert counted(1, method="snd", reference="current")[""].kept[0] == (0, (2 + 4) * one)
    of_eight = counted(1, method="snd", reference="current", reference_batch_size=8)[""]
    assert of_eight.kept[0] == (8 * 4 * one, 2 * one)
    assert counted(1, method="er", replay_batch_size=5)[""].kept[0] == (5 * 2 * one, 2 * one)
    # One teacher: the first task has no previous model beside the original one.
    assert counted(1, tasks=(pairs,))[""].kept == ((0, 2 * (2 + 1) * one),)


def test_counted_is_what_lives_at_once() -> None:
    with card._Counted([]) as seen:
        one = torch.zeros(1000)
        two = one + 1
        del one
        three = two.view(10, 100)  # no storage of its own
        four = three * 2
        del two, three, four
    assert seen.peak == 8000
    with card._Counted([known := torch.zeros(1000)]) as seen:
        known.add_(1)
    assert seen.peak == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_checkpointing": True},
        {"lora_rank": 2},
        {"model": "tiny-resnet", "pretrained": "none"},
    ],
)
def test_shapes_count_as_a_step_does(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    given = {"tasks": task_folders, "logs": str(tmp_path), "method": "finetune"}
    with prepared(resolve(SHORT | start_model | given | options), write=False) as setup:
        way = next(ways(setup))
        (step,) = card._steps(setup)
        for images in (2, 8, 64, 512):
            real = max(step._levels(setup.model, images, ()))
            assert way.step(images) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("options", [{}, {"method": "snd", "reference": "made"}, {"method": "er"}])
def test_a_real_step_has_what_is_counted(
    start_model: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro: int | None,
    options: dict[str, Any],
) -> None:
    """What more images in a batch take, in a step of the second task."""
    folders = [str(write_task(tmp_path / name, COLOURS, 6)) for name in "ab"]
    given = {"tasks": folders, "logs": str(tmp_path), "method": "finetune", "micro_batch": micro}
    real = ClassStep.gradients
    peaks: list[int] = []

    def gradients(step: ClassStep, batch: Batch) -> Any:
        images = [x.images for x in (batch, batch.replay, batch.reference) if x is not None]
        with card._Counted([*card._tensors(step._model), *images]) as seen:
            found = real(step, batch)
        peaks.append(seen.peak)
        return found

    monkeypatch.setattr(ClassStep, "gradients", gradients)
    of_batch = {}
    for size in (8, 16):
        more = {"batch_size": size, "iterations": 1, "lock_text": True}
        with prepared(resolve(SHORT | start_model | given | more | options), write=False) as setup:
            way = next(ways(setup))
            learner = TaskLearner(setup)
            for index, task in enumerate(setup.tasks):
                learner.learn(index, task, Listeners())
        of_batch[size] = peaks[-1]
    found = (of_batch[16] - of_batch[8]) / 8
    kept = way.kept[0].image
    if micro is None:
        whole = (most(way.whole, 16) - most(way.whole, 8)) / 8
        assert found == pytest.approx(whole + kept, rel=0.06)
    else:
        # Beside the features, what the losses take for themselves.
        assert kept <= found < 2.1 * kept
