"""The C++ kernels' ways to multiply, and the scratch that they take."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from mulki import Similarity
from mulki.bench import call_cost
from mulki.bench.cases import Case
from mulki.bench.providers import PROVIDERS
from mulki.functional import dual_teacher_kl
from mulki.ops import loader, use_backend
from tests import python

MIB = 2**20


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
