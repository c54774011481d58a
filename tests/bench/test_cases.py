from __future__ import annotations

import pytest
import torch

from mulki.bench.cases import (
    GPU_GRID,
    MATRIX_ENTRIES,
    MODES,
    OPERATORS,
    PAIRED,
    Case,
    make_cases,
    parse_shape,
)
from tests.bench.bench_helpers import CASE


def test_shapes() -> None:
    assert parse_shape("64x100") == (64, 100, 512)
    assert parse_shape("4x3x2") == (4, 3, 2)
    own = make_cases(list(OPERATORS), None, ["float32"])
    assert {c.n for c in own if c.operator == "contrastive"} == {256, 512, 1024, 2048, 4096, 8192}
    assert {(1024, 1000, 512), (4096, 4096, 512)} < {
        (c.n, c.p, c.d) for c in own if c.operator == "dual_teacher_kl"
    }
    assert all(c.n == c.p for c in own if c.operator in PAIRED)
    quick = make_cases(list(OPERATORS), None, ["float32"], quick=True)
    assert {c.operator for c in quick} == set(OPERATORS) and len(quick) < len(own)


def test_least_work() -> None:
    product = 2 * 7 * 5 * 16
    assert [CASE.operations(mode) for mode in MODES] == [3 * product, 2 * product, 5 * product]
    similarity = Case("similarity", 7, 5, 16, "bfloat16")
    assert [similarity.operations(mode) for mode in MODES] == [product, 2 * product, 3 * product]

    x, w, _, teachers, target = CASE.inputs().arguments
    read = sum(t.nbytes for t in (x, w, target, *teachers[0][:2], *teachers[1][:2]))
    gradients = x.nbytes + w.nbytes
    assert CASE.least_bytes("forward") == read + 4
    assert CASE.least_bytes("both") == read + 4 + gradients
    x, w, _ = similarity.inputs().arguments
    read, matrix = x.nbytes + w.nbytes, 2 * 7 * 5
    assert similarity.least_bytes("forward") == read + matrix
    assert similarity.least_bytes("both") == 2 * read + 2 * matrix


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_are_the_same_at_every_call_and_exact_ones_are_rounded(operator: str) -> None:
    case = Case(operator, 4, 4, 8, "bfloat16")
    one, two, exact = case.inputs(), case.inputs(), case.inputs(torch.float64)
    for name, leaf in one.leaves.items():
        assert leaf.requires_grad and torch.equal(leaf, two.leaves[name])
        assert exact.leaves[name].dtype == torch.float64
        assert torch.equal(leaf.double(), exact.leaves[name])
    assert one.leaves["features"].dtype == torch.bfloat16
    if case.teachers:
        teachers = one.arguments[3]
        assert len(teachers) == case.teachers
        assert not any(t.requires_grad for teacher in teachers for t in teacher)


def test_the_grid_of_a_gpu_has_what_is_asked_for() -> None:
    made = make_cases(list(OPERATORS), None, ["bfloat16"], "cuda", by_shape=True)
    of = {name: [c for c in made if c.operator == name] for name in OPERATORS}
    assert {(c.n, c.p, c.d) for c in of["dual_teacher_kl"]} == set(GPU_GRID)
    assert all(c.n == c.p for name in PAIRED for c in of[name])
    assert max(c.n * c.p for c in of["similarity"]) <= MATRIX_ENTRIES
    # By shape: the first shapes of all operators, then the second ones.
    first = [(c.operator, c.shape) for c in made[: len(OPERATORS)]]
    assert [name for name, _ in first] == list(OPERATORS)
    assert dict(first)["dual_teacher_kl"] == "64x100x512"
