from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki.clip.models import VisionLanguageModel
from mulki.data import Task
from mulki.train.config.precision import Precision
from mulki.train.learning.directions import _of_attention, input_moments, mean_gradients
from mulki.train.learning.inputs import TaskInputs, Training
from tests.train.learn_helpers import CONFIG, Load, method_named
from tests.train_helpers import Calls


def adapted(load: Load, name: str) -> tuple[VisionLanguageModel, VisionLanguageModel, Training]:
    """A model with adapters that have learned, the same as an ordinary model, and its training."""
    model, plain = load(name), load(name)
    model.adapt(2, fixed_a=True)
    assert model.adapters is not None
    model.adapters.start_task(0, keep=False)
    with torch.no_grad():
        for weight in model.adapters.weights().values():
            weight.b.normal_(std=0.2)
    plain.clip.load_state_dict(model.checkpoint())
    training = Training(
        config=replace(CONFIG, batch_size=4),
        method=method_named("keeplora"),
        model=model,
        transform=model.preprocess,
        precision=Precision("fp32", torch.device("cpu")),
    )
    return model, plain, training


def all_images(model: VisionLanguageModel, task: Task) -> tuple[Tensor, Tensor]:
    images = [model.preprocess(task.train.load(place)) for place in range(len(task.train))]
    return torch.stack(images), torch.as_tensor(list(task.train.targets))


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
def test_mean_gradients_are_those_of_the_whole_task(load_tiny: Load, task: Task, name: str) -> None:
    model, plain, training = adapted(load_tiny, name)
    inputs = TaskInputs(0, task, {})
    found = mean_gradients(training, inputs)
    plain.eval()
    images, target = all_images(plain, task)
    texts = plain.encode_texts(plain.text_inputs(inputs.prompts))
    F.cross_entropy(plain.logit_scale * plain.encode_images(images) @ texts.T, target).backward()
    wanted = {n: p.grad for n, p in plain.clip.named_parameters()}
    assert found.keys() == model.adapters.weights().keys()  # type: ignore[union-attr]
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key].flatten(1), rtol=1e-4, atol=1e-6, msg=key)
    trained = {n.rpartition(".")[2] for n in model.trainable()}
    assert trained == {"b"} and all(p.grad is None for p in model.clip.parameters())


@pytest.mark.parametrize(("given", "largest"), [(None, 40), ("3", 3), ("auto", 16)])
def test_how_many_images_are_encoded_at_a_time(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch, given: str | None, largest: int
) -> None:
    _, _, training = adapted(load_tiny, "tiny-vit")
    training = replace(training, config=replace(CONFIG, batch_size=40, micro_batch=given))
    calls = Calls(monkeypatch)
    input_moments(training, TaskInputs(0, task, {}))
    sizes = calls.of(training.model, "images")
    assert max(sizes) == min(largest, len(task.train)) and sum(sizes) == len(task.train)


@pytest.mark.parametrize("name_of_model", ["tiny-vit", "tiny-resnet"])
def test_moments_are_those_of_all_inputs(load_tiny: Load, task: Task, name_of_model: str) -> None:
    _, plain, training = adapted(load_tiny, name_of_model)
    inputs = TaskInputs(0, task, {})
    found = input_moments(training, inputs)
    plain.eval()
    seen: dict[str, list[Tensor]] = {}

    def listen(name: str, module: nn.Module) -> None:
        def hook(module: Any, given: tuple[Tensor, ...], more: dict[str, Any]) -> None:
            rows = given[0]
            if isinstance(module, nn.MultiheadAttention):
                seen.setdefault(f"{name}.in_proj_weight", []).append(rows)
                attention = copy.deepcopy(module)
                attention._forward_pre_hooks.clear()
                with torch.no_grad():
                    attention.out_proj.weight.copy_(torch.eye(module.embed_dim))
                    attention.out_proj.bias.zero_()
                rows = attention(*given, **more)[0]
                name_of = f"{name}.out_proj.weight"
            else:
                name_of = f"{name}.weight"
                if isinstance(module, nn.Conv2d):
                    rows = F.unfold(rows, 1, stride=module.stride).mT
            seen.setdefault(name_of, []).append(rows)

        module.register_forward_pre_hook(hook, with_kwargs=True)

    for name, module in plain.clip.named_modules():
        small = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        kinds = (nn.MultiheadAttention, nn.Linear)
        if small or (isinstance(module, kinds) and "out_proj" not in name):
            listen(name, module)
    images, _ = all_images(plain, task)
    with torch.no_grad():
        plain.encode_texts(plain.text_inputs(inputs.prompts))
        plain.encode_images(images)
    assert {key for key in found if "attnpool" not in key} == seen.keys()
    assert any("out_proj" in key for key in seen)
    for key in seen:
        value = found[key]
        rows = torch.cat([each.flatten(0, -2) for each in seen[key]]).double()
        torch.testing.assert_close(value.double(), rows.T @ rows, rtol=1e-3, atol=1e-3, msg=key)


def test_attention_over_inputs_of_another_width() -> None:
    # As the pooling of CoCa: queries, keys and values have weights of their own.
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    query, keys = torch.randn(3, 4, 8), torch.randn(3, 5, 6)
    seen: dict[str, Tensor] = {}
    attention.register_forward_pre_hook(
        _of_attention(None, "out", seen.__setitem__), with_kwargs=True
    )
    with torch.no_grad():
        expected, _ = attention(query, keys, keys)
        assert attention.out_proj(seen["out"]).shape == (12, 8)
        found = attention.out_proj(seen["out"].unflatten(0, (4, 3))).transpose(0, 1)
    torch.testing.assert_close(found, expected)


def test_inputs_that_are_not_seen_are_told(
    load_tiny: Load, task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    # The pooling by attention takes the weights of its layers, and calls none of them.
    _, _, training = adapted(load_tiny, "tiny-resnet")
    found = input_moments(training, TaskInputs(0, task, {}))
    (line,) = [each for each in caplog.messages if "no inputs were seen" in each]
    unseen = {key for key, value in found.items() if not value.any()}
    assert unseen and all(key in line for key in unseen)
    assert all("attnpool" in key for key in unseen)
