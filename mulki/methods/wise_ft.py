"""wise_ft: fine-tuning, then interpolation of the weights (WiSE-FT, Wortsman et al., CVPR 2022).

    theta <- (1 - alpha) theta_base + alpha theta_finetuned     at the end of each task

Source: arXiv 2109.01903, whose one task starts from the original model, so that theta_base is that
model. In a sequence there are two readings. The benchmark of ZSCL takes the model before the task,
with alpha = 0.8, which is the default here. With the original model as the base, every task loses
the share 1 - alpha of all that was learned before it as well.

All weights that train are interpolated. The paper also gives a curve of accuracies over alpha; here
alpha is a hyper-parameter, chosen before the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mulki.choices.options import option
from mulki.distributed.parts import set_whole
from mulki.methods.base import TaskStart
from mulki.methods.finetune import Finetune
from mulki.stages.connecting import Connections, snapshot

Base = Literal["previous", "zero_shot"]


class WiseFT(Finetune):
    """Cross-entropy alone; at a task's end its weights are mixed with those of a base model."""

    name = "wise_ft"
    summary = "fine-tuning, then weights mixed with those of the previous or the original model"
    options: Options

    @dataclass(frozen=True)
    class Options(Finetune.Options):
        alpha: float = option(
            0.8,
            "weight of the new parameters against those of the base, (0, 1]",
            above=0,
            high=1,
            alias="--wise-ft-alpha",
        )
        wise_base: Base = option(
            "previous", "the base: the model before the task, or the original one"
        )

    def __init__(self, options: Options):
        super().__init__(options)
        self._original: dict[str, Tensor] | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """The original weights, for a run that is saved and goes on."""
        return {"original": self._original}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Set what `get_extra_state` returned."""
        if self._original is None:
            self._original = state["original"]
            return
        for name, value in state["original"].items():
            set_whole(self._original[name], value)  # in place: the connections have them already

    @property
    def takes_mean(self) -> bool:
        return self.options.alpha < 1

    def goes_on(self, weights: Mapping[str, nn.Parameter]) -> None:
        if self.options.wise_base == "zero_shot":
            self._original = snapshot(weights)

    def start_task(self, task: TaskStart) -> None:
        if task.index == 0:
            self.goes_on(task.weights)
        if self._original is not None:  # those of a save are whole, and on the CPU
            saved, self._original = self._original, {}
            for name, value in saved.items():
                self._original[name] = torch.empty_like(task.weights[name])
                set_whole(self._original[name], value)
        self._connections = Connections(task.weights, alpha=self.options.alpha, base=self._original)
