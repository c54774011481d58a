"""Making Connections: models are connected within a task and across tasks.

    within a task    theta_bar <- (n theta_bar + theta) / (n + 1)   every `every` steps, from n = 1
                     at the weights the task started with
    across tasks     theta_t <- (1 - alpha) theta_{t-1} + alpha theta_bar
                     and, as an option, lambda |theta - theta_{t-1}|^2 in the loss

Stated by the source (arXiv 2411.06764): that models are linked within and between tasks to
integrate earlier and new knowledge. Our choice: the running mean of the weights, as ZSCL's weight
ensembling does it, and interpolation with the previous model, as WiSE-FT does it (arXiv
2109.01903); the anchor is ZSCL's weight consolidation. Which of them the paper uses is not public.
docs/method.md has what each gave. The preset of the bundled model has the anchor; otherwise the
method `mulki` has no connection unless asked: lambda depends on the size of the model and on the
learning rate, and for other models none was chosen.

`Connections` puts them together, for MulKI and for the methods they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mulki.distributed.parts import set_whole, whole

Weights = Mapping[str, Tensor]


def snapshot(weights: Weights) -> dict[str, Tensor]:
    """A detached copy, name by name."""
    return {name: value.detach().clone() for name, value in weights.items()}


class RunningMean:
    """The uniform mean of the weights at a task's start and after every `every` steps.

    Kept in float32 at least: in half precision a late member would be rounded away.
    """

    def __init__(self, start: Weights, every: int):
        if every < 1:
            raise ValueError(f"every: got {every}, wanted a positive number of steps")
        self.every = every
        self.mean = {
            name: value.to(torch.promote_types(value.dtype, torch.float32))
            for name, value in snapshot(start).items()
        }
        self.count = 1

    @torch.no_grad()
    def observe(self, weights: Weights, step: int) -> None:
        """Take in the weights after optimiser step `step` (counted from 1), if it is due."""
        if step % self.every:
            return
        self.count += 1
        for name, mean in self.mean.items():
            mean.lerp_(weights[name].to(mean.dtype), 1 / self.count)


@torch.no_grad()
def interpolate(previous: Weights, current: Weights, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) previous + alpha current, name by name, in the dtype of the current ones."""
    return {
        name: torch.lerp(previous[name].to(value.dtype), value, alpha)
        for name, value in current.items()
    }


def distance_from_anchor(weights: Weights, anchor: Weights) -> Tensor:
    """Sum of squared differences from the anchor; differentiable in `weights`."""
    # A sharded weight has its sum in pieces, one in each process.
    parts = [whole((value - anchor[name]).square().sum()) for name, value in weights.items()]
    return torch.stack(parts).sum()


class Connections(nn.Module):
    """The connections of one task, from its first step to its end.

    A module, so that its copies of the weights are in the state dict of the method that has it.

    Args:
        weights: those that train, by name; as they are when the task starts.
        every: steps between two members of the running mean; 0: none.
        alpha: weight of the new parameters against `base`, in (0, 1].
        l2: coefficient of the squared distance from the weights at the start.
        base: what the new parameters are interpolated with; by default the weights at the start.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        every: int = 0,
        alpha: float = 1.0,
        l2: float = 0.0,
        base: Weights | None = None,
    ):
        super().__init__()
        self._weights = weights
        self._alpha = alpha
        self._l2 = l2
        # Copies are as large as the model, so only those that are used are made.
        self._start = snapshot(weights) if l2 or (alpha < 1 and base is None) else {}
        self._base = self._start if base is None else base
        self._mean = RunningMean(weights, every) if every else None

    def get_extra_state(self) -> dict[str, Any]:
        """The weights at the start and the running mean, for a run that is saved and goes on."""
        mean = None if self._mean is None else {"mean": self._mean.mean, "count": self._mean.count}
        return {"start": self._start, "mean": mean}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Set what `get_extra_state` returned."""
        for name, value in state["start"].items():
            set_whole(self._start[name], value)
        if self._mean is not None:
            self._mean.count = state["mean"]["count"]
            for name, value in state["mean"]["mean"].items():
                set_whole(self._mean.mean[name], value)

    def penalties(self) -> dict[str, Tensor]:
        """The term ``anchor_loss``, or nothing where its coefficient is 0."""
        if not self._l2:
            return {}
        return {"anchor_loss": self._l2 * distance_from_anchor(self._weights, self._start)}

    def after_step(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (counted from 1)."""
        if self._mean is not None:
            self._mean.observe(self._weights, step)

    @torch.no_grad()
    def end_task(self) -> None:
        """Change the weights in place to the result of the task."""
        result = self._weights
        # A task shorter than `every` has its start as the only member: nothing would be learned.
        if self._mean is not None and self._mean.count > 1:
            result = self._mean.mean
        if self._alpha < 1:
            result = interpolate(self._base, result, self._alpha)
        for name, weight in self._weights.items():
            weight.copy_(result[name])
