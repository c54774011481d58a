from __future__ import annotations

from typing import Any

import pytest
from open_clip.transformer import QuickGELU, Transformer
from torch import nn

from mulki.clip.exporting.towers import transformer_config, trunk_config


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.GELU, "gelu"),
        (lambda: nn.GELU(approximate="tanh"), "gelu_pytorch_tanh"),
        (QuickGELU, "quick_gelu"),
    ],
)
def test_a_transformer_of_open_clip(act: Any, name: str) -> None:
    found = transformer_config(Transformer(width=16, layers=3, heads=2, act_layer=act))
    assert found == {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "hidden_act": name,
        "layer_norm_eps": 1e-5,
    }


def test_another_activation_is_unknown() -> None:
    with pytest.raises(KeyError, match="ReLU"):
        transformer_config(Transformer(width=16, layers=1, heads=2, act_layer=nn.ReLU))


def test_a_vision_transformer_of_timm() -> None:
    timm = pytest.importorskip("timm")
    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
    trunk = timm.create_model("vit_base_patch16_siglip_224", **shape, act_layer="gelu_tanh")
    assert trunk_config(trunk) == {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "image_size": 32,
        "patch_size": 16,
    }
