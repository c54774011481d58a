from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mulki.data import CaptionTask, caption_task
from mulki.methods.mulki import MulKI
from mulki.train.learning.inputs import StepReport
from tests.train.learn_helpers import BOTH, CONFIG, Load, crop, learn, two_teachers
from tests.train_helpers import Calls, state_of, write_pairs


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> CaptionTask:
    """18 pairs, two of three of each kind with the same caption."""
    return caption_task(write_pairs(tmp_path_factory.mktemp("pairs") / "flags"))


def test_learns_the_training_pairs(load_tiny: Load, flags: CaptionTask) -> None:
    config = replace(CONFIG, iterations=60, batch_size=12, lr_scheduler="const")
    reports = learn(load_tiny(), flags, config=config)
    first, last = (
        sum(r.losses["contrastive_loss"] for r in some) for some in (reports[:5], reports[-5:])
    )
    assert last < 0.6 * first
    assert {r.images for r in reports} == {12}


def test_terms_of_mulki(
    load_tiny: Load, flags: CaptionTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the default options it holds made images where there are classes, without captions.
    method = MulKI(MulKI.Options())
    assert method.needs.reference and not method.needs.captions
    seen: list[dict[str, torch.Tensor]] = []

    def watch(report: StepReport) -> None:
        seen.append(method.watched())

    frozen, calls = two_teachers(load_tiny), Calls(monkeypatch)
    (first, *_) = learn(load_tiny(), flags, method, frozen, hear=watch)
    for teacher in frozen.values():
        assert sum(calls.of(teacher, "images")) == sum(calls.of(teacher, "texts")) == 18
    assert set(first.losses) == {"contrastive_loss", "image_caption_loss", "feature_loss"}
    assert all(value > 0 for value in first.losses.values())
    assert set(seen[0]) == {"teacher_weights"} and seen[0]["teacher_weights"].shape == (6, 2)


def test_a_student_at_its_teachers_has_nothing_to_keep(load_tiny: Load, flags: CaptionTask) -> None:
    (first, *_) = learn(load_tiny(), flags, BOTH)
    assert first.losses["image_caption_loss"] == pytest.approx(0, abs=1e-5)
    assert first.losses["feature_loss"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["finetune", "mulki"])
@pytest.mark.parametrize("lock", [False, True])
def test_micro_batches_change_nothing(
    load_tiny: Load, flags: CaptionTask, name: str, lock: bool
) -> None:
    after = []
    for micro_batch in (None, "2"):
        student = load_tiny()
        student.lock(text=lock)
        config = replace(CONFIG, micro_batch=micro_batch, eps=1e-2)
        reports = learn(student, flags, name, two_teachers(load_tiny), config=config)
        after.append(([r.losses for r in reports], state_of(student)))
    (losses, weights), (others, expected) = after
    for one, other in zip(losses, others, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for key, value in weights.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-4)


def test_the_logit_scale_stays(load_tiny: Load, flags: CaptionTask) -> None:
    student = load_tiny()
    before = state_of(student)
    learn(student, flags)
    after = state_of(student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "logit_scale" not in moved
    assert {"visual.proj", "text_projection", "token_embedding.weight"} <= moved


def test_what_is_frozen_is_encoded_once(
    load_tiny: Load, flags: CaptionTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teachers encode each pair once, and a locked text tower each caption."""
    student = load_tiny()
    student.lock(text=True)
    asked: list[int] = []
    real = student.clip.encode_text

    def counted(tokens: torch.Tensor) -> Any:
        asked.append(len(tokens))
        return real(tokens)

    student.clip.encode_text = counted
    calls, frozen = Calls(monkeypatch), two_teachers(load_tiny)
    learn(student, flags, BOTH, frozen, config=replace(CONFIG, iterations=9))
    assert sum(asked) == len(flags.train.texts()) == 12
    for teacher in frozen.values():
        assert sum(calls.of(teacher, "images")) == sum(calls.of(teacher, "texts")) == 18


def test_random_crops_are_encoded_anew(
    load_tiny: Load, flags: CaptionTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls, config = Calls(monkeypatch), replace(CONFIG, iterations=9)
    learn(student, flags, BOTH, frozen, transform=crop(student), config=config)
    assert all(sum(calls.of(teacher, "images")) == 54 for teacher in frozen.values())
