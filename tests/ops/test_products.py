"""The C++ kernels' ways to multiply, and the scratch that they take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from mulki import Similarity
from mulki.bench import call_cost
from mulki.bench.cases import Case
from mulki.bench.providers import PROVIDERS
from mulki.functional import dual_teacher_kl, prototype_similarity
from mulki.ops import loader, use_backend
from tests import python
from tests.ops.op_cases import LOSSES, NAMES, cross_entropy, expected, make, relative
from tests.ops.rounding import ours

MIB = 2**20
PARTS = 3 * 2**-16  # the relative error of a product of floats in two parts, at most


#: tests/ops/test_precision.py's test of every operator, in a process that has chosen otherwise.
EVERY_OPERATOR = """
import os
os.environ["MULKI_STRICT"] = "1"
from mulki.ops import use_backend
from tests.ops.op_cases import LOSSES, NAMES, make
from tests.ops.rounding import DTYPES, check
with use_backend("cpp"):
    for name in NAMES:
        for dtype in DTYPES:
            for mean in (None, True, False) if name in LOSSES else (None,):
                print(name, dtype, mean, flush=True)
                check(make(name, n=37, p=53, d=64, dtype=dtype, scale=30.0), mean)
"""


@pytest.fixture(autouse=True)
def cpp():
    if (reason := loader.load()) is not None:
        pytest.skip(reason)
    with use_backend("cpp"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("capability", loader.CAPABILITIES)
def test_every_build_is_as_precise(capability):
    if capability not in loader.cpu_capabilities():
        pytest.skip(f"this CPU has no {capability}")
    if capability == loader.capability():
        pytest.skip("all other tests run this build")
    if capability not in loader.built(loader.PACKAGE):
        # CI builds all.
        assert os.environ.get("MULKI_BUILD_CAPABILITIES") != "all"
        pytest.skip(f"not built for {capability}: MULKI_BUILD_CAPABILITIES=all builds it")
    # The choice is made once per process.
    python("-c", EVERY_OPERATOR, ATEN_CPU_CAPABILITY=capability.lower())


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_bfloat16_where_onednn_does_not_multiply_it(instructions):
    python("-c", EVERY_OPERATOR, ONEDNN_MAX_CPU_ISA=instructions)


def test_small_elements_of_a_row_keep_their_digits():
    # Sums to which the largest element of a row adds nothing.
    torch.manual_seed(0)
    x, w = torch.randn(40, 96), torch.randn(70, 96)
    x[:, 0], w[:, 0] = 1e6, 0.0
    got = prototype_similarity(x, w, normalize=False).double()
    x, w = x[:, 1:].double(), w[:, 1:].double()
    assert ((got - x @ w.T).abs() <= 1e-6 * (x.abs() @ w.abs().T)).all()


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


PRODUCTS = """
import torch
from mulki.functional import prototype_similarity
from mulki.ops import use_backend
torch.manual_seed(0)
found = {}
with use_backend("cpp"):
    for size in ((96, 96, 96), (95, 96, 96), (96, 95, 96), (96, 96, 95)):
        x, w = torch.randn(size[0], size[2]), torch.randn(size[1], size[2])
        for name in ("highest", "high", "medium", "highest"):
            torch.set_float32_matmul_precision(name)
            found.setdefault((size, name), []).append(prototype_similarity(x, w))
        highest, again, high, medium = (
            *found[size, "highest"], *found[size, "high"], *found[size, "medium"]
        )
        assert again.equal(highest) and high.equal(medium)
        print(high.equal(highest))
