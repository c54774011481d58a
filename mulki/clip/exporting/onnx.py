"""The two towers of a model as ONNX files, with what a program needs to feed them."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki.clip.exporting.checks import (
    TEXTS,
    TOLERANCE,
    export_folder,
    largest_difference,
    need_packages,
)
from mulki.clip.exporting.tokens import write_tokenizer
from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError
from mulki.files import write_atomic

IMAGES, TEXTS_FILE, CONFIG = "image.onnx", "text.onnx", "config.json"
CLASSIFIER = "classifier.onnx"


class _Tower(nn.Module):
    def __init__(self, clip: nn.Module, kind: str):
        super().__init__()
        self.clip = clip
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        encode: Any = getattr(self.clip, f"encode_{self.kind}")
        return F.normalize(encode(x).float(), dim=-1)


class Classes(NamedTuple):
    """The classes of a model as one layer on its image features: ``weight @ features + bias``.

    Args:
        names: [C].
        weight: [C, D].
        bias: [C].
    """

    names: tuple[str, ...]
    weight: Tensor
    bias: Tensor


class _Classifier(nn.Module):
    def __init__(self, clip: nn.Module, classes: Classes):
        super().__init__()
        self.tower = _Tower(clip, "image")
        self.register_buffer("weight", classes.weight)
        self.register_buffer("bias", classes.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.tower(x), self.weight, self.bias)  # type: ignore[arg-type]


def export_onnx(model: VisionLanguageModel, folder: Path, classes: Classes | None = None) -> float:
    """Write ``image.onnx``, ``text.onnx``, ``tokenizer.json`` and ``config.json``.

    The towers give features of unit length: of pixels [B, 3, H, W], and of token ids [B, L], where
    L is the context length and B any number. The logits are ``logit_scale * image @ text.T``. The
    tokenizer gives these token ids. No file names a place of this machine.

    Args:
        model: on the CPU, in float32.
        folder: made; it must not exist or be empty.
        classes: written as ``classifier.onnx``, from pixels to logits [B, C].

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
        pixels = torch.randn(2, 3, size, size)
        _export(model, _Tower(model.clip, "image"), pixels, new / IMAGES)
        _export(model, _Tower(model.clip, "text"), tokens, new / TEXTS_FILE)
        config = _config(model, tokens.shape[1], write_tokenizer(model, new))
        images, texts = _session(new / IMAGES), _session(new / TEXTS_FILE)
        difference = largest_difference(model, images, texts)
        if classes is not None:
            whole = _Classifier(model.clip, classes)
            _export(model, whole, pixels, new / CLASSIFIER)
            _check_logits(model, whole, _session(new / CLASSIFIER), pixels)
        config = _without_places(config)
        if classes is not None:
            config["classifier"] = _of_classes(classes)
        write_atomic(new / CONFIG, json.dumps(config, indent=2) + "\n")
        return difference


@torch.no_grad()
def _check_logits(model: VisionLanguageModel, whole: nn.Module, found: Any, pixels: Tensor) -> None:
    wanted = whole(pixels)
    difference = float((found(pixels) - wanted).abs().max() / wanted.abs().max())
    if not difference <= TOLERANCE:
        raise InputError(
            f"{model.name}: its exported logits differ by {difference:.1e} of the largest, at most "
            f"{TOLERANCE:.0e} is rounding; nothing was written"
        )


def _of_classes(classes: Classes) -> dict[str, Any]:
    return {
        "file": CLASSIFIER,
        "input": "pixel_values",
        "output": "logits, whose softmax are probabilities",
        "classes": list(classes.names),
    }


def _without_places(value: Any) -> Any:
    # The last name of what is a path on this machine, as of a model in a folder.
    if isinstance(value, dict):
        return {name: _without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    if not isinstance(value, str):
        return value
    schema, colon, place = value.rpartition(":")
    is_place = Path(place).is_absolute() and not place.startswith("//")  # that of an address
    return schema + colon + Path(place).name if is_place else value


def _export(model: VisionLanguageModel, tower: nn.Module, example: Tensor, path: Path) -> None:
    text = path.name == TEXTS_FILE
    kind, name = ("text", "input_ids") if text else ("image", "pixel_values")
    # Optimisations that were not made, of which nobody has to know.
    loggers = [logging.getLogger(package) for package in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                tower.eval(),
                (example,),
                input_names=[name],
                output_names=["logits" if path.name == CLASSIFIER else "features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            # Notes of the exporter, among them where its source files lie.
            graph: Any = program.model.graph
            nodes = list(graph.all_nodes())
            noted = [*nodes, *graph.inputs, *graph.initializers.values()]
            noted += [value for node in nodes for value in node.outputs]
            for each in (graph, *noted):
                each.metadata_props.clear()
            program.save(path, external_data=True)
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


def _config(model: VisionLanguageModel, length: int, tokenizer: str | None) -> dict[str, Any]:
    bias = getattr(model.clip, "logit_bias", None)
    return {
        "model": model.name,
        "image": {"file": IMAGES, "input": "pixel_values", **model.clip.visual.preprocess_cfg},
        "text": {
            "file": TEXTS_FILE,
            "input": "input_ids",
            "context_length": length,
            "tokenizer": tokenizer,
        },
        "output": "features, of unit length",
        "logit_scale": float(model.logit_scale.detach()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "open_clip": model.config,
    }
