from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from mulki.data import Task
from mulki.methods.finetune import Finetune
from mulki.train.learning.optimizer import SHARE, layer_shares, make_optimizer
from tests.train.learn_helpers import CONFIG, Load, learn
from tests.train_helpers import state_of


def named(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(1)) for name in names}


def test_rates_grow_along_each_tower() -> None:
    images = [f"visual.{i}" for i in range(32)]
    texts = ["text.a", "text.b", "text.c"]
    shares = layer_shares(named(*images, *texts), 0.25)
    assert [shares[name] for name in texts] == [0.25, 0.625, 1.0]
    of_images = [shares[name] for name in images]
    assert of_images[0] == of_images[1] == 0.25 and of_images[-1] == 1.0
    assert of_images == sorted(of_images) and len(set(of_images)) == 16
    assert of_images[2] == pytest.approx(0.25 + 0.75 / 15)
    assert set(layer_shares(named(*images, *texts), 1.0).values()) == {1.0}
    assert layer_shares(named("visual.a"), 0.2) == {"visual.a": 1.0}


def test_rates_fall_with_each_layer_and_in_the_text_tower() -> None:
    images = ["conv1", "bn1.weight", "layer1.0.conv1", "layer2.0.conv1", "layer2.1.bn1", "attnpool"]
    texts = ["emb", "transformer.resblocks.0.ln", "transformer.resblocks.11.ln", "ln_final", "proj"]
    parameters = named(*(f"visual.{name}" for name in images), *texts)
    shares = layer_shares(parameters, 1.0, decay=0.5, text=0.1)
    found = [shares[f"visual.{name}"] for name in images]
    # Layers 0, 0, 2, 3, 3 and 4, numbered as the model has them.
    assert found == [1 / 16, 1 / 16, 1 / 4, 1 / 2, 1 / 2, 1.0]
    of_texts = [shares[name] / 0.1 for name in texts]
    assert of_texts == pytest.approx([0.5**13, 0.5**12, 0.5, 1.0, 1.0])
    halves = layer_shares(parameters, 0.5, decay=0.5)
    assert halves["visual.conv1"] == 0.5 / 16 and halves["visual.attnpool"] == 1


def test_layers_of_a_model(load_tiny: Load) -> None:
    shares = layer_shares(load_tiny("tiny-vit").trainable(), 1.0, decay=0.5)
    for tower, before, behind in (
        ("visual.", ("class_embedding", "positional_embedding", "conv1.weight"), "proj"),
        ("", ("token_embedding.weight", "positional_embedding"), "text_projection"),
    ):
        assert {shares[tower + name] for name in before} == {0.25}
        assert shares[tower + behind] == 1.0
        blocks = [n for n in shares if n.startswith(f"{tower}transformer.resblocks.")]
        assert blocks and {shares[name] for name in blocks} == {0.5}
    assert shares["visual.ln_post.weight"] == shares["ln_final.weight"] == 1.0


def test_the_text_tower_may_stay_almost_still(load_tiny: Load, task: Task) -> None:
    def moved(share: float) -> tuple[float, float]:
        student = load_tiny()
        before = state_of(student)
        learn(student, task, config=replace(CONFIG, lr_text_tower=share))
        after = state_of(student)
        far = {n: float((after[n] - before[n]).abs().max()) for n in student.trainable()}
        return tuple(  # type: ignore[return-value]
            max(v for n, v in far.items() if n.startswith("visual.") is image)
            for image in (True, False)
        )

    still, slow = moved(0.0), moved(0.1)
    assert still[1] == 0 < still[0] and 0 < slow[1] < 0.3 * slow[0]


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(load_tiny: Load, opt: str) -> None:
    model = load_tiny("tiny-vit")
    method = Finetune(Finetune.Options())
    method.own = nn.Parameter(torch.zeros(3, 3))
    config = replace(CONFIG, opt=opt, wd=0.1, lr_first_layer=0.2)
    groups = make_optimizer(model, method, config).param_groups
    places = [id(p) for group in groups for p in group["params"]]
    wanted = {id(p) for p in model.trainable().values()} | {id(method.own)}
    assert len(places) == len(set(places)) and set(places) == wanted
    shares = layer_shares(model.trainable(), 0.2)
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.trainable().items():
        assert of[id(parameter)][SHARE] == shares[name]
        assert of[id(parameter)]["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)
    assert of[id(method.own)][SHARE] == 1.0 and of[id(method.own)]["weight_decay"] == 0.0


def test_the_first_layers_move_less(load_tiny: Load, task: Task) -> None:
    def moved(first: float) -> list[float]:
        student = load_tiny()
        student.lock(text=True)
        before = state_of(student)
        learn(student, task, config=replace(CONFIG, lr_first_layer=first))
        after = state_of(student)
        names = list(student.trainable())
        return [float((after[n] - before[n]).abs().max()) for n in (names[0], names[-1])]

    still, slow, whole = moved(0.0), moved(0.1), moved(1.0)
    assert still[0] == 0 < still[1]
    assert slow[0] < 0.2 * whole[0] and slow[1] > 0.5 * whole[1]


class Projected(Finetune):
    """Takes the gradient of every parameter but one, and keeps what it has seen."""

    def before_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            assert weight.grad is not None or "token" in name
            if weight.grad is not None and name != "visual.proj":
                weight.grad.zero_()


def test_a_method_may_change_gradients_before_the_step(load_tiny: Load, task: Task) -> None:
    student = load_tiny()
    before = state_of(student)
    learn(student, task, Projected(Finetune.Options()), config=replace(CONFIG, grad_clip_norm=1.0))
    moved = {n for n, v in state_of(student).items() if not torch.equal(v, before[n])}
    assert moved == {"visual.proj"}
