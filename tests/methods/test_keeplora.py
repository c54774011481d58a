from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mulki.methods.base import AdaptedWeight, TaskStart
from mulki.methods.keeplora import KeepLoRA, layer_scales, leading_directions

NAME = "visual.blocks.0.weight"
RANK, WIDE = 2, 6


def made(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


def adapted(weight: Tensor) -> AdaptedWeight:
    a = nn.Parameter(torch.zeros(RANK, weight.shape[1], dtype=torch.float64))
    b = nn.Parameter(torch.zeros(len(weight), RANK, dtype=torch.float64))
    return AdaptedWeight(weight, a, b)


def start(method: KeepLoRA, each: AdaptedWeight, gradient: Tensor | None, name: str = NAME) -> None:
    gradients = None if gradient is None else {name: gradient}
    method.start_task(TaskStart(0, 3, 4, {}, None, {name: each}, gradients))


def in_formula(weight: Tensor, gradient: Tensor, energy: float, of_tasks: Tensor) -> Tensor:
    """A as in the method's docstring, by singular values of W and a projector of both parts."""
    _, values, rows = torch.linalg.svd(weight)
    shares = values.square().cumsum(0) / values.square().sum()
    principal = rows[: int((shares < energy).sum()) + 1].mT
    held = torch.cat([principal, of_tasks], dim=1)
    projector = held @ torch.linalg.pinv(held)
    return torch.linalg.svd(gradient - gradient @ projector).Vh[:RANK]


@pytest.mark.parametrize("name", [NAME, "transformer.resblocks.0.mlp.c_fc.weight"])
def test_directions_are_those_of_the_formula(name: str) -> None:
    method = KeepLoRA(KeepLoRA.Options())
    weight, gradient = made(5, WIDE, 1), made(5, WIDE, 2)
    inputs = made(WIDE, 1, 3) @ made(1, 40, 4)  # all along one direction
    method.keep_moments({name: inputs @ inputs.mT})
    each = adapted(weight)
    start(method, each, gradient, name)
    of_task = inputs[:, :1] / inputs[:, :1].norm()
    energy = 0.85 if name.startswith("visual.") else 0.2
    wanted = in_formula(weight, gradient, energy, of_task)
    # The sign of a singular vector is free, and the method computes in float32.
    torch.testing.assert_close(
        (each.a @ wanted.mT).abs(), torch.eye(RANK).double(), atol=1e-5, rtol=0
    )
    assert (each.a @ of_task).abs().max() < 1e-6
    assert not each.a.requires_grad and each.b.requires_grad


def test_a_task_that_goes_on_keeps_its_directions() -> None:
    each = adapted(made(5, WIDE))
    with torch.no_grad():
        each.a.fill_(0.5)
    start(KeepLoRA(KeepLoRA.Options()), each, None)
    assert (each.a == 0.5).all() and not each.a.requires_grad


def test_where_all_is_held_nothing_moves() -> None:
    each = adapted(made(WIDE, WIDE))
    start(KeepLoRA(KeepLoRA.Options(energy_image=1.0)), each, made(WIDE, WIDE, 5))
    assert not each.a.any()


def test_directions_of_tasks_grow_by_what_is_missing() -> None:
    method = KeepLoRA(KeepLoRA.Options())
    first, second = torch.zeros(WIDE, WIDE), torch.zeros(WIDE, WIDE)
    first[0, 0], first[1, 1] = 10.0, 0.05
    second[0, 0], second[2, 2] = 10.0, 1.0
    method.keep_moments({NAME: first})
    assert method.kept()[NAME].shape == (WIDE, 1)  # 99.5 % of the energy
    method.keep_moments({NAME: second})
    basis = method.kept()[NAME]
    torch.testing.assert_close(basis.abs(), torch.eye(WIDE)[:, [0, 2]])
    method.keep_moments({NAME: second})
    assert method.kept()[NAME].shape == (WIDE, 2)
    method.keep_moments({NAME: torch.zeros(WIDE, WIDE)})  # inputs that were not seen
    assert method.kept()[NAME].shape == (WIDE, 2)


def test_energy_is_the_share_of_the_trace() -> None:
    moments = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    counts = [leading_directions(moments, share).shape[1] for share in (0, 0.3, 0.6, 0.75, 1)]
    assert counts == [0, 1, 2, 3, 4]


def test_the_first_weights_of_a_tower_change_less() -> None:
    names = ["visual.0", "visual.1", "visual.2", "text.0", "text.1"]
    assert layer_scales(names, 0.2) == pytest.approx(
        {"visual.0": 0.2, "visual.1": 0.6, "visual.2": 1.0, "text.0": 0.2, "text.1": 1.0}
    )
    each = adapted(made(5, WIDE))
    start(KeepLoRA(KeepLoRA.Options(layer_scale=0.5)), each, made(5, WIDE, 2))
    assert each.a.norm(dim=1).tolist() == pytest.approx([1.0] * RANK)  # the only one, and last
