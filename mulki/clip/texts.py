"""Encoding texts with a model: each process encodes its part, and all get the features of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mulki.clip.models import TEXT_BATCH, VisionLanguageModel
from mulki.distributed.world import ALONE, World


def text_inputs(model: VisionLanguageModel, prompts: Sequence[str], world: World = ALONE) -> Tensor:
    """`model.text_inputs` of n prompts, [n, ...]."""
    part = [prompts[row] for row in world.rows(len(prompts))]
    return world.gather(model.text_inputs(part), len(prompts))


def text_features(model: VisionLanguageModel, inputs: Tensor, world: World = ALONE) -> Tensor:
    """Features [n, D] of the `text_inputs` of n prompts, encoded `TEXT_BATCH` at a time."""
    batches = world.part(inputs).split(TEXT_BATCH)
    return world.gather(torch.cat([model.encode_texts(batch) for batch in batches]), len(inputs))


class TextInputs:
    """`text_inputs` of a model, each prompt's computed once.

    Args:
        model: the part of its text tower that `text_inputs` computes must stay frozen.
        world: the processes among which the texts are divided.
    """

    def __init__(self, model: VisionLanguageModel, world: World = ALONE):
        self._model = model
        self._world = world
        self._rows: dict[str, int] = {}
        # Of all prompts so far, and room for as many more.
        self._inputs: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """The prompts so far, with their inputs."""
        inputs = None if self._inputs is None else self._inputs[: len(self._rows)].clone()
        return {"prompts": list(self._rows), "inputs": inputs}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned."""
        self._rows = {prompt: row for row, prompt in enumerate(state["prompts"])}
        inputs: Tensor | None = state["inputs"]
        self._inputs = None if inputs is None else inputs.to(self._model.device)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[n, ...] of n prompts, at least one."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if new:
            inputs = text_inputs(self._model, new, self._world)
            known, count = len(self._rows), len(self._rows) + len(new)
            self._rows.update(zip(new, range(known, count), strict=True))
            if self._inputs is None:
                self._inputs = inputs
            elif count > len(self._inputs):
                more = inputs.new_empty(2 * count - known, *inputs.shape[1:])
                self._inputs = torch.cat([self._inputs[:known], more])
            self._inputs[known:count] = inputs
        assert self._inputs is not None
        return self._inputs[[self._rows[prompt] for prompt in prompts]]
