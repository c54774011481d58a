from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mulki import methods
from mulki.data import Task, folder_task
from mulki.data.transforms import is_deterministic, train_transform
from mulki.engine.config import RunConfig
from mulki.engine.learn import StepReport, learn_task, steps_of
from mulki.engine.precision import Precision
from mulki.errors import InputError
from mulki.methods import PREVIOUS, ZERO_SHOT, Method
from mulki.models import VisionLanguageModel
from mulki.ops import loader, use_backend
from tests.engine_helpers import Calls, same_state, state_of

Load = Callable[..., VisionLanguageModel]
# An epsilon well above rounding noise, so that AdamW does not blow it up to whole steps.
CONFIG = RunConfig(iterations=6, batch_size=6, batch_size_eval=7, lr=1e-3, eps=1e-4)
BOTH = "mulki"


@pytest.fixture
def task(task_folders: tuple[str, str]) -> Task:
    return folder_task(task_folders[0])


def method_named(name: str, **options: Any) -> Method:
    cls = methods.get(name)
    return cls(cls.Options(**options))


def learn(
    model: VisionLanguageModel,
    task: Task,
    method: str | Method = "finetune",
    frozen: Mapping[str, VisionLanguageModel] | None = None,
    *,
    config: RunConfig = CONFIG,
    transform: Callable[..., Any] | None = None,
    index: int = 0,
    precision: str = "fp32",
) -> list[StepReport]:
    if frozen is None:
        original = model.frozen_copy()
        frozen = {ZERO_SHOT: original, PREVIOUS: original}
    reports: list[StepReport] = []
    steps = learn_task(
        model,
        method_named(method) if isinstance(method, str) else method,
        task,
        frozen,
        config,
        index=index,
        transform=transform or model.preprocess,
        precision=Precision(precision, torch.device("cpu")),  # type: ignore[arg-type]
        listen=reports.append,
    )
    assert steps == len(reports)
    return reports


def two_teachers(load: Load) -> dict[str, VisionLanguageModel]:
    return {ZERO_SHOT: load(seed=1).frozen_copy(), PREVIOUS: load(seed=2).frozen_copy()}


def crop(model: VisionLanguageModel) -> Callable[..., Any]:
    visual = model.clip.visual
    return train_transform(
        model.preprocess, "crop", model.image_size, visual.image_mean, visual.image_std
    )


# --- encoders of frozen teachers


