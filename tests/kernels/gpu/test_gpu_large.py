"""Tensors of more than 2^31 elements: an index of 32 bits would read and write somewhere else."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import Case
from tests.kernels.triton_helpers import backward, call, close

pytestmark = pytest.mark.gpu

D = 512
MANY = 2**31 // D + 1000
LAST = 600  # rows that are compared, all of them beyond 2^31 elements
TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def memory():
    free = torch.cuda.mem_get_info()[0]
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free memory, and {free >> 30} GiB are free")
    yield
    torch.cuda.empty_cache()


def unit(rows, width=D):
    generator = torch.Generator("cuda").manual_seed(rows)
    drawn = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    return drawn.normal_(generator=generator).mul_(width**-0.5)


def cross_entropy(x, w, scale, target):
    """Rows, dx and dw for an upstream gradient of one."""
    case = Case("prototype_cross_entropy", (x, w, scale, target, None, 0.0, -100))
    rows = call(case.op, *case.args)[0]
    grad = torch.ones(x.shape[0], device="cuda")
    dx, dw, _ = backward(case, grad, [True, True, False])
    return rows, dx, dw


def test_many_rows():
    x, w, scale = unit(MANY), unit(8), torch.tensor(10.0, device="cuda")
    target = torch.arange(MANY, device="cuda") % 8
    rows, dx, dw = cross_entropy(x, w, scale, target)
    want, of_x, _ = cross_entropy(x[-LAST:].clone(), w, scale, target[-LAST:].clone())
    close(rows[-LAST:], want, 1e-4)
    close(dx[-LAST:], of_x, TOLERANCE)
    first, _, _ = cross_entropy(x[:LAST].clone(), w, scale, target[:LAST].clone())
    close(rows[:LAST], first, 1e-4)
    assert dw.isfinite().all()


def test_many_prototypes():
    n = 64
    x, w, scale = unit(n), unit(MANY), torch.tensor(10.0, device="cuda")
    target = MANY - 1 - torch.arange(n, device="cuda") % LAST
    rows, _, dw = cross_entropy(x, w, scale, target)
    z = torch.cat([10.0 * (x.double() @ part.double().T) for part in w.split(1 << 18)], dim=1)
    want = torch.nn.functional.cross_entropy(z, target, reduction="none")
    close(rows, want, 1e-4)
    g = z.softmax(dim=1)
    g[torch.arange(n, device="cuda"), target] -= 1
    close(dw[-LAST:], 10.0 * g[:, -LAST:].T @ x.double(), TOLERANCE)


def test_a_large_matrix():
    n, p, d = 65536 + 600, 32768, 32
    x, w, scale = unit(n, d), unit(p, d), torch.tensor(3.0, device="cuda")
    (z,) = call("similarity", x, w, scale, False)
    close(z[-LAST:], 3.0 * x[-LAST:].double() @ w.double().T, TOLERANCE)
