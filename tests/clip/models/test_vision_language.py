from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mulki.clip import models
from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError
from mulki.train.saving.checkpoints import publish, save_weights
from tests.clip.models.model_helpers import PROMPTS, Load, encoded
from tests.train_helpers import same_state, state_of

NORMS = (nn.LayerNorm, nn.BatchNorm2d)


# --- the text tower in two parts


def test_text_tower_that_trains_is_not_split(load_tiny: Load) -> None:
    model = load_tiny()
    inputs = model.text_inputs(PROMPTS)
    assert inputs.dtype == torch.int64 and inputs.shape == (3, 16)
    features = model.encode_texts(inputs)
    torch.testing.assert_close(features.detach(), encoded(model))
    features.sum().backward()
    assert model.clip.token_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-biased"])
def test_locked_text_tower_gives_finished_features(load_tiny: Load, name: str) -> None:
    model = load_tiny(name)
    model.lock(text=True)
    inputs = model.text_inputs(PROMPTS)
    assert inputs.shape == (3, 32) and not inputs.requires_grad
    torch.testing.assert_close(model.encode_texts(inputs), encoded(model))
    assert not model.encode_texts(inputs).requires_grad


def test_hugging_face_tower_is_split_before_its_projection(hf_model: VisionLanguageModel) -> None:
    hf_model.eval()
    wanted = encoded(hf_model)
    torch.testing.assert_close(hf_model.encode_texts(hf_model.text_inputs(PROMPTS)), wanted)
    hf_model.lock(text=True)
    inputs = hf_model.text_inputs(PROMPTS)
    assert inputs.shape == (3, 12)  # the transformer's width, not the embedding's
    features = hf_model.encode_texts(inputs)
    torch.testing.assert_close(features.detach(), wanted)
    features[:, 0].sum().backward()
    with_gradient = {n for n, p in hf_model.clip.named_parameters() if p.grad is not None}
    assert with_gradient == {"text.proj.weight"}
    # What was computed once stays right while the projection moves.
    with torch.no_grad():
        hf_model.clip.text.proj.weight.normal_()
    torch.testing.assert_close(hf_model.encode_texts(inputs).detach(), encoded(hf_model))


def test_padding_does_not_change_a_text(hf_model: VisionLanguageModel) -> None:
    hf_model.eval()
    hf_model.lock(text=True)
    alone = hf_model.text_inputs(PROMPTS[2:])
    torch.testing.assert_close(hf_model.text_inputs(PROMPTS)[2:], alone)


def test_locked_hugging_face_tower_with_a_frozen_projection(hf_model: VisionLanguageModel) -> None:
    hf_model.lock(text=True)
    hf_model.clip.text.proj.requires_grad_(False)
    hf_model.eval()
    assert hf_model.text_inputs(PROMPTS).shape == (3, 16)
    torch.testing.assert_close(
        hf_model.encode_texts(hf_model.text_inputs(PROMPTS)), encoded(hf_model)
    )


def test_published_hugging_face_tower_brings_its_tokenizer(
    hf_model: VisionLanguageModel, tmp_path: Path
) -> None:
    save_weights(hf_model, tmp_path / "w.safetensors")
    publish(hf_model, tmp_path / "w.safetensors", tmp_path / "latest")
    again = models.load(f"local-dir:{tmp_path / 'latest'}")
    hf_model.eval()
    again.eval()
    torch.testing.assert_close(encoded(again), encoded(hf_model))


# --- what trains


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-biased"])
def test_logit_scale_and_bias_never_train(load_tiny: Load, name: str) -> None:
    trainable = load_tiny(name).trainable()
    assert trainable and not any(n.startswith("logit_") for n in trainable)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_locks(load_tiny: Load, text: bool, image: bool) -> None:
    model = load_tiny("tiny-resnet")
    model.lock(text=text, image=image)
    names = set(model.trainable())
    visual = {n for n, _ in model.clip.named_parameters() if n.startswith("visual.")}
    rest = {n for n, _ in model.clip.named_parameters()} - visual - {"logit_scale"}
    assert names == (set() if image else visual) | (set() if text else rest)


@pytest.mark.parametrize("part", ["text", "visual"])
def test_locks_of_coca(part: str) -> None:
    """Which has no methods for it."""
    from open_clip import CoCa

    text = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    image = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    clip = CoCa(16, multimodal_cfg=text, text_cfg=text | {"embed_cls": True}, vision_cfg=image)
    model = VisionLanguageModel(clip, Tensor, Tensor, "coca", config={}, trunk=None)
    model.lock(text=part == "text", image=part == "visual")
    locked = {name for name in clip.state_dict() if name.startswith(f"{part}.")}
    assert locked and not locked & set(model.trainable()) and model.trainable()


def test_trainable_parameters_are_live(load_tiny: Load) -> None:
    model = load_tiny()
    assert all(p is dict(model.clip.named_parameters())[n] for n, p in model.trainable().items())


def test_training_mode_spares_what_is_frozen(hf_model: VisionLanguageModel) -> None:
    hf_model.lock(text=True)
    hf_model.train()
    clip = hf_model.clip
    assert clip.visual.training and clip.text.proj.training
    dropouts = [m for m in clip.text.transformer.modules() if isinstance(m, nn.Dropout)]
    assert dropouts and not any(m.training for m in clip.text.transformer.modules())
    hf_model.eval()
    assert not any(m.training for m in clip.modules())


