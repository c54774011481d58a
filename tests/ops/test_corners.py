"""Where kernels go wrong that are right on ordinary inputs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.op_cases import (
    ALL,
    NAMES,
    Case,
    asking,
    cross_entropy,
    expected,
    make,
    relative,
    run,
    upstream,
    with_argument,
)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_an_excluded_class_holds_does_not_matter(bad, backend):
    for name in ("ce_all", "kl_label", "kl_weights"):
        case = make(name, n=6, p=8, d=5, dtype=torch.float32)
        want = run(case)[0]
        for w in (case.args[1], *(case.args[4] if case.op == "teacher_kl" else ())):
            w[1] = bad  # class 1 is masked
        assert torch.equal(run(case)[0], want)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_an_upstream_gradient_that_is_not_finite_stays_with_its_row(bad, place, backend):
    case = make("ce", n=6, p=7, d=5, dtype=torch.float32)
    backward = asking(case, "backward", ALL)
    _, dx, _, _ = run(backward)
    grad = upstream(case)
    grad[place] = bad
    _, spoilt, dw, _ = run(with_argument(backward, 7, grad))
    others = torch.arange(6) != place
    assert not spoilt[place].isfinite().any() and not dw.isfinite().all()
    torch.testing.assert_close(spoilt[others], dx[others], rtol=1e-5, atol=1e-6)


def test_totals_beyond_the_largest_float_are_infinite(backend):
    """A loss, and the gradient of a scale, whose rows are finite."""
    x, w = torch.full((3, 2), 1e30), torch.tensor([[1e8, 0.0], [-1e8, 0.0]])
    case = cross_entropy(x, w, [1, 1, 1], scale=1.0)
    assert run(case)[0].isfinite().all()
    total, _, _, dscale = run(asking(case, "reduced", ALL, mean=False))
    assert total == math.inf and dscale == math.inf


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say")
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize(
    "name", ["cosines", "ce_all", "kl_blend", "pairs_label", "contrastive", "siglip"]
)
def test_thousands_of_calls_leave_nothing_behind(name, backend):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    case = make(name, n=6, p=8, d=5, dtype=torch.float32)
    backward = asking(case, "backward", [True] * case.leaves)
    for number in range(6_000):
        if number == 1000:
            before = resident()
        run(case)
        run(backward)
    # A tensor that stays of each call would be some 2.5 MB.
    assert resident() - before < 2**20


@pytest.mark.parametrize("name", NAMES)
def test_features_without_a_dimension(name, backend):
    case = make(name, n=4, p=5, d=1, dtype=torch.float32)
    x, w, scale, *rest = case.args
    if case.op in ("teacher_kl", "pair_kl"):
        rest[:2] = [[u[:, :0] for u in rest[0]], [v[:, :0] for v in rest[1]]]
    case = Case(case.op, (x[:, :0], w[:, :0], scale, *rest))
    torch.testing.assert_close(run(case)[0], expected(case)[0].float(), rtol=1e-5, atol=1e-6)
    gradients = run(asking(case, "backward"))[-case.leaves :]
    assert [g.shape for g in gradients] == [leaf.shape for leaf in case.args[: case.leaves]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_onednn(dtype, backend):
    case = make("kl_label", n=20, p=33, d=24, dtype=dtype, scale=20.0)
    with_it = run(asking(case, "reduced", ALL))
    with torch.backends.mkldnn.flags(enabled=False):
        without = run(asking(case, "reduced", ALL))
    for one, other in zip(with_it, without, strict=True):
        assert relative(other, one.double()) < 1e-2 if one.norm() else other.eq(0).all()
    assert run(case)[0].isfinite().all()


@pytest.mark.parametrize("classes", [(0, 40), (130, 250), (390, 400)])
@pytest.mark.parametrize("name", ["ce_all", "kl_label"])
def test_the_classes_of_one_task_alone(name, classes, backend):
    """They are next to each other, so that whole tiles of columns have none of them."""
    low, high = classes
    case = make(name, n=70, p=400, d=9, dtype=torch.float32)
    mask = (torch.arange(400) >= low) & (torch.arange(400) < high)
    place = next(
        i for i, a in enumerate(case.args) if isinstance(a, Tensor) and a.dtype == mask.dtype
    )
    args = list(case.args)
    target = args[place - 1]
    args[place - 1 : place + 1] = torch.where(target < 0, target, low + target % (high - low)), mask
    case = Case(case.op, tuple(args))
    value, gradients = expected(case, True)
    total, *rest = run(asking(case, "reduced", ALL))
    for one, want in zip((total, *rest[-3:]), (value, *gradients), strict=True):
        assert relative(one, want) < 1e-5
    assert rest[-2][~mask].eq(0).all()


SMALL_STACK = """
import threading, torch
from mulki import Similarity, functional as M

def backward():
    x, w = (torch.randn(300, 512, requires_grad=True) for _ in "xw")
    student, teacher = Similarity(x, w, 2.0), Similarity(x.detach(), w.detach(), 3.0)
    M.prototype_cross_entropy(student, torch.arange(300)).backward()
    M.teacher_kl(student, [teacher]).backward()
    M.clip_contrastive(x, w, 2.0).backward()
    M.siglip(x, w, 2.0, -1.0).backward()
    M.prototype_similarity(x, w, 2.0, normalize=True).square().sum().backward()
    print("done")

threading.stack_size(192 << 10)
thread = threading.Thread(target=backward)
thread.start()
thread.join()
"""


def test_a_thread_may_have_a_small_stack():
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STACK], capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", (done.returncode, done.stderr)
