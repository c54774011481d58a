"""The start model by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mulki.clip.models.bundled import BUNDLED, PYTORCH_SUFFIXES, load_bundled
from mulki.clip.models.huggingface.reading import SCHEMA, load_huggingface
from mulki.clip.models.open_clip_models import RANDOM, load_open_clip
from mulki.clip.models.vision_language import VisionLanguageModel
from mulki.errors import InputError
from mulki.files import check_regular


def load(
    name: str,
    pretrained: str | None = None,
    *,
    device: torch.device | str = "cpu",
    stand_in: bool = False,
) -> VisionLanguageModel:
    """The start model.

    Args:
        name: "mulki-mini" (bundled), an open_clip model name ("ViT-B-32", "ViT-B/32"), or
            "hf-hub:org/repo", "local-dir:path" as open_clip reads them, or "hf-local:path", a CLIP
            or SigLIP that transformers has saved.
        pretrained: a tag of that model in open_clip, or the path of a checkpoint, such as the
            task checkpoints of a run. None means the bundled weights for "mulki-mini" and random
            ones for a plain name (a warning says so); "none" means random ones without a warning.
        device: where it goes.
        stand_in: make a model of open_clip with random weights, and with another tokenizer where
            its own is not on this machine. It costs the same to compute with.

    Raises:
        InputError: unknown name or tag, a checkpoint that is missing or of another model, or a
            missing package.
    """
    suffixes = (*PYTORCH_SUFFIXES, ".safetensors")
    if pretrained is not None and (os.sep in pretrained or Path(pretrained).suffix in suffixes):
        check_regular(pretrained)
        if not Path(pretrained).is_file():
            raise InputError(
                f"--pretrained: no file {pretrained}; pass a checkpoint's path or a tag of "
                "open_clip"
            )
    if pretrained is not None and (":" in name or (name, pretrained) == (BUNDLED, RANDOM)):
        raise InputError(
            f"--pretrained: {name} brings its own weights; leave --pretrained {pretrained} out"
        )
    if name == BUNDLED:
        model = load_bundled(pretrained)
    elif name.startswith(f"{SCHEMA}:"):
        model = load_huggingface(name.partition(":")[2])
    else:
        model = load_open_clip(name, pretrained, stand_in=stand_in)
    # open_clip's are in training mode, in which texts of a frozen tower with dropout are noisy.
    model.clip.to(device).eval()
    if model.device.type == "cpu":
        _sequence_first(model.clip)
    return model


def _sequence_first(clip: nn.Module) -> None:
    # With batch_first, attention passes transposed views to its linear layers. Where these are
    # frozen, as a teacher's are, torch then multiplies position by position, and under autocast to
    # bfloat16 it copies the weight for each position: 50 times slower for ViT-B-16 on a CPU.
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    stacks: list[Any] = [m for m in clip.modules() if type(m) is Transformer]
    for stack in stacks:
        known = all(type(block) is ResidualAttentionBlock for block in stack.resblocks)
        if known and getattr(stack, "batch_first", False):
            stack.batch_first = False
            for block in stack.resblocks:
                block.attn.batch_first = False
