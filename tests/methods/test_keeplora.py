from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mulki.methods.base import AdaptedWeight, TaskStart
from mulki.methods.keeplora import (
    KeepLoRA,
    layer_scales,
    missing_directions,
    principal_directions,
)

NAME = "visual.blocks.0.weight"
RANK, WIDE = 2, 6


def made(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


def adapted(weight: Tensor) -> AdaptedWeight:
    return AdaptedWeight(weight, torch.zeros(RANK, weight.shape[1]), torch.zeros(len(weight), RANK))


def start(method: KeepLoRA, given: dict[str, AdaptedWeight], gradient: Tensor | None) -> None:
    gradients = None if gradient is None else dict.fromkeys(given, gradient.float())
    method.start_task(TaskStart(0, 3, 4, {}, None, given, gradients))


def directions_of(rows: Tensor, energy: float, of: Tensor) -> Tensor:
    """The fewest right singular vectors of `rows` with a share of the squared length of `of`."""
    _, values, vectors = torch.linalg.svd(rows)
    lengths = values.square().cumsum(0)
    wanted = energy * of.square().sum() - (of.square().sum() - rows.square().sum())
    return vectors[: int((lengths < wanted).sum()) + 1 if wanted > 0 else 0].mT


@pytest.mark.parametrize("name", [NAME, "transformer.resblocks.0.mlp.c_fc.weight"])
def test_directions_are_those_of_the_formula(name: str) -> None:
    """Over two tasks, against singular values of W and of the inputs in float64."""
    method = KeepLoRA(KeepLoRA.Options(energy_tasks=0.6))
    weight, gradient = made(5, WIDE, 1), made(5, WIDE, 2)
    energy = 0.85 if name.startswith("visual.") else 0.2
    principal = held = directions_of(weight, energy, weight)
    for number in range(2):
        each = adapted(weight)
        start(method, {name: each}, gradient)
        projector = torch.eye(WIDE).double() - held @ held.mT
        wanted = torch.linalg.svd(gradient @ projector).Vh[:RANK]
        free = WIDE - held.shape[1]
        # The sign of a singular vector is free, and the method computes in float32.
        size = (each.a.double() @ wanted.mT).abs()
        same = torch.eye(RANK).double() * (torch.arange(RANK) < free)
        torch.testing.assert_close(size, same, atol=1e-5, rtol=0)
        assert (each.a.double() @ held).abs().max() < 1e-6
        inputs = made(40, WIDE, 3 + number) @ torch.diag(torch.linspace(3, 0.1, WIDE).double())
        method.keep_moments({name: (inputs.mT @ inputs).float()})
        method.end_task()
        held = torch.cat([held, directions_of(inputs @ projector, 0.6, inputs)], dim=1)
    assert method.kept()[name].shape[1] == held.shape[1] - principal.shape[1] > 0


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_b_from_zero_makes_the_steps_of_b_from_the_gradient(decay: float) -> None:
    """Theirs: B from S V^T of the projected gradient, and that product taken off W."""
    weight, each = made(5, WIDE), adapted(made(5, WIDE))
    gradient, inputs, wanted = made(5, WIDE, 2), made(20, WIDE, 3), made(20, 5, 4)
    start(KeepLoRA(KeepLoRA.Options(energy_image=0.3)), {NAME: each}, gradient)
    a = each.a.double()
    after = []
    for first in (torch.zeros(5, RANK).double(), gradient @ a.mT):
        base, b = weight - first @ a, first.clone().requires_grad_()
        optimizer = torch.optim.AdamW([b], lr=0.05, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            (inputs @ (base + b @ a).mT - wanted).square().mean().backward()
            optimizer.step()
        after.append((base + b @ a).detach())
    assert torch.allclose(*after) == (decay == 0)


def test_a_task_that_goes_on_keeps_its_directions() -> None:
    each = adapted(made(5, WIDE))
    each.a.fill_(0.5)
    start(KeepLoRA(KeepLoRA.Options()), {NAME: each}, None)
    assert (each.a == 0.5).all()


def test_where_all_is_held_nothing_moves(caplog: pytest.LogCaptureFixture) -> None:
    each = adapted(made(WIDE, WIDE))
    start(KeepLoRA(KeepLoRA.Options(energy_image=1.0)), {NAME: each}, made(WIDE, WIDE, 5))
    assert not each.a.any()
    assert f"1 of 1 weights may change, such as {NAME}" in caplog.text


def test_weights_of_half_precision_move() -> None:
    each = adapted(made(8, 200).bfloat16())
    start(KeepLoRA(KeepLoRA.Options()), {NAME: each}, made(8, 200, 5))
    assert each.a.norm(dim=1).tolist() == pytest.approx([1.0] * RANK, abs=1e-4)


def test_earlier_tasks_stay_held_where_more_of_the_weight_is() -> None:
    """In a run that goes on with another share of its energy."""
    weight, inputs = made(WIDE, WIDE), made(2, WIDE, 1).float()
    before, after = (KeepLoRA(KeepLoRA.Options(energy_image=share)) for share in (0.3, 0.8))
    start(before, {NAME: adapted(weight)}, None)
    before.keep_moments({NAME: inputs.mT @ inputs})
    after.take_kept(before.kept())
    each = adapted(weight)
    start(after, {NAME: each}, made(WIDE, WIDE, 2))
    held = torch.cat([principal_directions(weight.float(), 0.8), before.kept()[NAME]], dim=1)
    assert each.a.any()
    assert (each.a @ held).abs().max() < 1e-5


def test_directions_of_tasks_grow_by_what_is_missing() -> None:
    method = KeepLoRA(KeepLoRA.Options(energy_image=0.0))
    start(method, {NAME: adapted(made(5, WIDE))}, None)
    first, second = torch.zeros(WIDE, WIDE), torch.zeros(WIDE, WIDE)
    first[0, 0], first[1, 1] = 10.0, 0.05
    second[0, 0], second[2, 2] = 10.0, 1.0
    for moments, count in ((first, 1), (second, 2), (second, 2), (0 * second, 2)):
        method.keep_moments({NAME: moments})
        assert method.kept()[NAME].shape == (WIDE, count)
        start(method, {NAME: adapted(made(5, WIDE))}, None)
    torch.testing.assert_close(method.kept()[NAME].abs(), torch.eye(WIDE)[:, [0, 2]])


def test_energy_is_a_share() -> None:
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).sqrt())
    moments, nothing = weight.square(), torch.zeros(4, 0)
    for share, count in ((0, 0), (0.3, 1), (0.6, 2), (0.75, 3), (1, 4)):
        assert principal_directions(weight, share).shape == (4, count)
        assert missing_directions(moments, nothing, share).shape == (4, count)
    # One large direction and many small ones, which have 0.3 percent together.
    spectrum = torch.diag(torch.cat([torch.ones(1), torch.full((255,), 1e-5)]))
    assert 100 < missing_directions(spectrum, torch.zeros(256, 0), 0.9985).shape[1] < 150
    # Of inputs along four directions no more are held, whatever rounding adds.
    inputs = made(4, 64).float()
    assert missing_directions(inputs.mT @ inputs, torch.zeros(64, 0), 1.0).shape == (64, 4)


def test_the_first_weights_of_a_tower_change_less() -> None:
    names = ["visual.0", "visual.1", "visual.2", "text.0", "text.1"]
    assert layer_scales(names, 0.2) == pytest.approx(
        {"visual.0": 0.2, "visual.1": 0.6, "visual.2": 1.0, "text.0": 0.2, "text.1": 1.0}
    )
    given = {f"visual.{place}": adapted(made(5, WIDE)) for place in range(3)}
    start(KeepLoRA(KeepLoRA.Options(layer_scale=0.2)), given, made(5, WIDE, 2))
    sizes = [each.a.norm(dim=1).tolist() for each in given.values()]
    assert sizes == [pytest.approx([size] * RANK) for size in (0.2, 0.6, 1.0)]
