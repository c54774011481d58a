"""Memory that is counted from shapes, beside what torch's own hooks and real steps say."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mulki.train import card
from mulki.train.card import Peak, Way, ways
from mulki.train.config.run_config import resolve
from mulki.train.start.setup import prepared
from tests.train.run_helpers import SHORT
from tests.train_helpers import same_state, state_of, write_pairs


@pytest.fixture
def counted(start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path) -> Any:
    def go(**options: Any) -> dict[str, Way]:
        given = {"tasks": task_folders, "logs": str(tmp_path / "plans"), "method": "mulki"}
        with prepared(resolve(SHORT | start_model | given | options), write=False) as setup:
            before = state_of(setup.model)
            found = [*ways(setup)]
            assert same_state(state_of(setup.model), before)
            weights = [*setup.model.clip.parameters()]
            assert all(w.grad is None and type(w) is nn.Parameter for w in weights)
        return {way.options: way for way in found}

    return go


BOTH = "--grad-checkpointing --lora-rank 16"


def test_what_each_option_saves(counted: Any) -> None:
    found = counted()
    assert list(found) == ["", "--grad-checkpointing", "--lora-rank 16", BOTH]
    plain, recompute, adapters, both = found.values()
    assert recompute.models == plain.models and recompute.optimizer == plain.optimizer
    # Two teachers that are copies, or the student's own weights.
    assert plain.models > 2.9 * adapters.models
    assert adapters.optimizer < plain.optimizer / 3
    assert both.step(1) <= adapters.step(1)
    assert recompute.image <= plain.image


def test_of_a_method_without_teachers_and_of_frozen_texts(counted: Any) -> None:
    with_two, alone = counted(anchors="none")[""], counted(method="finetune")[""]
    assert alone.models * 3 == pytest.approx(with_two.models, rel=0.01)
    assert alone.optimizer == pytest.approx(2 * alone.models, rel=0.01)
    frozen = counted(method="finetune", lock_text=True)[""]
    assert frozen.optimizer < alone.optimizer and frozen.step(1) < alone.step(1)
    assert frozen.image == alone.image


def test_an_original_of_its_own(counted: Any) -> None:
    plain, original = counted(), counted(original="tiny-vit")
    assert plain[""].models == original[""].models
    # Adapters share the student's weights; that model does not.
    adapted = plain["--lora-rank 16"].models
    assert original["--lora-rank 16"].models == pytest.approx(2 * adapted, rel=0.05)


def test_images_beside_those_of_the_task(counted: Any, tmp_path: Path) -> None:
    assert counted(method="finetune")[""].kinds == 1
    assert counted(method="snd", reference="current")[""].kinds == 2
    assert counted(method="er")[""].kinds == 2
    # Made ones by default, but not where all tasks are of captions.
    assert counted(lock_text=True)[""].kinds == 2
    pairs = f"captions:{write_pairs(tmp_path / 'pairs')}"
    assert counted(tasks=(pairs,), lock_text=True)[""].kinds == 1


def test_captions_of_a_task_are_in_the_graph_of_their_images(counted: Any, tmp_path: Path) -> None:
    pairs = f"captions:{write_pairs(tmp_path / 'pairs')}"
    trained, locked = (counted(tasks=(pairs,), lock_text=lock)[""] for lock in (False, True))
    assert trained.image > 1.2 * locked.image


def test_options_that_the_run_has_or_cannot_have_are_not_tried(counted: Any) -> None:
    assert list(counted(method="ewc")) == ["", "--grad-checkpointing"]
    assert list(counted(grad_checkpointing=True)) == ["", "--lora-rank 16"]
    assert list(counted(lora_rank=2)) == ["", "--grad-checkpointing"]


def test_images_on_a_card() -> None:
    way = Way("", models=300, optimizer=200, peaks=(Peak(100, 1), Peak(30, 8)), kept=1, kinds=2)
    assert way.step(1) == 101 and way.step(10) == 110 and way.step(20) == 190
    # A tenth of the card is left free.
    assert way.images(660, 100) == 0 and way.images(780, 100) == 2 and way.images(1000, 100) == 33
    # Of a batch as a whole both kinds are there at a time.
    assert way.images(1000, 21) == 21 and way.images(1000, 22) == 21


def test_what_is_kept_of_each_image_of_a_batch(counted: Any) -> None:
    # Of 32-d features and three classes: the student's and their gradients, and those of teachers.
    assert counted(method="finetune")[""].kept == 4 * 2 * (32 + 3)
    assert counted(method="snd", reference="current")[""].kept == 4 * 4 * (2 * 32 + 3)
    assert counted(method="er")[""].kept == 4 * 2 * (2 * 32 + 3)


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


@pytest.mark.parametrize("options", [{}, {"grad_checkpointing": True}, {"lora_rank": 2}])
def test_shapes_count_as_a_step_does(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    given = {"tasks": task_folders, "logs": str(tmp_path), "method": "finetune"}
    with prepared(resolve(SHORT | start_model | given | options), write=False) as setup:
        way = next(ways(setup))
        monkeypatch.setattr(card, "FakeTensorMode", contextlib.nullcontext)
        monkeypatch.setattr(card, "FakeCopyMode", contextlib.nullcontext)
        real = next(ways(setup))
    assert way.models == real.models
    for images in (1, 8, 64, 512):
        assert way.step(images) == pytest.approx(real.step(images), rel=0.05)
