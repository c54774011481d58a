"""The weights of CLIP and SigLIP under open_clip's names and under those of transformers.

Both keep the same numbers. Some weights lie in one tensor for query, key and value here and in
three there; `_Place` says which of transformers' tensors a tensor of open_clip holds, in their
order, and how it is laid out. One table serves both directions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mulki.clip.tensor_files import check_floats
from mulki.errors import InputError

_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
    # SigLIP's has a bias, and is a part of the tower.
    "text_projection.weight": "head.weight",
    "text_projection.bias": "head.bias",
}
_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    # As transformers spells it.
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
# Of timm's vision transformer, which open_clip has for SigLIP.
_TRUNK = {
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
    "attn_pool.latent": "head.probe",
    **{
        f"attn_pool.{ours}.{kind}": f"head.{theirs}.{kind}"
        for ours, theirs in (
            ("proj", "attention.out_proj"),
            ("norm", "layernorm"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        )
        for kind in ("weight", "bias")
    },
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    # timm
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Prefixes of open_clip's names, the most special first.
_TOWERS = (
    ("visual.trunk.", "vision_model", _TRUNK),
    ("visual.", "vision_model", _VISION),
    ("text.", "text_model", _TEXT),
    ("", "text_model", _TEXT),
)
_ATTENTION = ("attn.in_proj", "attn.qkv")
_IN_LAYER = re.compile(r"(?:transformer\.resblocks|blocks)\.(\d+)\.(.+)[._](weight|bias)")
_IN_POOL = re.compile(r"attn_pool\.(q|kv)\.(weight|bias)")
# The only tensor of transformers that holds query, key and value in one.
_POOL = "vision_model.head.attention.in_proj_{}"
_POOL_PART = "vision_model.head.attention.{}_proj_{}"


@dataclass(frozen=True)
class _Place:
    names: tuple[str, ...]
    layout: Literal["same", "transposed", "batch of one", "scalar"] = "same"


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `transformers.CLIPModel`, or `SiglipModel`, of that of an open_clip model.

    Raises:
        KeyError: a name that they have not.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        place = _place(key)
        value = value.detach().float()
        if place.layout == "transposed":
            value = value.T
        elif place.layout == "batch of one":
            value = value[0]
        elif place.layout == "scalar":
            # SigLIP alone has a bias, and keeps both as vectors of one.
            value = value.reshape(1 if "logit_bias" in state else ())
        parts = value.chunk(len(place.names)) if len(place.names) > 1 else (value,)
        found |= {n: part.clone() for n, part in zip(place.names, parts, strict=True)}
    for kind in ("weight", "bias"):
        names = [_POOL_PART.format(part, kind) for part in "qkv"]
        if names[0] in found:
            found[_POOL.format(kind)] = torch.cat([found.pop(name) for name in names])
    return found


def from_huggingface(
    weights: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict of an open_clip model with weights from transformers.

    Args:
        weights: of `transformers.CLIPModel` or `SiglipModel`.
        like: the model's own state dict, for names and shapes.

    Raises:
        InputError: a tensor is missing, has another shape or whole numbers, or is not of this
            model.
    """
    # Of old versions; they are numbers from 0.
    left = {n: v for n, v in weights.items() if not n.endswith(".position_ids")}
    for kind in ("weight", "bias"):
        if (pool := left.pop(_POOL.format(kind), None)) is not None:
            thirds = zip("qkv", pool.chunk(3), strict=True)
            left |= {_POOL_PART.format(name, kind): third for name, third in thirds}
    found = {}
    for key, wanted in like.items():
        place = _place(key)
        missing = [name for name in place.names if name not in left]
        if missing:
            raise InputError(f"its weights have no {missing[0]}")
        given = {name: left.pop(name) for name in place.names}
        check_floats(given, dict.fromkeys(given, wanted))
        parts = [part.float() for part in given.values()]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if place.layout == "transposed":
            value = value.T
        elif place.layout == "batch of one":
            value = value[None]
        elif place.layout == "scalar" and value.numel() == 1:
            value = value.reshape(wanted.shape)
        if value.shape != wanted.shape:
            raise InputError(
                f"{place.names[0]} has the shape {list(parts[0].shape)}, which is not that of its "
                "configuration"
            )
        found[key] = value.contiguous()
    if left:
        raise InputError(f"its weights have {min(left)}, which is of another architecture")
    return found


def _place(key: str) -> _Place:
    if key in ("logit_scale", "logit_bias"):
        return _Place((key,), "scalar")
    if key == "visual.proj":
        return _Place(("visual_projection.weight",), "transposed")
    if key in ("text_projection", "text.text_projection"):
        return _Place(("text_projection.weight",), "transposed")
    if key == "visual.trunk.pos_embed":
        return _Place(("vision_model.embeddings.position_embedding.weight",), "batch of one")
    prefix, tower, names = next(each for each in _TOWERS if key.startswith(each[0]))
    own = key.removeprefix(prefix)
    if own in names:
        return _Place((f"{tower}.{names[own]}",))
    if pool := _IN_POOL.fullmatch(own):
        return _Place(tuple(_POOL_PART.format(part, pool[2]) for part in pool[1]))
    return _Place(tuple(f"{tower}.encoder.layers.{name}" for name in _in_layer(key, own)))


def _in_layer(key: str, own: str) -> tuple[str, ...]:
    match = _IN_LAYER.fullmatch(own)
    if match is not None:
        number, name, kind = match.groups()
        if name in _ATTENTION:
            return tuple(f"{number}.self_attn.{part}_proj.{kind}" for part in "qkv")
        if name in _LAYER:
            return (f"{number}.{_LAYER[name]}.{kind}",)
    raise KeyError(key)
