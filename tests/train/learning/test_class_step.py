from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mulki.clip import Features
from mulki.data import Task
from mulki.functional import prototype_cross_entropy
from mulki.methods import PREVIOUS, ZERO_SHOT, Needs
from mulki.methods.finetune import Finetune
from mulki.ops import loader, use_backend
from mulki.train.learning.inputs import Listeners, TaskInputs
from mulki.train.learning.learn import learn_task
from tests.train.crafted_method import Crafted
from tests.train.learn_helpers import (
    CONFIG,
    Load,
    crop,
    learn,
    method_named,
    training_of,
    two_teachers,
)
from tests.train_helpers import state_of


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


def test_muon_moves_matrices_otherwise_than_adamw(load_tiny: Load, task: Task) -> None:
    after = {}
    for opt in ("adamw", "muon"):
        student = load_tiny()
        before = state_of(student)
        learn(student, task, frozen={}, config=replace(CONFIG, opt=opt, iterations=1))
        after[opt] = {
            n: v - before[n] for n, v in state_of(student).items() if v.is_floating_point()
        }
    differs = {n for n in after["adamw"] if not torch.equal(after["adamw"][n], after["muon"][n])}
    assert "visual.transformer.resblocks.0.mlp.c_fc.weight" in differs
    assert "text_projection" in differs
    assert not {n for n in differs if after["adamw"][n].ndim != 2 or "embedding" in n}


class Kept(Crafted):
    """Keeps what it was given, and the gradients of its first step."""

    def __init__(self, options: Crafted.Options):
        super().__init__(options)
        self.given: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[Features, ...]]] = []
        self.seen: list[tuple[Features, tuple[Features, ...]]] = []

    def inputs(self, images: torch.Tensor, target: torch.Tensor, *others: Any) -> torch.Tensor:
        assert not images.requires_grad
        made = super().inputs(images.requires_grad_(), target, *others)
        self.given.append((images.detach(), target, made.detach(), others[0]))
        return made

    def losses(self, student: Features, *others: Any) -> dict[str, torch.Tensor]:
        self.seen.append((student, others[0]))
        return super().losses(student, *others)

    def before_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        if not hasattr(self, "gradients"):
            self.gradients = {n: w.grad.clone() for n, w in weights.items() if w.grad is not None}


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_what_a_method_makes_of_a_batch_is_encoded_by_all(
    load_tiny: Load, task: Task, micro_batch: int | None
) -> None:
    student, frozen = load_tiny(), two_teachers(load_tiny)
    start = student.frozen_copy()
    method = Kept(Kept.Options())
    learn(student, task, method, frozen, config=replace(CONFIG, micro_batch=micro_batch))
    images, target, made, teachers = method.given[0]
    assert images.shape == made.shape and not torch.equal(made, images)
    for model, of_images in zip(frozen.values(), teachers, strict=True):
        torch.testing.assert_close(of_images.images, model.encode_images(images))

    # The first step as plain autograd takes it.
    student, (seen, of_teachers) = start, method.seen[0]
    moved = images.clone().requires_grad_()
    by_original, by_previous = (model.encode_images(moved) for model in frozen.values())
    wanted = teachers[0].texts[target] + teachers[0].images
    near = student.encode_images(moved) * by_previous + by_original * wanted
    (gradient,) = torch.autograd.grad(near.sum(), moved)
    moved = moved - 2.0 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(made, moved, rtol=1e-4, atol=1e-5)
    for name, parameter in student.clip.named_parameters():
        parameter.requires_grad_(name in method.gradients)
    student.clip.zero_grad()
    texts = student.encode_texts(student.text_inputs([of[0] for of in task.prompts()]))
    images, inputs = student.encode_images(images), student.encode_images(made)
    logits = Features(images, texts, student.logit_scale).image_text()
    loss = prototype_cross_entropy(logits, target)
    for name, of in zip((ZERO_SHOT, PREVIOUS), of_teachers, strict=True):
        wanted = frozen[name].encode_images(made)
        torch.testing.assert_close(of.inputs, wanted)
        loss = loss + 5 * (inputs - wanted).square().sum(dim=1).mean()
    torch.testing.assert_close(seen.inputs, inputs)
    loss.backward()
    for name, parameter in student.clip.named_parameters():
        if name in method.gradients:
            torch.testing.assert_close(
                method.gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name
            )
    assert max(float(v.abs().max()) for v in method.gradients.values()) > 1e-2


def test_images_are_crafted_alike_in_micro_batches(load_tiny: Load, task: Task) -> None:
    def made(**changes: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        method, student = Kept(Kept.Options(noise=0.1)), load_tiny()
        torch.manual_seed(0)
        learn(student, task, method, two_teachers(load_tiny), config=replace(CONFIG, **changes))
        return [of_step for _, _, of_step, _ in method.given], state_of(student)

    (whole, weights), (parts, others) = made(), made(micro_batch=2)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(value, others[key], rtol=1e-3, atol=1e-4)


def test_made_images_count_in_a_micro_batch_that_fits(load_tiny: Load, task: Task) -> None:
    def bytes_of_an_image(makes: bool) -> int:
        method = Crafted(Crafted.Options())
        if not makes:
            method.needs = replace(method.needs, inputs=False)
            method.losses = Finetune.losses.__get__(Finetune(Finetune.Options()))
        student, found = load_tiny(), []
        training = training_of(student, method=method, config=replace(CONFIG, micro_batch="auto"))
        inputs = TaskInputs(0, task, two_teachers(load_tiny))
        learn_task(training, inputs, Listeners(micro_batch=found.append))
        return found[0].per_sample

    assert bytes_of_an_image(True) == pytest.approx(2 * bytes_of_an_image(False), rel=0.02)


def test_a_method_that_makes_other_images_than_it_says(load_tiny: Load, task: Task) -> None:
    method = Crafted(Crafted.Options())
    method.inputs = lambda images, *others: images[:2]
    wanted = r"^Crafted.inputs: returned \[2, 3, 32, 32\], wanted \[6, 3, 32, 32\]"
    with pytest.raises(ValueError, match=wanted):
        learn(load_tiny(), task, method)
    method.inputs = lambda *given: None
    with pytest.raises(ValueError, match="^Crafted.inputs: returned NoneType, wanted"):
        learn(load_tiny(), task, method)
    plain = Finetune(Finetune.Options())
    plain.needs = Needs(inputs=True)
    with pytest.raises(TypeError, match="^method finetune makes no images"):
        learn(load_tiny(), task, plain)
