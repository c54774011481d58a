"""The optimiser of a task: its groups of parameters, with decay and learning rates of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mulki.clip.models import VisionLanguageModel
from mulki.methods import Method
from mulki.train.config.run_config import RunConfig
from mulki.train.learning.muon import MuonWithAdamW, is_matrix

#: Key of a group: its learning rate as a share of that of the step.
SHARE = "share"

# A tower's parameters are cut into so many parts of one learning rate: a group of its own for each
# parameter would make the update slow.
_PARTS = 16


def make_optimizer(
    model: VisionLanguageModel, method: Method, config: RunConfig
) -> torch.optim.Optimizer:
    """The optimiser of the options ``--opt``, ``--wd`` and so on.

    As in open_clip, gains, biases and the like do not decay. Sharded parameters are in groups of
    their own, since no fused update takes both kinds.

    Args:
        model: the student; its trainable parameters move.
        method: its own parameters move beside them, without decay.
        config: of the run.
    """
    trainable = model.trainable()
    shares = layer_shares(trainable, config.lr_first_layer)
    use_muon = config.opt == "muon"
    matrices = [n for n, p in trainable.items() if use_muon and is_matrix(n, p)]
    rest = [name for name in trainable if name not in matrices]
    groups = _groups(trainable, shares, [n for n in rest if trainable[n].ndim >= 2], config.wd)
    groups += _groups(trainable, shares, [n for n in rest if trainable[n].ndim < 2], 0.0)
    if own := [*method.parameters()]:
        groups.append({"params": own, "weight_decay": 0.0, SHARE: 1.0})
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": model.device.type in ("cpu", "cuda"),
    }
    if use_muon:
        return MuonWithAdamW(_groups(trainable, shares, matrices, config.wd), groups, **options)
    return torch.optim.AdamW(groups, **options)


def layer_shares(parameters: Mapping[str, nn.Parameter], first: float) -> dict[str, float]:
    """The learning rate of each parameter as a share of that of the step.

    In each tower it grows linearly from `first` to 1 along the order of its parameters, in 16 equal
    parts, as that of KeepLoRA++ does along the layers of a transformer: what comes first in a
    network is of use for all tasks. The image tower is all whose name begins with ``visual.``.

    Args:
        parameters: by name, in the order of the model.
        first: in [0, 1].
    """
    towers: dict[bool, list[str]] = {True: [], False: []}
    for name in parameters:
        towers[name.startswith("visual.")].append(name)
    shares = {}
    for names in towers.values():
        parts = min(_PARTS, len(names))
        for place, name in enumerate(names):
            part = place * parts // len(names)
            shares[name] = first + (1 - first) * part / (parts - 1) if parts > 1 else 1.0
    return shares


def _groups(
    parameters: Mapping[str, nn.Parameter],
    shares: Mapping[str, float],
    names: Sequence[str],
    decay: float,
) -> list[dict[str, Any]]:
    by_kind: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name in names:
        kind = isinstance(parameters[name], DTensor), shares[name]
        by_kind.setdefault(kind, []).append(parameters[name])
    return [
        {"params": members, "weight_decay": decay, SHARE: share}
        for (_, share), members in sorted(by_kind.items(), key=lambda item: item[0])
    ]


def clip_gradients(groups: Sequence[Sequence[nn.Parameter]], largest: float) -> None:
    """Scale the gradients so that their norm, over all groups, is at most `largest`."""
    # Norms of sharded and of whole parameters are computed apart: no operation takes both.
    norms = []
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, largest, total)
