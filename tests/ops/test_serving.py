"""Operators gathered by who serves them."""

from __future__ import annotations

import torch

from mulki.ops import proofs
from mulki.ops.backends import Served
from mulki.ops.serving import Group, grouped

SLOW = {"triton": "is slower"}


def on_gpu(op: str, dtype: torch.dtype, backends: str) -> list[Served]:
    """At every size in order: triton for t, the reference for r."""
    return [
        Served(op, "cuda", dtype, *(("triton", {}) if b == "t" else ("reference", SLOW)), size)
        for b, size in zip(backends, proofs.SIZES, strict=True)
    ]


def test_sizes_are_named_where_backends_differ_by_size() -> None:
    served = on_gpu("siglip", torch.float32, "ttr") + on_gpu("contrastive", torch.float32, "ttr")
    some, large = grouped(served)
    assert some == Group(
        "cuda", ("float32",), ("small", "medium"), "triton", (), ("siglip", "contrastive")
    )
    assert some.where == "cuda, float32, small and medium sizes" and some.reasons == ""
    assert large.sizes == ("large",) and large.reasons == "triton: is slower"


def test_equal_sizes_and_dtypes_are_one_group() -> None:
    served = on_gpu("siglip", torch.float32, "ttt") + on_gpu("siglip", torch.bfloat16, "ttt")
    (group,) = grouped(served)
    assert group.where == "cuda, float32 and bfloat16" and group.ops == ("siglip",)


def test_all_sizes_at_once_are_all_sizes() -> None:
    (group,) = grouped([Served("siglip", "cpu", torch.float32, "cpp", {})])
    assert group.sizes == () and group.where == "cpu, float32"
