from __future__ import annotations

from typing import Any

import pytest

from mulki.clip.models.huggingface.architecture import architecture_of
from mulki.errors import InputError
from tests.clip.models.huggingface.folders import clip_model, siglip_model


def config(model: Any, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.config.to_dict()
    for tower, values in changes.items():
        found[tower] = found[tower] | values
    return found


def test_openais_clip_is_that_of_open_clip() -> None:
    """As open_clip's own configuration of ViT-B-32-quickgelu has it."""
    found = architecture_of({"model_type": "clip", "projection_dim": 512})
    assert found.trunk is None and found.model == {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {
            "width": 768,
            "layers": 12,
            "mlp_ratio": 4.0,
            "head_width": 64,
            "image_size": 224,
            "patch_size": 32,
        },
        "text_cfg": {
            "width": 512,
            "layers": 12,
            "mlp_ratio": 4.0,
            "heads": 8,
            "context_length": 77,
            "vocab_size": 49408,
        },
    }


def test_the_end_of_another_vocabulary_is_said() -> None:
    text = {"vocab_size": 60000, "eos_token_id": 49407}
    found = architecture_of(config(clip_model(), text_config=text))
    assert found.model["text_cfg"]["pool_type"] == "eos"
    assert found.model["text_cfg"]["eos_id"] == 49407


def test_an_inner_width_that_is_no_multiple_stays_exact() -> None:
    found = architecture_of(config(siglip_model()))
    assert found.trunk is not None
    assert int(24 * found.trunk["model_args"]["mlp_ratio"]) == 43
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    found = architecture_of(
        {"model_type": "siglip", "vision_config": so400m, "text_config": {**so400m}}
    )
    assert int(1152 * found.model["text_cfg"]["mlp_ratio"]) == 4304


@pytest.mark.parametrize(
    ("make", "text", "vision", "words"),
    [
        (clip_model, {}, {"hidden_act": "gelu"}, "quick_gelu"),
        (clip_model, {}, {"num_channels": 1}, "1 channels"),
        (clip_model, {"hidden_act": "relu"}, {"hidden_act": "relu"}, "relu"),
        (siglip_model, {}, {"vision_use_head": False}, "vision_use_head"),
        (siglip_model, {}, {"layer_norm_eps": 1e-3}, "layer_norm_eps: got 0.001"),
        (siglip_model, {"projection_size": 8}, {}, "8 features .* 24"),
    ],
)
def test_what_open_clip_has_not(make: Any, text: Any, vision: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        architecture_of(config(make(), text_config=text, vision_config=vision))


def test_other_models_and_damage() -> None:
    with pytest.raises(InputError, match="bert"):
        architecture_of({"model_type": "bert"})
    with pytest.raises(InputError, match="model_type: got None"):
        architecture_of({})
    with pytest.raises(InputError, match="not a configuration of clip"):
        architecture_of({"model_type": "clip", "text_config": {"hidden_size": "wide"}})
