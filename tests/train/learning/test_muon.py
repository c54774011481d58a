from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mulki.train.learning.muon import MuonWithAdamW, is_matrix

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (3, 5), (7,))]


def grads(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def both(parameters: list[nn.Parameter]) -> MuonWithAdamW:
    matrices = [{"params": parameters[:2], "weight_decay": 0.1}]
    return MuonWithAdamW(matrices, [{"params": parameters[2:], "weight_decay": 0.0}], **OPTIONS)


def test_each_group_has_the_update_of_its_optimiser() -> None:
    ours, theirs = weights(), weights()
    optimiser = both(ours)
    muon = torch.optim.Muon(theirs[:2], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[2:], weight_decay=0.0, **OPTIONS)
    for step in range(3):
        for parameters in (ours, theirs):
            grads(parameters, step)
        for group in (*optimiser.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        optimiser.step()
        muon.step()
        adamw.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_a_saved_state_goes_on_as_if_nothing_had_happened() -> None:
    whole, cut = weights(), weights()
    one, first = both(whole), both(cut)
    for step in range(4):
        grads(whole, step)
        one.step()
        grads(cut, step)
        if step == 2:
            state = copy.deepcopy(first.state_dict())
            first = both(cut)
            first.load_state_dict(state)
        first.step()
    for mine, other in zip(whole, cut, strict=True):
        assert torch.equal(mine, other)
    assert set(first.state) == set(cut)


def test_either_part_may_be_empty() -> None:
    parameters = weights()
    for optimiser in (
        MuonWithAdamW([{"params": parameters[:2]}], [], **OPTIONS),
        MuonWithAdamW([], [{"params": parameters[2:]}], **OPTIONS),
    ):
        before = [p.detach().clone() for p in parameters]
        grads(parameters, 0)
        optimiser.step()
        moved = [not torch.equal(p, b) for p, b in zip(parameters, before, strict=True)]
        members = {id(p) for g in optimiser.param_groups for p in g["params"]}
        assert moved == [id(p) in members for p in parameters]


def test_embeddings_are_no_matrices() -> None:
    matrix = nn.Parameter(torch.zeros(2, 3))
    assert is_matrix("transformer.resblocks.0.mlp.c_fc.weight", matrix)
    assert not is_matrix("token_embedding.weight", matrix)
    assert not is_matrix("visual.conv1.weight", nn.Parameter(torch.zeros(2, 3, 1, 1)))
    assert not is_matrix("ln.weight", nn.Parameter(torch.zeros(2)))


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        both(weights()).step(lambda: 0)
