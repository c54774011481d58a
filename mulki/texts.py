"""Encoding texts with a model: each process encodes its part, and all get the features of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mulki.models import TEXT_BATCH, VisionLanguageModel
from mulki.world import ALONE, World


def text_inputs(model: VisionLanguageModel, prompts: Sequence[str], world: World = ALONE) -> Tensor:
    """`model.text_inputs` of n prompts, [n, ...]."""
    part = [prompts[row] for row in world.rows(len(prompts))]
    return world.gather(model.text_inputs(part), len(prompts))


def text_features(model: VisionLanguageModel, inputs: Tensor, world: World = ALONE) -> Tensor:
    """Features [n, D] of the `text_inputs` of n prompts, encoded `TEXT_BATCH` at a time."""
    batches = world.part(inputs).split(TEXT_BATCH)
    return world.gather(torch.cat([model.encode_texts(batch) for batch in batches]), len(inputs))
