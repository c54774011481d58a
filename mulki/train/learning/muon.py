"""Muon for the matrices of a model and AdamW for the rest, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for some groups of parameters, AdamW for others.

    Muon's steps are scaled to the size of AdamW's (``match_rms_adamw``), so that one learning rate
    serves both.

    Args:
        matrices: groups for Muon, whose parameters have two dimensions; may be empty.
        others: groups for AdamW; may be empty.
        options: of AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        **options: Any,
    ):
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            lr = options["lr"]
            muon = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:
            self._parts.append(torch.optim.AdamW(others, **options))
        super().__init__([g for part in self._parts for g in part.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move all parameters; a closure is not taken."""
        if closure is not None:
            raise ValueError("closure: got one, wanted None")
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))
        self._share()

    def _share(self) -> None:
        # Both work on the groups and the state of this object, so that whoever reads or sets these
        # sees one optimiser.
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon should move a weight: two dimensions, and no table of embeddings."""
    return parameter.ndim == 2 and "embedding" not in name
