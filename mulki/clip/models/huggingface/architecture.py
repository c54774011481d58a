"""What a configuration of transformers is as one of open_clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mulki.errors import InputError

# Image towers of SigLIP are timm's, which have this in every normalisation.
_TRUNK_EPS = 1e-6
# open_clip's default.
_EPS = 1e-5
_TANH = ("gelu_pytorch_tanh", "gelu_new")
# Of transformers' configurations of CLIP before 2023; their text ends at its largest token.
_LEGACY_END = 2


@dataclass(frozen=True)
class Architecture:
    """A model that open_clip can make.

    Args:
        kind: clip or siglip.
        model: the keys of `model_cfg`; for SigLIP without the name of its image tower.
        trunk: the `config.json` of its image tower for timm; None for CLIP, whose is open_clip's.
    """

    kind: str
    model: dict[str, Any]
    trunk: dict[str, Any] | None = None


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The open_clip model of the content of a `config.json` that transformers has written.

    Raises:
        InputError: of another model, or with what open_clip has not; the message ends without a
            remedy, and does not name the file.
    """
    from transformers import CLIPConfig, SiglipConfig

    kind = str(config.get("model_type"))
    kinds: dict[str, Any] = {"clip": (CLIPConfig, _clip), "siglip": (SiglipConfig, _siglip)}
    if kind not in kinds:
        raise InputError(f"model_type: got {kind}, wanted clip or siglip")
    parser, make = kinds[kind]
    try:
        found: Architecture = make(parser.from_dict(config))
    except InputError:
        raise
    except Exception as error:  # whatever a damaged configuration leads to
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"not a configuration of {kind} ({type(error).__name__}: {reason})"
        ) from None
    return found


def _clip(config: Any) -> Architecture:
    text, vision = config.text_config, config.vision_config
    quick = {tower.hidden_act == "quick_gelu" for tower in (text, vision)}
    if len(quick) > 1:
        raise InputError("one tower has quick_gelu and the other not, which open_clip has not")
    _check_vision(vision)
    end = text.eos_token_id
    # The end of an ordinary vocabulary is its last token, which open_clip looks for by default.
    usual = end in (_LEGACY_END, text.vocab_size - 1)
    return Architecture(
        "clip",
        {
            "embed_dim": config.projection_dim,
            **({"quick_gelu": True} if quick == {True} else {}),
            "vision_cfg": {
                **_transformer(vision),
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
            },
            "text_cfg": {
                **_text(text),
                **({} if usual else {"pool_type": "eos", "eos_id": end}),
            },
        },
    )


def _siglip(config: Any) -> Architecture:
    text, vision = config.text_config, config.vision_config
    _check_vision(vision)
    if not vision.vision_use_head:
        raise InputError("vision_use_head is false, so that images have no features")
    if vision.layer_norm_eps != _TRUNK_EPS:
        raise InputError(
            f"vision layer_norm_eps: got {vision.layer_norm_eps}, but timm has {_TRUNK_EPS}"
        )
    if text.projection_size != vision.hidden_size:
        raise InputError(
            f"texts have {text.projection_size} features and images {vision.hidden_size}"
        )
    trunk = {
        "architecture": "vit_base_patch16_siglip_224",
        "model_args": {
            "img_size": vision.image_size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": _ratio(vision),
            "act_layer": "gelu_tanh" if _is_tanh(vision) else "gelu",
        },
        "pretrained_cfg": {"input_size": [3, vision.image_size, vision.image_size]},
    }
    model = {
        "embed_dim": vision.hidden_size,
        # Replaced by the weights; without it there would be no bias.
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **_text(text),
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }
    return Architecture("siglip", model, trunk)


def _check_vision(vision: Any) -> None:
    if vision.num_channels != 3:
        raise InputError(f"images: got {vision.num_channels} channels, wanted 3")
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise InputError(f"{name}: got {getattr(vision, name)}, wanted one number")


def _text(text: Any) -> dict[str, Any]:
    return {
        **_transformer(text),
        "heads": text.num_attention_heads,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
    }


def _transformer(tower: Any) -> dict[str, Any]:
    found = {
        "width": tower.hidden_size,
        "layers": tower.num_hidden_layers,
        "mlp_ratio": _ratio(tower),
    }
    if tower.layer_norm_eps != _EPS:
        found["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    if _is_tanh(tower):
        found["act_kwargs"] = {"approximate": "tanh"}
    return found


def _is_tanh(tower: Any) -> bool:
    if tower.hidden_act not in (*_TANH, "gelu", "quick_gelu"):
        raise InputError(f"the activation {tower.hidden_act} is none that open_clip has")
    return tower.hidden_act in _TANH


def _ratio(tower: Any) -> float:
    # open_clip and timm multiply the width by it and round down.
    width, inner = tower.hidden_size, tower.intermediate_size
    exact: float = inner / width
    return exact if int(width * exact) == inner else (inner + 0.5) / width
