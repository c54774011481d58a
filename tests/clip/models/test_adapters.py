from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError
from tests.clip.models.model_helpers import PROMPTS, Load
from tests.train_helpers import same_state

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
NAMES = ("tiny-vit", "tiny-resnet", "tiny-biased")

Features = tuple[torch.Tensor, torch.Tensor]


def features(model: VisionLanguageModel) -> Features:
    model.eval()
    with torch.no_grad():
        texts = model.encode_texts(model.text_inputs(PROMPTS))
        return model.encode_images(IMAGES), texts


def same(one: Features, other: Features) -> bool:
    return all(map(torch.equal, one, other))


def adapted(load: Load, name: str = "tiny-vit", **options: Any) -> VisionLanguageModel:
    model = load(name)
    model.adapt(**{"rank": 2} | options)
    model.adapters.start_task(0, keep=False)  # type: ignore[union-attr]
    return model


def learn(model: VisionLanguageModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.trainable().values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_three_models_in_one_set_of_weights(load_tiny: Load, name: str) -> None:
    start = features(load_tiny(name))
    model = adapted(load_tiny, name)
    original, previous = model.teacher("original"), model.teacher("previous")
    assert all(same(features(each), start) for each in (model, original, previous))
    learn(model, seed=1)
    first = features(model)
    assert not same(first, start)
    assert same(features(original), start) and same(features(previous), start)
    model.adapters.start_task(1, keep=True)  # type: ignore[union-attr]
    assert same(features(model), features(previous))
    learn(model, seed=2)
    assert same(features(original), start)
    for after, before, now in zip(features(previous), first, features(model), strict=True):
        torch.testing.assert_close(after, before)
        assert (now - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_has_the_features_of_the_student(
    load_tiny: Load, name: str, dtype: torch.dtype
) -> None:
    plain, model = load_tiny(name), load_tiny(name)
    for each in (plain, model):
        if dtype != torch.float32:
            each.store(dtype, norms=False)
    model.adapt(2, alpha=3.0)
    for number in range(3):
        model.adapters.start_task(number, keep=number > 0)  # type: ignore[union-attr]
        learn(model, seed=number)
    state = model.checkpoint()
    assert {n: (v.dtype, v.shape) for n, v in state.items()} == {
        n: (v.dtype, v.shape) for n, v in plain.clip.state_dict().items()
    }
    plain.clip.load_state_dict(state)
    assert same(features(plain), features(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert same(features(plain), features(model))


def test_a_packaged_text_tower_has_an_adapter_of_its_projection(
    hf_model: VisionLanguageModel,
) -> None:
    hf_model.packaged = ("text.transformer.",)
    hf_model.lock(text=True)
    plain = copy.deepcopy(hf_model.clip)
    hf_model.adapt(2)
    hf_model.adapters.start_task(0, keep=False)  # type: ignore[union-attr]
    assert [n for n in hf_model.trainable() if n.startswith("text.proj.")]
    inputs = hf_model.text_inputs(PROMPTS)  # before the projection, which does not change them
    learn(hf_model, seed=1)
    state, whole = hf_model.checkpoint(), hf_model.checkpoint(whole=True)
    assert same_state(state, {n: v for n, v in whole.items() if not n.startswith("text.trans")})
    plain.load_state_dict(whole)
    hf_model.eval()
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(plain.eval().text.proj(inputs), dim=-1)
        assert torch.equal(hf_model.encode_texts(inputs), wanted)
        assert not torch.equal(hf_model.teacher("previous").encode_texts(inputs), wanted)


def test_the_product_is_that_of_the_formula(load_tiny: Load) -> None:
    model = adapted(load_tiny, rank=3, alpha=6.0)
    learn(model, seed=1)
    first = copy.deepcopy(model.adapters.checkpoint())  # type: ignore[union-attr]
    model.adapters.start_task(1, keep=True)  # type: ignore[union-attr]
    learn(model, seed=2)
    second = model.adapters.checkpoint()  # type: ignore[union-attr]
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    before, after = load_tiny().clip.state_dict()[name], model.checkpoint()[name]
    wanted = before.double()
    for state in (first, second):
        wanted += 6.0 / 3 * state[f"{name}.b"].double() @ state[f"{name}.a"].double()
    torch.testing.assert_close(after, wanted.float())
    assert second[f"{name}.kept_a"].shape == (3, before.shape[1])


def test_only_adapters_get_gradients_and_all_of_them_do(load_tiny: Load) -> None:
    model = adapted(load_tiny)
    learn(model, seed=1)  # while B is zero, A has no gradient
    frozen = {n: p.clone() for n, p in model.clip.named_parameters() if not p.requires_grad}
    model.train()
    similarity = model.encode_images(IMAGES) @ model.encode_texts(model.text_inputs(PROMPTS)).T
    similarity[0, 1].backward()
    trained = model.trainable()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert {n.rpartition(".")[2] for n in trained} == {"a", "b"}
    assert same_state(frozen, {n: dict(model.clip.named_parameters())[n] for n in frozen})


def test_targets_are_ends_of_names(load_tiny: Load) -> None:
    def weights(*targets: str) -> set[str]:
        model = adapted(load_tiny, targets=targets)
        return {n.rpartition(".")[0] for n in model.adapters.state()}  # type: ignore[union-attr]

    block = "visual.transformer.resblocks.0."
    attention = {n for n in weights("attn") if n.startswith(block)}
    assert attention == {block + "attn.in_proj_weight", block + "attn.out_proj.weight"}
    both = {n for n in weights("mlp.c_fc", "out_proj") if n.startswith(block)}
    assert both == {block + "attn.out_proj.weight", block + "mlp.c_fc.weight"}
    assert weights("mlp", "attn") == weights() > weights("mlp")


def test_a_locked_tower_has_no_adapters(load_tiny: Load) -> None:
    model = load_tiny("tiny-biased")
    model.lock(text=True)
    model.adapt(2)
    assert model.trainable() and all(n.startswith("visual.") for n in model.trainable())
    assert not model.trains_texts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ("attn", "qkv")}, r"--lora-targets: got 'qkv', .*; wanted some of .*c_fc"),
        ({"rank": 17}, r"--lora-rank: got 17, but transformer.* has 16 rows or columns"),
    ],
)
def test_bad_options(load_tiny: Load, options: dict[str, Any], said: str) -> None:
    model = load_tiny()
    before = copy.deepcopy(model.clip.state_dict())
    with pytest.raises(InputError, match=said):
        model.adapt(**{"rank": 2} | options)
    assert same_state(before, model.clip.state_dict())
    assert model.trainable()


