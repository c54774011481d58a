"""The optimiser of a task: its groups of parameters, with decay and learning rates of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mulki.clip.models import VisionLanguageModel
from mulki.distributed.parts import whole
from mulki.methods import Method
from mulki.train.config.run_config import RunConfig
from mulki.train.learning.muon import MuonWithAdamW, is_matrix

#: Key of a group: its learning rate as a share of that of the step.
SHARE = "share"

# A tower's parameters are cut into so many parts of one learning rate: a group of its own for each
# parameter would make the update slow.
_PARTS = 16
# As in resblocks.3, blocks.3.1, layer.3, layer3 or stages.3.
_BLOCK = re.compile(r"(?:blocks?|layers?|stages?)\.?(\d+)\.")


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
    shares = layer_shares(
        trainable, config.lr_first_layer, config.layer_decay, config.lr_text_tower
    )
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


def layer_shares(
    parameters: Mapping[str, nn.Parameter], first: float, decay: float = 1.0, text: float = 1.0
) -> dict[str, float]:
    """The learning rate of each parameter as a share of that of the step: a product of three.

    In each tower it grows linearly from `first` to 1 along the order of its parameters, in 16 equal
    parts, as that of KeepLoRA++ does along the layers of a transformer: what comes first in a
    network is of use for all tasks. It falls by `decay` with each layer from the last to the first,
    as in BEiT (arXiv 2106.08254): the numbered blocks of a tower are its layers, what comes before
    them is one more, and so is what comes behind. The image tower is all whose name begins with
    ``visual.``, and the rest has `text` times its rate.

    Args:
        parameters: by name, in the order of the model.
        first: in [0, 1].
        decay: in (0, 1].
        text: at least 0.
    """
    towers: dict[bool, list[str]] = {True: [], False: []}
    for name in parameters:
        towers[name.startswith("visual.")].append(name)
    shares = {}
    for image, names in towers.items():
        parts = min(_PARTS, len(names))
        layers = _layers(names)
        for place, name in enumerate(names):
            part = place * parts // len(names)
            share = first + (1 - first) * part / (parts - 1) if parts > 1 else 1.0
            share *= decay ** (max(layers) - layers[place])
            shares[name] = share if image else share * text
    return shares


def _layers(names: Sequence[str]) -> list[int]:
    # The layer of each parameter of a tower.
    found = [_BLOCK.search(name) for name in names]
    numbers = [None if each is None else int(each[1]) + 1 for each in found]
    last = max((number for number in numbers if number is not None), default=0) + 1
    layers, behind = [], False
    for name, number in zip(names, numbers, strict=True):
        behind = behind or number is not None
        # open_clip has the embeddings of words behind the blocks, and projections before them.
        ends = (behind or "proj" in name) and "embed" not in name
        layers.append(number if number is not None else last if ends else 0)
    return layers


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
        # The norm of none would be on the CPU.
        if gradients := [p.grad for p in group if p.grad is not None]:
            norms.append(whole(torch.nn.utils.get_total_norm(gradients)))
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, largest, total)
