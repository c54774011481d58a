"""The tokenizer of a model as one file that the package `tokenizers` reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from mulki.clip.exporting.checks import TEXTS
from mulki.clip.exporting.huggingface import clip_tokenizer
from mulki.clip.exporting.siglip import siglip_tokenizer
from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError

FILE = "tokenizer.json"

_log = logging.getLogger(__name__)


def write_tokenizer(model: VisionLanguageModel, folder: Path) -> str | None:
    """Write ``tokenizer.json``, which gives the model's token ids, padded to its context length.

    Returns:
        The name of the file; None, with a warning, where the model's tokenizer cannot be written.
    """
    own: Any = model.tokenizer
    try:
        made = siglip_tokenizer(model) if hasattr(own, "tokenizer") else clip_tokenizer(model)
    except (InputError, ImportError) as error:
        _log.warning("no %s is written (%s); make the token ids with open_clip", FILE, error)
        return None
    backend = made.backend_tokenizer
    # open_clip fills up with 0, which for its own tokenizer is no padding token.
    pad = made.pad_token_id if hasattr(own, "tokenizer") else 0
    length = own.context_length
    backend.enable_truncation(max_length=length)
    backend.enable_padding(length=length, pad_id=pad, pad_token=backend.id_to_token(pad))
    found = [encoded.ids for encoded in backend.encode_batch(list(TEXTS))]
    if not torch.equal(torch.tensor(found), own(list(TEXTS))):
        _log.warning("no %s is written (it gives other token ids than open_clip)", FILE)
        return None
    backend.save(str(folder / FILE))
    return FILE