def test_a_state_is_restored(load_tiny: Load) -> None:
    model, other = adapted(load_tiny), adapted(load_tiny)
    for number in range(2):
        model.adapters.start_task(number, keep=number > 0)  # type: ignore[union-attr]
        learn(model, seed=number)
    state = model.adapters.checkpoint()  # type: ignore[union-attr]
    assert other.adapters.fits(state)  # type: ignore[union-attr]
    other.adapters.restore(state)  # type: ignore[union-attr]
    assert same(features(other), features(model))
    assert same(features(other.teacher("previous")), features(model.teacher("previous")))
    narrower, fewer = adapted(load_tiny, rank=1), adapted(load_tiny, targets=("mlp",))
    assert not any(each.adapters.fits(state) for each in (narrower, fewer))  # type: ignore[union-attr]


def test_a_teacher_is_in_evaluation_mode(load_tiny: Load) -> None:
    model = adapted(load_tiny)
    model.train()
    training = [module.training for module in model.clip.modules()]
    seen: list[bool] = []
    model.clip.visual.register_forward_hook(lambda module, *_: seen.append(module.training))
    for each in (model.teacher("previous"), model):
        with torch.no_grad():
            each.encode_images(IMAGES)
    assert seen == [False, True]
    assert [module.training for module in model.clip.modules()] == training