def test_deterministic_transform_encodes_each_image_and_text_once(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls = Calls(monkeypatch)
    learn(student, task, BOTH, frozen)
    for teacher in frozen.values():
        assert calls.of(teacher, "texts") == [3]
        # The pass for the prototypes is the only one: 18 images in batches of batch_size_eval.
        assert calls.of(teacher, "images") == [7, 7, 4]
    assert calls.of(student, "images") == [6] * 6


def test_without_prototypes_images_are_encoded_as_they_come_up(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls = Calls(monkeypatch)
    # 18 images in batches of 6: the first three steps are new images, the next three are known.
    learn(student, task, "lwf", frozen)
    assert calls.of(frozen[PREVIOUS], "images") == [6, 6, 6]
    assert calls.of(frozen[PREVIOUS], "texts") == [3]
    assert calls.of(frozen[ZERO_SHOT], "images") == []
    assert calls.of(frozen[ZERO_SHOT], "texts") == []


def test_random_transform_encodes_images_at_every_step_and_texts_once(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    calls = Calls(monkeypatch)
    learn(student, task, BOTH, frozen, transform=crop(student))
    for teacher in frozen.values():
        assert calls.of(teacher, "texts") == [3]
        assert calls.of(teacher, "images") == [7, 7, 4] + [6] * 6


def test_teachers_that_are_one_model_are_asked_once(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load_tiny()
    original = student.frozen_copy()
    calls = Calls(monkeypatch)
    learn(student, task, BOTH, {ZERO_SHOT: original, PREVIOUS: original})
    assert calls.of(original, "texts") == [3]
    assert calls.of(original, "images") == [7, 7, 4]


def test_a_teacher_under_two_names_is_asked_once_a_step(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load_tiny()
    original = student.frozen_copy()
    calls = Calls(monkeypatch)
    frozen = {ZERO_SHOT: original, PREVIOUS: original}
    learn(student, task, BOTH, frozen, transform=crop(student))
    assert calls.of(original, "images") == [7, 7, 4] + [6] * 6


@pytest.mark.parametrize("locked", [False, True])
def test_a_student_at_its_teacher_has_its_texts_to_the_bit_under_autocast(
    load_tiny: Load, task: Task, locked: bool
) -> None:
    student = load_tiny()
    student.lock(text=locked)
    first, *_ = learn(student, task, BOTH, precision="amp_bf16")
    assert abs(first.losses["text_text_loss"]) < 1e-12


def test_finetuning_needs_no_teacher(load_tiny: Load, task: Task) -> None:
    learn(load_tiny(), task, "finetune", frozen={})


@pytest.mark.parametrize("name", ["lwf", "mulki"])
def test_cached_and_uncached_teachers_train_the_same_weights(
    load_tiny: Load, task: Task, name: str
) -> None:
    cached, uncached = load_tiny(), load_tiny()
    start = state_of(cached)

    def opaque(image: Any) -> Any:
        return uncached.preprocess(image)

    assert is_deterministic(cached.preprocess) and not is_deterministic(opaque)
    learn(cached, task, name, two_teachers(load_tiny))
    learn(uncached, task, name, two_teachers(load_tiny), transform=opaque)
    for key, value in state_of(cached).items():
        torch.testing.assert_close(value, state_of(uncached)[key], rtol=0, atol=2e-5)
    moved = max(float((v - start[k]).abs().max()) for k, v in state_of(cached).items())
    assert moved > 1e-3, "the comparison would hold for models that did not train"


def test_teachers_matter(load_tiny: Load, task: Task) -> None:
    one, other = load_tiny(), load_tiny()
    learn(one, task, "lwf", {PREVIOUS: load_tiny(seed=1).frozen_copy()})
    learn(other, task, "lwf", {PREVIOUS: load_tiny(seed=2).frozen_copy()})
    assert not same_state(state_of(one), state_of(other))


@pytest.mark.parametrize("architecture", ["tiny-vit", "tiny-resnet"])
def test_teachers_do_not_change(load_tiny: Load, task: Task, architecture: str) -> None:
    student = load_tiny(architecture)
    original = student.frozen_copy()
    before = state_of(original)
    learn(student, task, BOTH, {ZERO_SHOT: original, PREVIOUS: original})
    assert same_state(state_of(original), before)
    assert not same_state(state_of(student), before)
    assert not any(p.requires_grad or p.grad is not None for p in original.clip.parameters())


# --- what trains


def test_a_task_shorter_than_the_running_mean_is_learned(load_tiny: Load, task: Task) -> None:
    """Six steps, a member every ten: the mean of the start alone would undo the task."""
    student = load_tiny()
    before = state_of(student)
    learn(student, task, method_named("mulki", we_every=10))
    assert not same_state(state_of(student), before)


@pytest.mark.parametrize("transform", ["none", "crop"])
def test_batch_statistics_stay_while_their_weights_train(
    load_tiny: Load, task: Task, transform: str
) -> None:
    student = load_tiny("tiny-resnet")
    before = state_of(student)
    learn(student, task, transform=crop(student) if transform == "crop" else None)
    after = state_of(student)
    buffers = {n for n, _ in student.clip.named_buffers() if "running" in n or "num_batches" in n}
    assert len(buffers) > 10
    assert all(torch.equal(after[n], before[n]) for n in buffers)
    norms = [n for n, m in student.clip.visual.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(
        not torch.equal(after[f"visual.{n}.bias"], before[f"visual.{n}.bias"]) for n in norms
    )


@pytest.mark.parametrize("name", ["finetune", "mulki"])
def test_logit_scale_and_bias_stay(load_tiny: Load, task: Task, name: str) -> None:
    student = load_tiny("tiny-biased")
    before = state_of(student)
    learn(student, task, name)
    for key in ("logit_scale", "logit_bias"):
        assert torch.equal(state_of(student)[key], before[key])


def test_locked_text_tower_stays_and_is_encoded_before_the_steps(
    load_tiny: Load, task: Task
) -> None:
    student = load_tiny()
    student.lock(text=True)
    before = state_of(student)
    asked: list[int] = []
    real = student.clip.encode_text
    student.clip.encode_text = lambda tokens: asked.append(len(tokens)) or real(tokens)
    learn(student, task, frozen={})
    after = state_of(student)
    assert asked == [3]
    moved = {n for n in before if not torch.equal(after[n], before[n])}
    assert moved and all(n.startswith("visual.") for n in moved)


def test_locked_image_tower_stays(load_tiny: Load, task: Task) -> None:
    student = load_tiny("tiny-resnet")
    student.lock(image=True)
    before = state_of(student)
    learn(student, task)
    moved = {n for n, v in state_of(student).items() if not torch.equal(v, before[n])}
    assert moved and not any(n.startswith("visual.") for n in moved)


def test_parameters_of_the_method_train_too(load_tiny: Load, task: Task) -> None:
    method = method_named("mulki", prototype_update="learnable")
    seen: list[torch.Tensor] = []
    real = method.after_step

    def after_step(step: int) -> None:
        real(step)
        seen.append(method.prototypes().detach().clone())  # type: ignore[union-attr]

    method.after_step = after_step  # type: ignore[method-assign]
    learn(load_tiny(), task, method)
    assert not torch.equal(seen[0], seen[-1])


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


# --- steps


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


def test_small_training_set_makes_whole_batches_of_itself(load_tiny: Load, task: Task) -> None:
    reports = learn(load_tiny(), task, config=replace(CONFIG, batch_size=64, iterations=2))
    assert [r.images for r in reports] == [18, 18]


@pytest.mark.parametrize(
    ("epochs", "images", "steps"), [(1.0, 18, 3), (2.0, 19, 7), (0.5, 18, 2), (0.001, 18, 1)]
)
def test_steps_of_epochs(epochs: float, images: int, steps: int) -> None:
    assert steps_of(replace(CONFIG, epochs=epochs), images) == steps
    assert steps_of(CONFIG, images) == 6


def test_another_task_index_draws_another_order(load_tiny: Load, task: Task) -> None:
    losses = [
        [r.losses["ce_loss"] for r in learn(load_tiny(), task, index=index)] for index in (0, 0, 1)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_gradient_clipping_bounds_the_step(load_tiny: Load, task: Task) -> None:
    def moved(**changes: Any) -> float:
        student = load_tiny()
        before = state_of(student)
        # With a large epsilon the update is proportional to the gradient.
        learn(student, task, config=replace(CONFIG, eps=1.0, **changes))
        return max(float((v - before[n]).abs().max()) for n, v in state_of(student).items())

    assert moved(grad_clip_norm=1e-3) < 1e-2 * moved()


def test_weight_decay_shrinks_weights(load_tiny: Load, task: Task) -> None:
    plain, decayed = load_tiny(), load_tiny()
    learn(plain, task)
    learn(decayed, task, config=replace(CONFIG, wd=50.0))
    unused = "token_embedding.weight"  # most tokens get no gradient, only the decay
    assert decayed.clip.state_dict()[unused].norm() < 0.9 * plain.clip.state_dict()[unused].norm()


@pytest.mark.parametrize("name", ["finetune", "mulki"])
def test_loss_that_is_not_finite_ends_with_one_line(load_tiny: Load, task: Task, name: str) -> None:
    with pytest.raises(InputError, match=r"^--lr 1e\+30: .*not finite.* step \d") as info:
        learn(load_tiny(), task, name, config=replace(CONFIG, lr=1e30))
    assert "task colours" in str(info.value) and "ce_loss nan" in str(info.value)
    assert "\n" not in str(info.value)


# --- the compiled operators


@pytest.mark.skipif(loader.load() is not None, reason=f"{loader.load()}")
@pytest.mark.parametrize("name", ["finetune", "lwf", "mulki"])
def test_compiled_operators_train_as_the_reference_does(
    load_tiny: Load, task: Task, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULKI_STRICT", "1")

    def curve(backend: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        model = load_tiny()
        with use_backend(backend):
            torch.manual_seed(3)
            reports = learn(model, task, name, two_teachers(load_tiny))
        return [dict(r.losses) for r in reports], state_of(model)

    (compiled, weights), (reference, expected) = curve("cpp"), curve("reference")
    for ours, theirs in zip(compiled, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert any(compiled[0] != step for step in compiled[1:])
    for key, value in weights.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)