def test_batch_norm_never_trains_its_statistics(load_tiny: Load) -> None:
    model = load_tiny("tiny-resnet")
    model.train()
    norms = [m for m in model.clip.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 5 and not any(m.training for m in norms)
    assert all(m.weight.requires_grad for m in norms)
    before = state_of(model)
    model.encode_images(torch.randn(4, 3, 32, 32))
    assert same_state(state_of(model), before)


def test_bias_and_scale(load_tiny: Load) -> None:
    model = load_tiny()
    assert model.logit_scale.shape == ()
    assert float(model.logit_scale) == pytest.approx(float(model.clip.logit_scale.exp()))


def test_features_are_unit_float32_rows(load_tiny: Load) -> None:
    model = load_tiny()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        images = model.encode_images(torch.randn(2, 3, 32, 32))
        texts = model.encode_texts(model.text_inputs(PROMPTS))
    for features in (images, texts):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))


# --- copies


def test_frozen_copy_is_apart_from_what_trains(load_tiny: Load) -> None:
    model = load_tiny("tiny-resnet")
    model.lock(text=True)
    model.clip.train()
    copy = model.frozen_copy()
    before = state_of(copy)
    assert same_state(before, state_of(model))
    assert not any(p.requires_grad for p in copy.clip.parameters())
    assert not any(m.training for m in copy.clip.modules())
    assert model.clip.training and model.trainable()
    shared = {id(p) for p in model.clip.parameters()} & {id(p) for p in copy.clip.parameters()}
    assert shared == {id(p) for p in model.clip.parameters() if not p.requires_grad}
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(1)
        for buffer in model.clip.visual.buffers():
            buffer.add_(1)
    assert same_state(state_of(copy), before)


def test_copy_of_a_copy(load_tiny: Load) -> None:
    copy = load_tiny().frozen_copy()
    assert same_state(state_of(copy.frozen_copy()), state_of(copy))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-biased", "hf"])
def test_stored_in_half_precision(
    load_tiny: Load, hf_model: VisionLanguageModel, name: str, norms: bool
) -> None:
    model = hf_model if name == "hf" else load_tiny(name)
    images, inputs = torch.randn(3, 3, 32, 32), model.text_inputs(PROMPTS)
    model.eval()
    with torch.no_grad():
        wanted = model.encode_images(images), model.encode_texts(inputs)
    model.store(torch.bfloat16, norms=norms)
    norm_weights = {
        id(p) for m in model.clip.modules() if isinstance(m, NORMS) for p in m.parameters()
    }
    for key, parameter in model.clip.named_parameters():
        wide = key.startswith("logit_") or (not norms and id(parameter) in norm_weights)
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), key
    inputs = model.text_inputs(PROMPTS)
    student, copy = model, model.frozen_copy()
    for one in (student, copy):
        got = one.encode_images(images), one.encode_texts(inputs)
        for features, exact in zip(got, wanted, strict=True):
            assert features.dtype == torch.float32
            assert torch.cosine_similarity(features, exact).min() > 0.99
    student.encode_images(images).sum().backward()
    assert any(p.grad is not None for p in student.trainable().values())


def test_weights_are_taken_over(load_tiny: Load) -> None:
    one, other = load_tiny("tiny-resnet", seed=1), load_tiny("tiny-resnet", seed=2)
    assert not same_state(state_of(one), state_of(other))
    frozen = one.frozen_copy()
    frozen.copy_from(other)
    assert same_state(state_of(frozen), state_of(other))
    assert not same_state(state_of(one), state_of(other))


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-biased"])
def test_checkpointed_activations_change_no_gradient(load_tiny: Load, name: str) -> None:
    def gradients(checkpointed: bool) -> tuple[dict[str, torch.Tensor], int]:
        model, kept = load_tiny(name), 0
        if checkpointed:
            model.checkpoint_activations()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        torch.manual_seed(0)
        images = torch.randn(3, 3, 32, 32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model.encode_images(images)[:, 0].sum()
        loss.backward()
        found = {n: p.grad for n, p in model.trainable().items() if p.grad is not None}
        return found, kept

    (plain, all_kept), (ours, some_kept) = gradients(False), gradients(True)
    assert plain.keys() == ours.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, plain[key])
    assert some_kept < all_kept


def test_a_tower_that_cannot_checkpoint_activations(load_tiny: Load) -> None:
    model = load_tiny("tiny-resnet")
    model.clip = SimpleNamespace()
    with pytest.raises(InputError, match="^--grad-checkpointing: tiny-resnet "):
        model.checkpoint_activations()


def test_towers_hold_what_is_encoded_and_do_not_overlap(
    load_tiny: Load, hf_model: VisionLanguageModel
) -> None:
    for model in (load_tiny(), load_tiny("tiny-biased"), hf_model):
        towers = model.towers()
        inside = [id(p) for tower in towers for p in tower.parameters()]
        assert len(inside) == len(set(inside))
        assert len(towers) == (3 if model is hf_model else 2)


def test_compiled_towers_give_the_same_features(
    load_tiny: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without inductor, which tests/ops/test_compile.py takes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = load_tiny(), load_tiny()
    compiled.compile()
    images = torch.randn(3, 3, 32, 32)
    wanted, got = plain.encode_images(images), compiled.encode_images(images)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    got[:, 0].sum().backward()
    assert all(p.grad is not None for n, p in compiled.trainable().items() if "visual" in n)
    assert compiled.checkpoint().keys() == plain.checkpoint().keys()
