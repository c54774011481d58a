"""On any number of ranks, gradients under DDP are those of one process with the whole batch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mulki.ops import loader
from tests.losses.two_towers import OURS, UNEVEN, TwoTowers, batch, extra, gradients, own, truth
from tests.ranks import run_ranks

EVEN = {1: [5], 2: [4, 4], 3: [3, 3, 3], 4: [2, 2, 2, 2]}

FLAGS = [{"local_loss": a, "gather_with_grad": b} for a in (False, True) for b in (False, True)]
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("clip", flags) for flags in FLAGS),
    *(("siglip", {"dist_impl": how}) for how in ("bidir", "shift", "gather", "reduce")),
    *(("distill", flags) for flags in FLAGS),
    ("distill", {"temperature": 2.5}),
    *(
        ("dual", {"gate": gate, "local_loss": gate == "label"})
        for gate in ("uniform", "confidence", "label", "discrepancy")
    ),
]


def cases_of(world: int) -> list[tuple[str, dict[str, Any]]]:
    """With four ranks those whose ring differs then; the others gather."""
    return [case for case in CASES if world < 4 or case[0] == "siglip"]


def on_a_rank(
    kind: str, options: dict[str, Any], sizes: list[int], rank: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The values of the losses on this rank, and the gradients of parameters after DDP."""
    images, texts = batch(sum(sizes), dtype)
    teachers = extra(kind, images, texts, options.get("gate", ""))
    model = TwoTowers().to(dtype)
    ddp = DistributedDataParallel(model)
    out = ddp(own(images, sizes, rank), own(texts, sizes, rank))
    out |= {name: own(v, sizes, rank) if v.ndim == 2 else v for name, v in teachers.items()}
    losses = OURS[kind](rank=rank, world_size=len(sizes), **options)(**out, output_dict=True)
    sum(losses.values()).backward()
    return {name: v.detach() for name, v in losses.items()}, gradients(model)


def check_equality(rank: int, world: int) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = cases_of(world)
        cases = [(*case, UNEVEN[world]) for case in chosen]
        # Even batches: a local loss needs no other value then, and blocks of the ring are alike.
        cases += [(*case, EVEN[world]) for case in CASES[2:6] if case in chosen]
        for kind, options, sizes in cases:
            where = f"{kind} {options} {sizes} on rank {rank}"
            rows, want = truth(kind, sum(sizes), **options)
            values, got = on_a_rank(kind, options, sizes, rank, torch.float64)
            for name, value in values.items():
                mine = rows[name]
                if kind == "siglip" or options.get("local_loss"):
                    mine = own(mine, sizes, rank)
                mean = mine.mean() if len(mine) else torch.zeros((), dtype=torch.float64)
                torch.testing.assert_close(value, mean, rtol=1e-11, atol=1e-12, msg=where)
            for name, gradient in got.items():
                assert (gradient - want[name]).norm() <= 1e-10 * want[name].norm() + 1e-13, (
                    f"{where}: {name}"
                )
        if loader.load() is None:
            check_kernels(rank, world)
    return [kind for kind, _ in chosen]


def check_kernels(rank: int, world: int) -> None:
    """The same in float32, which C++ kernels serve."""
    sizes = UNEVEN[world]
    for kind in dict.fromkeys(kind for kind, _ in cases_of(world)):
        _, want = truth(kind, sum(sizes))
        _, got = on_a_rank(kind, {}, sizes, rank, torch.float32)
        for name, gradient in got.items():
            gap = (gradient.double() - want[name]).norm()
            assert gap <= 1e-5 * want[name].norm() + 1e-6, f"{kind} {name} on rank {rank}"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gradients_are_those_of_one_process(world):
    assert run_ranks(world, check_equality) == [[kind for kind, _ in cases_of(world)]] * world


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *found])
        return result


def largest_tensors(rank: int, world: int, n: int) -> dict[str, int]:
    images, texts = batch(n, torch.float32)
    found = {}
    for kind, options in (
        ("clip", {}),
        ("clip", {"local_loss": True}),
        ("siglip", {}),
        ("siglip", {"dist_impl": "gather"}),
        ("distill", {}),
        ("dual", {}),
    ):
        out = TwoTowers()(images, texts) | extra(kind, images, texts)
        with warnings.catch_warnings(), Largest() as largest:
            warnings.simplefilter("ignore")
            sum(OURS[kind](**options)(**out, output_dict=True).values()).backward()
        found[f"{kind} {options}"] = largest.numel
    return found


@pytest.mark.skipif(loader.load() is not None, reason="the reference stores logits, by design")
def test_no_rank_makes_a_matrix_of_logits():
    n, world, width = 600, 2, 7
    for found in run_ranks(world, largest_tensors, n):
        for case, numel in found.items():
            assert numel <= world * n * width, case  # n * n is 360,000
