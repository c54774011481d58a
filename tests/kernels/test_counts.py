"""What the kernels launch and allocate for a call, recorded without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels.recorded import Launch, Operation, arguments_of, recorded
from mulki.kernels.lookup import kernel
from mulki.ops.operators import OPERATORS, Request

N, D = 256, 512
ROWS = ("teacher_kl", "prototype_cross_entropy", "siglip")
BLOCK = 64 << 20


def steps_of(op: str, p: int, gradients: bool, dtype: torch.dtype = torch.bfloat16, n: int = N):
    x = arguments_of(op, n, p, D, dtype)
    reduction = "none" if op == "similarity" else "mean"
    request = Request(None, reduction, [gradients] * OPERATORS[op].leaves)
    return recorded(lambda: kernel(op)(x, request))


def launches(steps: list[Any]) -> list[str]:
    return [step.kernel.__name__ for step in steps if isinstance(step, Launch)]


def products(steps: list[Any]) -> int:
    return sum(isinstance(step, Operation) and step.is_product for step in steps)


def largest(steps: list[Any]) -> int:
    """Bytes of the largest tensor that was made."""
    made = [t for step in steps if isinstance(step, Operation) for t in step.written]
    return max(t.untyped_storage().nbytes() for t in made)


@pytest.mark.parametrize("p", [100, 1000, 8192])
@pytest.mark.parametrize("op", ROWS)
def test_a_loss_is_one_launch_and_stores_no_logits(op, p):
    steps = steps_of(op, p, gradients=False)
    assert len(launches(steps)) == 1 and products(steps) == 0
    # A few numbers of each row.
    assert largest(steps) <= N * 3 * 8


@pytest.mark.parametrize("p", [100, 1000, 8192])
@pytest.mark.parametrize("op", ROWS)
def test_gradients_are_two_products_and_g_in_the_dtype_of_the_inputs(op, p):
    steps = steps_of(op, p, gradients=True)
    assert len(launches(steps)) == 1 and products(steps) == 2
    g, of_x, of_w = N * -(-p // 16) * 16, N * D, p * D
    assert largest(steps) == 2 * max(g, of_x, of_w)


@pytest.mark.parametrize("op", ["teacher_kl", "siglip"])
def test_g_of_many_rows_is_written_in_blocks(op):
    n, p = 16384, 8192
    steps = steps_of(op, p, gradients=True, n=n)
    blocks = -(-2 * n * p // BLOCK)
    assert len(launches(steps)) == blocks and products(steps) == 2 * blocks
    assert largest(steps) <= BLOCK


def test_a_similarity_is_one_launch():
    steps = steps_of("similarity", 1000, gradients=False)
    assert launches(steps) == ["similarity_tiles"] and products(steps) == 0
    assert largest(steps) == 2 * N * 1000


@pytest.mark.parametrize(("op", "models"), [("contrastive", 1), ("pair_kl", 2)])
def test_pairs_store_logits_where_one_block_holds_them_and_else_nothing(op, models):
    small = steps_of(op, N, gradients=True)
    assert products(small) == models + 2
    large = steps_of(op, 16384, gradients=True, n=16384)
    assert largest(large) <= BLOCK
    # Logits are made by the kernels: two products for each block of G.
    assert products(large) == 2 * launches(large).count("pair_gradient")
    forward = steps_of(op, 16384, gradients=False, n=16384)
    assert products(forward) == 0 and largest(forward) <= BLOCK
