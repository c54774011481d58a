"""The table of docs/open-clip.md: gradients of open_clip's ClipLoss and of ours on ranks."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mulki.losses import ClipLoss
from tests.ranks import run_ranks

PAIRS = 12  # divides by the numbers of ranks
FLAGS = [(False, False), (False, True), (True, True), (True, False)]


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight of the towers, the logarithm of the scale, and pairs of inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.tensor(2.0, dtype=torch.float64)
    weight, images, texts = draw(8, 8), draw(PAIRS, 8), draw(PAIRS, 8)
    return weight.requires_grad_(), scale.requires_grad_(), images, texts


def gradients(rank: int, world: int, ours: bool, flags: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Of weight and scale, averaged over the ranks as DDP does it."""
    weight, scale, images, texts = inputs()
    rows = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    local_loss, gather_with_grad = flags
    cls = ClipLoss if ours else open_clip.ClipLoss
    loss = cls(local_loss, gather_with_grad, rank=rank, world_size=world)
    towers = (F.normalize(part[rows] @ weight, dim=1) for part in (images, texts))
    loss(*towers, scale.exp()).backward()
    found = []
    for leaf in (weight, scale):
        assert leaf.grad is not None
        if world > 1:
            dist.all_reduce(leaf.grad)
        found.append(leaf.grad / world)
    return found[0], found[1]


def all_gradients(rank: int, world: int) -> dict[tuple[bool, bool], list[tuple[Tensor, Tensor]]]:
    """By flags: open_clip's and ours."""
    return {f: [gradients(rank, world, ours, f) for ours in (False, True)] for f in FLAGS}


@pytest.mark.filterwarnings("ignore:ClipLoss")
@pytest.mark.parametrize("world", [2, 3])
def test_the_gradients_are_those_of_the_table(world: int) -> None:
    right, of_scale = gradients(0, 1, True, (False, False))
    for flags, (theirs, ours) in run_ranks(world, all_gradients)[0].items():
        (gradient, scale), factor = theirs, 1 / world if flags == (False, False) else 1.0
        if flags == (True, False):
            assert F.cosine_similarity(gradient.flatten(), right.flatten(), dim=0) < 0.999
        else:
            torch.testing.assert_close(gradient, factor * right)
        torch.testing.assert_close(scale, of_scale)
        torch.testing.assert_close(ours, (right, of_scale))
