"""SigLIP of open_clip for `transformers.SiglipModel`: its configuration and its tokenizer."""

from __future__ import annotations

import string
import tempfile
from typing import Any

from mulki.clip.exporting.checks import TEXTS
from mulki.clip.exporting.towers import transformer_config, trunk_config
from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError


def siglip_config(model: VisionLanguageModel) -> Any:
    """A `transformers.SiglipConfig`.

    Raises:
        AttributeError, KeyError: a model with other towers.
    """
    from transformers import SiglipConfig

    text, trunk = model.clip.text, model.clip.visual.trunk
    return SiglipConfig(
        text_config={
            **transformer_config(text.transformer),
            "max_position_embeddings": text.positional_embedding.shape[0],
            "vocab_size": text.token_embedding.num_embeddings,
            "projection_size": text.text_projection.out_features,
        },
        vision_config=trunk_config(trunk),
    )


def siglip_tokenizer(model: VisionLanguageModel) -> Any:
    """The tokenizer of transformers that makes the tokens of the model's own.

    Raises:
        InputError: there is none.
    """
    own: Any = model.tokenizer
    made = getattr(own, "tokenizer", None)
    if made is None or not getattr(made, "is_fast", False):
        raise _no_tokenizer(model.name, "its tokenizer is none of transformers' fast ones")
    from transformers import AutoTokenizer

    length = own.context_length
    # A copy, since the model keeps its own.
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    made.model_max_length = length
    if own.clean_fn.__name__.endswith("canonicalize"):
        _canonicalize(made)
    wanted = own(list(TEXTS)).tolist()
    got = made(list(TEXTS), padding="max_length", truncation=True, max_length=length)["input_ids"]
    for text, one, other in zip(TEXTS, wanted, got, strict=True):
        if one != other:
            raise _no_tokenizer(model.name, f"transformers makes other tokens of {text[:40]!r}")
    return made


def _canonicalize(tokenizer: Any) -> None:
    # What open_clip does to a text before it calls the tokenizer, as a part of the tokenizer.
    from tokenizers import Regex, normalizers

    backend = tokenizer.backend_tokenizer
    signs = "".join(f"\\{sign}" for sign in string.punctuation)
    parts = [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{signs}]"), ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    before = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*parts, *before])


def _no_tokenizer(name: str, reason: str) -> InputError:
    return InputError(f"{name}: {reason}; leave --to huggingface, export it with --to onnx")
