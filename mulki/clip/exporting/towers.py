"""The shape of a tower as a configuration of transformers says it."""

from __future__ import annotations

from typing import Any


def transformer_config(tower: Any) -> dict[str, Any]:
    """Of a transformer of open_clip's own.

    Raises:
        AttributeError, KeyError: another tower.
    """
    first = tower.resblocks[0]
    return {
        "hidden_size": first.attn.embed_dim,
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.resblocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": _activation(first.mlp.gelu),
        "layer_norm_eps": first.ln_1.eps,
    }


def trunk_config(trunk: Any) -> dict[str, Any]:
    """Of a vision transformer of timm.

    Raises:
        AttributeError, KeyError: another model.
    """
    first = trunk.blocks[0]
    return {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": first.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": _activation(first.mlp.act),
        "layer_norm_eps": first.norm1.eps,
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
    }


def _activation(module: Any) -> str:
    # timm has a class of its own for the approximation.
    name = type(module).__name__
    if name == "GELU" and getattr(module, "approximate", "none") == "tanh":
        name = "GELUTanh"
    return {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}[name]
