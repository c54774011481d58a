"""ewc: elastic weight consolidation, weights that earlier tasks depend on are held fast.

    L = CE_ls(s u w^T, y) + lambda / 2 sum_i F_i (theta_i - theta*_i)^2
    F <- gamma F + F_t                                          at the end of each task
    F_t,i = mean over images x, y ~ p(. | x) of (d log p(y | x) / d theta_i)^2

theta* are the weights after the previous task, and p are the model's probabilities of the task's
classes. F_t is the diagonal of the Fisher information, measured on `fisher_images` of the task's
training images, one image at a time, with classes drawn from the model's own answers.

Source: Kirkpatrick et al., PNAS 2017, arXiv 1612.00796. There each earlier task has a penalty with
weights of its own; here it is the online form of Schwarz et al., ICML 2018, arXiv 1805.06370, which
keeps one sum F and the last weights, whatever the number of tasks: gamma = 1 forgets none of them.
The start model's own training is no task here: the weights are free in the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mulki.choices.options import option
from mulki.methods.base import ClassLoss, Needs, TaskStart
from mulki.stages.connecting import snapshot


class EWC(ClassLoss):
    """Cross-entropy, and a quadratic penalty weighted by the Fisher information."""

    name = "ewc"
    summary = "elastic weight consolidation, online: weights held by their Fisher information"
    options: Options

    @dataclass(frozen=True)
    class Options(ClassLoss.Options):
        ewc_lambda: float = option(1e4, "coefficient of the penalty", low=0)
        ewc_decay: float = option(
            1.0, "what is left of the earlier tasks' Fisher information at each task", low=0, high=1
        )
        fisher_images: int = option(
            256, "training images of a task on which its Fisher information is measured", low=1
        )

    def __init__(self, options: Options):
        super().__init__(options)
        self.needs = Needs(fisher=options.fisher_images)
        self._fisher: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._weights: Mapping[str, nn.Parameter] = {}

    def get_extra_state(self) -> dict[str, Any]:
        """The Fisher information and the weights at the start, for a run that is saved."""
        return {"fisher": self._fisher, "start": self._start}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Set what `get_extra_state` returned."""
        self._fisher = self._beside_weights(state["fisher"])
        self._start = self._beside_weights(state["start"])

    def kept(self) -> dict[str, Tensor]:
        return self._fisher

    def take_kept(self, kept: Mapping[str, Tensor]) -> None:
        self._fisher = dict(kept)

    def start_task(self, task: TaskStart) -> None:
        self._weights = task.weights
        self._fisher = self._beside_weights(self._fisher)
        self._start = snapshot(task.weights) if self._fisher else {}

    def penalties(self) -> dict[str, Tensor]:
        # Other weights may train in a run that goes on with other options.
        parts = [
            (fisher * (self._weights[name] - self._start[name]).square()).sum()
            for name, fisher in self._fisher.items()
            if name in self._weights
        ]
        return {"ewc_loss": self.options.ewc_lambda / 2 * torch.stack(parts).sum()} if parts else {}

    def keep_fisher(self, fisher: Mapping[str, Tensor]) -> None:
        decay = self.options.ewc_decay
        earlier = {name: decay * value for name, value in self._fisher.items()}
        self._fisher = earlier | {
            name: value + earlier[name] if name in earlier else value
            for name, value in fisher.items()
        }
        self._start = {}

    def _beside_weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Those of a save are on the CPU, and laid out in another order, in which a sum would be
        # rounded otherwise; without a task there is nothing yet to lie beside.
        weights = self._weights
        return {
            n: torch.empty_like(weights[n], dtype=v.dtype, requires_grad=False).copy_(v)
            if n in weights
            else v
            for n, v in values.items()
        }
