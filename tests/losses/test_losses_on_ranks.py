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

from mulki.losses import ClipLoss, DistillClipLoss, SigLipLoss
from mulki.ops import loader
from tests.losses.two_towers import OURS, TwoTowers, batch, extra, gradients, truth
from tests.ranks import run_ranks

EVEN = {1: [5], 2: [4, 4], 3: [3, 3, 3], 4: [2, 2, 2, 2]}
UNEVEN = {1: [5], 2: [5, 2], 3: [3, 1, 4], 4: [2, 0, 3, 1]}

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


def own(tensor: Tensor, sizes: list[int], rank: int) -> Tensor:
    return tensor.split(sizes)[rank]


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
        cases = [(*case, UNEVEN[world]) for case in CASES]
        # Even batches: a local loss needs no other value then, and blocks of the ring are alike.
        cases += [(*case, EVEN[world]) for case in CASES[2:6]]
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
    return [kind for kind, _ in CASES]


def check_kernels(rank: int, world: int) -> None:
    """The same in float32, which C++ kernels serve."""
    sizes = UNEVEN[world]
    for kind in OURS:
        _, want = truth(kind, sum(sizes))
        _, got = on_a_rank(kind, {}, sizes, rank, torch.float32)
        for name, gradient in got.items():
            gap = (gradient.double() - want[name]).norm()
            assert gap <= 1e-5 * want[name].norm() + 1e-6, f"{kind} {name} on rank {rank}"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gradients_are_those_of_one_process(world):
    assert run_ranks(world, check_equality) == [[kind for kind, _ in CASES]] * world


def refused(rank: int, world: int, call) -> tuple[str, str]:
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def disagree(rank: int, world: int) -> dict[str, tuple[str, str]]:
    """Each case differs on the last rank alone."""
    last = rank == world - 1
    images, texts = batch(3)
    out = TwoTowers()(images.float(), texts.float())
    del out["logit_bias"]
    plain = {name: v.detach() for name, v in out.items()}
    narrow = plain | {n: v[:, :4] for n, v in plain.items() if v.ndim == 2}
    half = plain | {n: v.bfloat16() for n, v in plain.items() if v.ndim == 2}
    unpaired = plain | {"text_features": plain["text_features"][:2]}
    distill = plain | extra("distill", images.float(), texts.float())
    untaught = distill | {"dist_image_features": None}
    cases = {
        "width": lambda: ClipLoss()(**(narrow if last else plain)),
        "dtype": lambda: ClipLoss()(**(half if last else plain)),
        "grad": lambda: ClipLoss()(**(plain if last else out)),
        "pairs": lambda: ClipLoss()(**(unpaired if last else plain)),
        "rank": lambda: ClipLoss(rank=0 if last else rank, world_size=world)(**plain),
        "world": lambda: ClipLoss(rank=rank, world_size=7)(**plain),
        "impl": lambda: SigLipLoss(dist_impl="shift" if last else None)(**plain, logit_bias=None),
        "loss": lambda: SigLipLoss()(**plain, logit_bias=None) if last else ClipLoss()(**plain),
        "teacher": lambda: DistillClipLoss()(**(untaught if last else distill)),
        "none": lambda: ClipLoss()(**{n: v[:0] if v.ndim else v for n, v in plain.items()}),
    }
    said = {name: refused(rank, world, call) for name, call in cases.items()}
    ClipLoss()(**plain)  # and the group still works
    return said


def test_ranks_that_disagree_all_raise_the_same():
    said = run_ranks(3, disagree)
    assert said[0] == said[1] == said[2]
    kinds = {name: kind for name, (kind, _) in said[0].items()}
    types = ("dtype", "teacher")
    assert kinds == {name: "TypeError" if name in types else "ValueError" for name in kinds}
    messages = {name: message for name, (_, message) in said[0].items()}
    assert messages["width"] == (
        "image_features width: got 5 on ranks 0, 1, 4 on rank 2, wanted the same on all ranks"
    )
    assert messages["dtype"].startswith("image_features dtype: got float32 on ranks 0, 1, bfloat16")
    assert "require grad: got yy on ranks 0, 1, nn on rank 2" in messages["grad"]
    assert messages["pairs"].startswith("on rank 2: text_features: got shape [2, 5]")
    assert messages["rank"].startswith("on rank 2: rank: got 0, but the process group has rank 2")
    assert "world_size: got 7, but the process group has world_size 3" in messages["world"]
    assert "dist_impl: got bidir on ranks 0, 1, shift on rank 2" in messages["impl"]
    assert "loss: got ClipLoss on ranks 0, 1, SigLipLoss on rank 2" in messages["loss"]
    assert messages["teacher"].startswith("on rank 2: dist_image_features: got NoneType")
    assert "no rows on any rank" in messages["none"]


def flags_warned_of(rank: int, world: int) -> dict[str, list[str]]:
    images, texts = batch(3)
    out = TwoTowers().double()(images, texts)
    del out["logit_bias"]
    said = {}
    for name, flags in {
        "copied": {"rank": rank, "world_size": world},
        "local": {"local_loss": True},
        "gathered": {"local_loss": True, "gather_with_grad": True, "rank": rank},
        "plain": {},
    }.items():
        loss = ClipLoss(**flags)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                loss(**out)
        said[name] = [str(w.message) for w in caught]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alone = {n: v[: 1 - rank] if v.ndim else v for n, v in out.items()}
        ClipLoss()(**alone)
    said["one pair"] = [str(w.message) for w in caught]
    return said


def test_flags_that_open_clip_would_be_biased_by_are_warned_of_once():
    first, second = run_ranks(2, flags_warned_of)
    assert not any(second.values())  # one rank says it for all
    assert [len(first[name]) for name in ("copied", "local", "gathered", "plain")] == [1, 1, 0, 0]
    assert "1/2 as large" in first["copied"][0] and "biased" in first["local"][0]
    (one,) = first["one pair"]
    assert "a batch of one pair" in one


def helpers(rank: int, world: int) -> None:
    sizes = UNEVEN[world]
    images, texts = batch(sum(sizes))
    whole = TwoTowers().double()(images, texts)
    z = whole["logit_scale"] * whole["image_features"] @ whole["text_features"].T
    for local in (False, True):
        loss = ClipLoss(local_loss=local, gather_with_grad=True)
        model = TwoTowers().double()
        ddp = DistributedDataParallel(model)
        out = ddp(own(images, sizes, rank), own(texts, sizes, rank))
        bias = out.pop("logit_bias")
        per_image, per_text = loss.get_logits(**out, logit_bias=bias)
        labels = loss.get_ground_truth(images.device, len(per_image))
        want = (z + bias, z.T + bias)
        if local:
            want = tuple(own(one, sizes, rank) for one in want)
        torch.testing.assert_close((per_image, per_text), want)
        start = sum(sizes[:rank]) if local else 0
        assert labels.tolist() == list(range(start, start + len(per_image)))
        # A loss of one's own on the matrix: what all ranks compute, or each for its rows.
        share = world / sum(sizes)
        picked = per_image.log_softmax(1).gather(1, labels.unsqueeze(1)).sum() * share
        (-picked / (1 if local else world)).backward()
        got = gradients(model)
        reference = TwoTowers().double()
        of_all = reference(images, texts)
        logits = of_all["logit_scale"] * of_all["image_features"] @ of_all["text_features"].T
        (-logits.log_softmax(1).diagonal().mean() + 0 * of_all["logit_bias"]).backward()
        for name, gradient in gradients(reference).items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_logits_of_all_ranks():
    run_ranks(3, helpers)


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
