"""Making Connections: models are connected within a task and across tasks.

    within a task    theta_bar <- (n theta_bar + theta) / (n + 1)   every `every` steps, from n = 1
                     at the weights the task started with
    across tasks     theta_t <- (1 - alpha) theta_{t-1} + alpha theta_bar
                     and, as an option, lambda |theta - theta_{t-1}|^2 in the loss

Stated by the source (arXiv 2411.06764): that models are linked within and between tasks to
integrate earlier and new knowledge. Our choice: the running mean of the weights, as ZSCL's weight
ensembling does it, and interpolation with the previous model, as WiSE-FT does it (arXiv
2109.01903); the anchor is ZSCL's weight consolidation. Which of them the paper uses is not public.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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
    """(1 - alpha) previous + alpha current, name by name."""
    return {name: torch.lerp(previous[name], value, alpha) for name, value in current.items()}


def anchor_loss(weights: Weights, anchor: Weights) -> Tensor:
    """Sum of squared differences from the anchor; differentiable in `weights`."""
    parts = [(value - anchor[name]).square().sum() for name, value in weights.items()]
    # A sharded weight has its sum in pieces, one in each process.
    whole = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
    return torch.stack(whole).sum()
