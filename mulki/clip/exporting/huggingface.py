"""CLIP and SigLIP of open_clip as transformers has them, with tokenizer and image processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.clip.exporting.checks import TEXTS, export_folder, largest_difference, need_packages
from mulki.clip.exporting.siglip import siglip_config, siglip_tokenizer
from mulki.clip.exporting.towers import transformer_config
from mulki.clip.models import VisionLanguageModel, quiet_transformers
from mulki.clip.models.huggingface.names import to_huggingface
from mulki.errors import InputError

# Of the vocabulary that open_clip and transformers have in common.
_START, _END = "<|startoftext|>", "<|endoftext|>"


def export_huggingface(model: VisionLanguageModel, folder: Path) -> float:
    """Write a folder that ``CLIPModel`` or ``SiglipModel`` loads, without any network.

    Args:
        model: a CLIP with a vision transformer and open_clip's own text tower, or a SigLIP, on the
            CPU, in float32.
        folder: made; it must not exist or be empty.

    Returns:
        The largest difference of a feature, read from the folder again, from the original's.

    Raises:
        InputError: transformers is missing or has no such architecture, or the folder is taken.
    """
    need_packages("--to huggingface", "transformers")
    siglip = hasattr(model.clip.visual, "trunk")
    try:
        weights = to_huggingface(model.clip.state_dict())
        config = siglip_config(model) if siglip else _config(model)
    except (AttributeError, KeyError) as error:
        raise _no_such_model(model.name, f"it has {error.args[0]}") from None
    exported = _class(siglip)(config)
    try:
        exported.load_state_dict(weights)
    except RuntimeError as error:
        raise _no_such_model(model.name, " ".join(str(error).split())[:200]) from None
    tokenizer = siglip_tokenizer(model) if siglip else clip_tokenizer(model)
    with export_folder(folder) as new, quiet_transformers():
        exported.save_pretrained(new)
        for file in new.glob("*.safetensors"):
            # safetensors' own writer lets the owner alone read the file.
            file.chmod((new / "config.json").stat().st_mode)
        tokenizer.save_pretrained(new)
        _processor(model).save_pretrained(new)
        again = _class(siglip).from_pretrained(new, local_files_only=True).eval()
        return largest_difference(
            model,
            lambda pixels: _features(again.get_image_features(pixel_values=pixels)),
            lambda tokens: _features(again.get_text_features(input_ids=tokens)),
        )


def _class(siglip: bool) -> Any:
    import transformers

    return transformers.SiglipModel if siglip else transformers.CLIPModel


def _config(model: VisionLanguageModel) -> Any:
    from transformers import CLIPConfig

    clip = model.clip
    visual, text = clip.visual, getattr(clip, "text", clip)
    # Also in the towers' own: CLIPVisionModelWithProjection reads it there.
    width = {"projection_dim": visual.proj.shape[1]}
    shapes: dict[str, Any] = {
        "vision_config": {
            **transformer_config(visual.transformer),
            **width,
            "image_size": model.image_size,
            "patch_size": visual.conv1.kernel_size[0],
        },
        "text_config": {
            **transformer_config(text.transformer),
            **width,
            "max_position_embeddings": text.positional_embedding.shape[0],
            "vocab_size": text.token_embedding.num_embeddings,
            "bos_token_id": model.tokenizer.sot_token_id,  # type: ignore[attr-defined]
            "eos_token_id": model.tokenizer.eot_token_id,  # type: ignore[attr-defined]
            "pad_token_id": model.tokenizer.eot_token_id,  # type: ignore[attr-defined]
        },
    }
    return CLIPConfig(**shapes, **width)


def clip_tokenizer(model: VisionLanguageModel) -> Any:
    """open_clip's own tokenizer as one of transformers.

    Raises:
        InputError: it makes other tokens.
    """
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
        "vision transformer with open_clip's own text tower and tokenizer, and no logit bias, or "
        "SigLIP. Use the folder with open_clip, or pass --to onnx"
    )
