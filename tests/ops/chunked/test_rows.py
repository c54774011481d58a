"""Losses over the softmax of rows, a block at a time."""

from __future__ import annotations

import math

import pytest
import torch

from mulki.ops import chunked
from mulki.ops.operators import OPERATORS
from tests.ops.chunked.conftest import CUT
from tests.ops.chunked.cut import right
from tests.ops.chunked.watch import MIB, TEACHERS, computed, on_meta
from tests.ops.op_cases import Case, asking, make, run


@pytest.mark.parametrize(
    "name",
    ["ce", "ce_smooth", "ce_all", "kl", "kl_label", "kl_confidence", "kl_blend", "kl_weights"],
)
def test_cut_in_rows_and_columns(name, cut_small):
    right(name)


def of_itself(name: str) -> Case:
    """A student that is its teachers."""
    case = make(name, n=19, p=23, d=16, dtype=torch.float32)
    x, w, scale = case.args[:3]
    same = [x, x], [w, w], [scale, scale]
    return asking(Case(case.op, (x, w, scale, *same, *case.args[6:])), "reduced")


@pytest.mark.parametrize("name", ["kl", "kl_label", "pairs_label"])
def test_a_student_that_is_its_teachers_has_no_loss_and_no_gradient(name, cut_small):
    """Exactly where rows have all their columns; else but for the rounding of sums of parts."""
    loss, *_, of_x, of_w, of_scale = run(of_itself(name))
    bound = 0 if cut_small == max(CUT) and name != "pairs_label" else 1e-5
    for found in (loss, of_x, of_w, of_scale):
        assert found.abs().max() <= bound


def test_calls_of_a_block_are_few():
    """At most 14 beside the products, by how many one block more takes."""
    for name in ("kl", "ce"):
        rows = 48 * MIB // (4 * 2 * (TEACHERS[name] + 1)) // 1000
        counts = []
        for count in (3, 4):
            watch = computed(on_meta(name, rows * count, 1000, torch.float32))
            counts.append(len(watch.names) - watch.products)
        assert 0 < counts[1] - counts[0] <= 14


@pytest.mark.parametrize("name", ["similarity", "cosines"])
def test_few_rows_of_a_matrix_do_not_cut_the_gradient_of_many_prototypes(name):
    case = asking(make(name, n=1, p=10_000, dtype=torch.float32), "backward")
    assert len(computed(case).names) < 100


def test_a_target_that_is_no_class_is_refused_where_columns_are_cut(cut_small):
    """As on a GPU, where targets are not checked before."""
    operator = OPERATORS["prototype_cross_entropy"]
    for wrong in (1234, -5):
        x, w, scale = make("ce", n=4, p=900, d=3, dtype=torch.float32).args[:3]
        args = x, w, scale, torch.tensor([0, 1, 2, wrong]), None, 0.0, -100
        with pytest.raises(RuntimeError, match="out of bounds"):
            chunked.run(operator, *operator.split((*args, None, "mean", [True] * 3)))


def test_an_ignored_row_has_no_gradient_whatever_it_holds():
    case = make("ce", dtype=torch.float32)
    x, w, scale, target, *rest = case.args
    x = x.clone()
    x[0], target = math.nan, target.clone()
    target[0] = rest[-1]
    grad = torch.ones(6)
    grad[0] = math.inf
    of_x, of_w, of_scale = run(
        Case(case.op, (x, w, scale, target, *rest, grad, "none", [True] * 3))
    )[-3:]
    assert of_x[0].count_nonzero() == 0
    assert all(one.isfinite().all() for one in (of_x, of_w, of_scale))
