"""The two towers of a model as ONNX files, with what a program needs to feed them."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki.clip.exporting.checks import TEXTS, export_folder, largest_difference, need_packages
from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError
from mulki.files import write_atomic

IMAGES, TEXTS_FILE, CONFIG = "image.onnx", "text.onnx", "config.json"


class _Tower(nn.Module):
    def __init__(self, clip: nn.Module, kind: str):
        super().__init__()
        self.clip = clip
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        encode: Any = getattr(self.clip, f"encode_{self.kind}")
        return F.normalize(encode(x).float(), dim=-1)


def export_onnx(model: VisionLanguageModel, folder: Path) -> float:
    """Write ``image.onnx``, ``text.onnx`` and ``config.json``.

    The towers give features of unit length: of pixels [B, 3, H, W], and of token ids [B, L], where
    L is the context length and B any number. The logits are ``logit_scale * image @ text.T``.

    Args:
        model: on the CPU, in float32.
        folder: made; it must not exist or be empty.

    Returns:
        The largest difference of a feature, computed by onnxruntime from the files, from the
        original's.

    Raises:
        InputError: a package is missing, torch cannot export the model, or the folder is taken.
    """
    need_packages("--to onnx", "onnx", "onnxscript", "onnxruntime")
    model.eval()
    size = model.image_size
    tokens = model.tokenizer(list(TEXTS))
    with export_folder(folder) as new:
        _export(model, "image", torch.randn(2, 3, size, size), new / IMAGES)
        _export(model, "text", tokens, new / TEXTS_FILE)
        write_atomic(new / CONFIG, json.dumps(_config(model, tokens.shape[1]), indent=2) + "\n")
        images, texts = _session(new / IMAGES), _session(new / TEXTS_FILE)
        return largest_difference(model, images, texts)


def _export(model: VisionLanguageModel, kind: str, example: Tensor, path: Path) -> None:
    name = {"image": "pixel_values", "text": "input_ids"}[kind]
    # Optimisations that were not made, of which nobody has to know.
    loggers = [logging.getLogger(package) for package in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Tower(model.clip, kind).eval(),
                (example,),
                path,
                input_names=[name],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever it meets
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{model.name}: torch {torch.__version__} cannot write its {kind} tower as ONNX "
            f"({type(error).__name__}: {reason}); try another torch, or --to huggingface"
        ) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _session(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: x.contiguous().numpy()})[0])

    return run


def _config(model: VisionLanguageModel, length: int) -> dict[str, Any]:
    bias = getattr(model.clip, "logit_bias", None)
    return {
        "model": model.name,
        "image": {"file": IMAGES, "input": "pixel_values", **model.clip.visual.preprocess_cfg},
        "text": {"file": TEXTS_FILE, "input": "input_ids", "context_length": length},
        "output": "features, of unit length",
        "logit_scale": float(model.logit_scale.detach()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "open_clip": model.config,
    }
