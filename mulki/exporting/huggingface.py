"""CLIP of open_clip as `transformers.CLIPModel`, with its tokenizer and its image processor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.errors import InputError
from mulki.exporting.checks import TEXTS, export_folder, largest_difference, need_packages
from mulki.models import VisionLanguageModel, quiet_transformers

# Names of open_clip's parameters, within a tower, and those of transformers.
_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
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
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IN_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
# Of the vocabulary that open_clip and transformers have in common.
_START, _END = "<|startoftext|>", "<|endoftext|>"


def export_huggingface(model: VisionLanguageModel, folder: Path) -> float:
    """Write a folder that ``transformers.CLIPModel.from_pretrained`` loads, without any network.

    Args:
        model: a CLIP with a vision transformer and open_clip's own text tower, on the CPU, in
            float32.
        folder: made; it must not exist or be empty.

    Returns:
        The largest difference of a feature, read from the folder again, from the original's.

    Raises:
        InputError: transformers is missing or has no such architecture, or the folder is taken.
    """
    need_packages("--to huggingface", "transformers")
    from transformers import CLIPModel

    weights = clip_weights(model.clip.state_dict(), model.name)
    config = _config(model)
    exported = CLIPModel(config)
    try:
        exported.load_state_dict(weights)
    except RuntimeError as error:
        raise _no_such_model(model.name, " ".join(str(error).split())[:200]) from None
    tokenizer = _tokenizer(model)
    with export_folder(folder) as new, quiet_transformers():
        exported.save_pretrained(new)
        tokenizer.save_pretrained(new)
        _processor(model).save_pretrained(new)
        again = CLIPModel.from_pretrained(new, local_files_only=True).eval()
        return largest_difference(
            model,
            lambda pixels: _features(again.get_image_features(pixel_values=pixels)),
            lambda tokens: _features(again.get_text_features(input_ids=tokens)),
        )


def clip_weights(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state dict of `transformers.CLIPModel` with the weights of an open_clip model.

    Args:
        state: of `open_clip.CLIP` or `open_clip.CustomTextCLIP`.
        name: of the model, for messages.

    Raises:
        InputError: weights that a CLIP of transformers has not.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        value = value.detach().float().contiguous()
        tower, names, own = "text_model", _TEXT, key.removeprefix("text.")
        if key.startswith("visual."):
            tower, names, own = "vision_model", _VISION, key.removeprefix("visual.")
        if key == "logit_scale":
            found[key] = value.reshape(())
        elif key == "visual.proj":
            found["visual_projection.weight"] = value.T.contiguous()
        elif own == "text_projection":
            found["text_projection.weight"] = value.T.contiguous()
        elif own in names:
            found[f"{tower}.{names[own]}"] = value
        elif layer := _layer(own, value):
            found |= {f"{tower}.encoder.layers.{name}": part for name, part in layer.items()}
        else:
            raise _no_such_model(name, f"it has {key}")
    return found


def _layer(key: str, value: Tensor) -> dict[str, Tensor]:
    # The parts of a parameter of a transformer's layer, none if transformers has no such one.
    match = _IN_LAYER.fullmatch(key)
    if match is None:
        return {}
    number, own, kind = match[1], match[2], match[3]
    if own == "attn.in_proj":
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{number}.self_attn.{n}_proj.{kind}": part.clone() for n, part in parts}
    return {f"{number}.{_LAYER[own]}.{kind}": value} if own in _LAYER else {}


def _config(model: VisionLanguageModel) -> Any:
    from transformers import CLIPConfig

    clip = model.clip
    visual, text = clip.visual, getattr(clip, "text", clip)
    try:
        shapes: dict[str, Any] = {
            "vision_config": {
                **_transformer(visual.transformer),
                "image_size": model.image_size,
                "patch_size": visual.conv1.kernel_size[0],
            },
            "text_config": {
                **_transformer(text.transformer),
                "max_position_embeddings": text.positional_embedding.shape[0],
                "vocab_size": text.token_embedding.num_embeddings,
                "bos_token_id": model.tokenizer.sot_token_id,  # type: ignore[attr-defined]
                "eos_token_id": model.tokenizer.eot_token_id,  # type: ignore[attr-defined]
                "pad_token_id": model.tokenizer.eot_token_id,  # type: ignore[attr-defined]
            },
        }
        width = visual.proj.shape[1]
    except (AttributeError, KeyError) as error:
        raise _no_such_model(model.name, str(error)) from None
    return CLIPConfig(**shapes, projection_dim=width)


def _transformer(tower: Any) -> dict[str, Any]:
    first = tower.resblocks[0]
    return {
        "hidden_size": first.attn.embed_dim,
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.resblocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": _ACTIVATIONS[type(first.mlp.gelu).__name__],
        "layer_norm_eps": first.ln_1.eps,
    }


def _tokenizer(model: VisionLanguageModel) -> Any:
    from transformers import CLIPTokenizer

    own: Any = model.tokenizer
    vocabulary = dict(own.encoder)
    for name, number in ((_START, own.sot_token_id), (_END, own.eot_token_id)):
        del vocabulary[own.decoder[number]]
        vocabulary[name] = number
    merges = list(own.bpe_ranks)
    length = own.context_length
    try:
        made = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)
    except TypeError:  # before transformers 5 it is made of files, and a fast one of these
        made = _tokenizer_of_files(vocabulary, merges, length)
    for text in TEXTS:
        wanted = own([text])[0].tolist()
        wanted = wanted[: wanted.index(own.eot_token_id) + 1]
        got = made(text, truncation=True, max_length=length)["input_ids"]
        if got != wanted:
            raise InputError(
                f"{model.name}: transformers makes other tokens of {text[:40]!r} than its own "
                "tokenizer; leave --to huggingface, export it with --to onnx"
            )
    return made


def _tokenizer_of_files(
    vocabulary: Mapping[str, int], merges: list[tuple[str, str]], length: int
) -> Any:
    import json
    import tempfile

    import transformers

    fast: Any = getattr(transformers, "CLIPTokenizerFast")  # noqa: B009  # gone in transformers 5
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        files[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
        return fast(*map(str, files), model_max_length=length)


def _processor(model: VisionLanguageModel) -> Any:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import pil_modes_mapping
    from transformers import CLIPImageProcessor

    visual, size = model.clip.visual, model.image_size
    given = visual.preprocess_cfg
    if given["resize_mode"] not in ("shortest", "squash"):
        raise _no_such_model(model.name, f"its images are resized by {given['resize_mode']}")
    whole = {"height": size, "width": size}
    return CLIPImageProcessor(
        size={"shortest_edge": size} if given["resize_mode"] == "shortest" else whole,
        crop_size=whole,
        resample=pil_modes_mapping[InterpolationMode(given["interpolation"])],
        image_mean=list(given["mean"]),
        image_std=list(given["std"]),
    )


def _features(output: Any) -> Tensor:
    # A tensor before transformers 5, then a model output.
    tensor: Tensor = getattr(output, "pooler_output", output)
    return F.normalize(tensor.to(torch.float32), dim=-1)


def _no_such_model(name: str, reason: str) -> InputError:
    return InputError(
        f"{name}: transformers has no CLIP of this architecture ({reason}); what it has is a "
        "vision transformer with open_clip's own text tower and tokenizer, and no logit bias. "
        "Use the folder with open_clip, or pass --to onnx"
    )