"""


@pytest.mark.parametrize("chosen", [{}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}])
def test_floats_in_parts_where_a_setting_allows_it_and_the_cpu_has_a_matrix_unit(chosen):
    told = python("-c", PRODUCTS, **chosen)
    parts = not chosen and torch.cpu._is_amx_tile_supported()
    assert told.split() == [str(not parts), "True", "True", "True"]


@pytest.mark.parametrize(("n", "p", "d"), [(100, 130, 99), (600, 345, 512)])
@pytest.mark.parametrize(("name", "mean"), [*product(NAMES, [None]), *product(LOSSES, [True])])
def test_losses_and_gradients_from_floats_in_parts(name, mean, n, p, d):
    case = make(name, n=n, p=p, d=d, dtype=torch.float32, scale=30.0)
    value, gradients = expected(case, mean)
    with precision("high"):
        got = ours(case, mean)
    assert relative(got[0], value) < 2**-16
    for gradient, want in zip(got[1:], gradients, strict=True):
        assert relative(gradient, want) < 2**-14


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15, 1e30])
def test_the_error_of_each_product_of_floats_in_parts(size):
    torch.manual_seed(0)
    x, w = torch.randn(100, 200), torch.randn(300, 200)
    x *= size * 10.0 ** -torch.randint(6, x.shape)
    w /= size
    x[::7, 3], w[:, 3] = torch.finfo(torch.float32).max, 1e-33
    with precision("high"):
        got = prototype_similarity(x, w).double()
    x, w = x.double(), w.double()
    assert ((got - x @ w.T).abs() <= PARTS * (x.abs() @ w.abs().T)).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e36])
def test_what_is_not_finite_stays_so_in_floats_in_parts(value):
    torch.manual_seed(0)
    x, w = torch.rand(300, 96), torch.rand(300, 96)
    w[7, 2] = value
    x[130, 5] = -value
    for case in (
        cross_entropy(x, w, [3] * 300, scale=1e-3),
        make("contrastive", n=300, d=96, dtype=torch.float32)._replace(
            args=(x, w, torch.tensor(1e-3))
        ),
        make("cosines", n=300, p=300, d=96, dtype=torch.float32)._replace(
            args=(x, w, torch.tensor(1.0), False)
        ),
    ):
        wanted = ours(case, None)
        with precision("high"):
            found = ours(case, None)
        assert found[0].isnan().equal(wanted[0].isnan())
        for got, want in zip(found, wanted, strict=True):
            assert got.isfinite().equal(want.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prototypes_that_are_packed_in_groups(dtype):
    # Too many for the scratch of packed prototypes, which come in turns for the super-blocks of
    # rows; rows and prototypes end in the middle of one.
    n, p, d = 600, 3001, 1024
    torch.manual_seed(0)

    def near(rows):
        return F.normalize(rows + 0.1 * F.normalize(torch.randn_like(rows), dim=1), dim=1)

    x, w = (F.normalize(torch.randn(rows, d), dim=1) for rows in (n, p))
    pairs = [(t[0].to(dtype), t[1].to(dtype)) for t in [(x, w), *((near(x), near(w)),) * 2]]

    def gradients(to):
        student, *teachers = [Similarity(to(a), to(b), 100.0) for a, b in pairs]
        leaves = student.features.requires_grad_(), student.prototypes.requires_grad_()
        loss = dual_teacher_kl(student, *teachers, gate="uniform", reduction="sum")
        return loss, *torch.autograd.grad(loss, leaves)

    found = gradients(lambda t: t.clone())
    wanted = gradients(lambda t: t.double())
    limit = 2e-5 if dtype == torch.float32 else 5e-3
    for got, want in zip(found, wanted, strict=True):
        assert ((got.double() - want).norm() / want.norm()).item() < limit


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        *(("teacher_kl_3", dtype) for dtype in ("float32", "bfloat16", "float16")),
        ("dual_teacher_kl", "bfloat16"),
    ],
)
def test_extra_memory(operator, dtype):
    case = Case(operator, 4096, 4096, 512, dtype)
    loss = PROVIDERS["mulki"].make(case)
    found = call_cost.extra_memory("both", loss, case.inputs(), "cpu")
    assert found["memory"] <= 64 * MIB
