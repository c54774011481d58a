"""The C++ kernels' ways to multiply, and the scratch that they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mulki import Similarity
from mulki.bench import call_cost
from mulki.bench.cases import Case
from mulki.bench.providers import PROVIDERS
from mulki.functional import dual_teacher_kl
from mulki.ops import loader, use_backend

HERE = Path(__file__).resolve().parent
MIB = 2**20


@pytest.fixture(autouse=True)
def cpp():
    if (reason := loader.load()) is not None:
        pytest.skip(reason)
    with use_backend("cpp"):
        yield


def run(
    *arguments: str, products: str = "", instructions: str = "", capability: str = ""
) -> subprocess.CompletedProcess[str]:
    # The choice is made once per process.
    choice = {
        "MULKI_CPU_PRODUCTS": products,
        "ONEDNN_MAX_CPU_ISA": instructions,
        "ATEN_CPU_CAPABILITY": capability,
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent.parent,
        env={**os.environ, **{name: value for name, value in choice.items() if value}},
        capture_output=True,
        text=True,
        check=False,
    )


ONE_PRODUCT = (
    "import torch; from mulki.functional import prototype_similarity as f; "
    "from mulki.ops import use_backend; use_backend('cpp').__enter__(); x = torch.ones(2, 3); "
    "print(f(x, x))"
)


def test_an_unknown_way_to_multiply_is_an_error():
    done = run("-c", ONE_PRODUCT, products="mkl")
    assert done.returncode != 0
    assert "MULKI_CPU_PRODUCTS: got mkl, wanted amx or brgemm" in done.stderr


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="the CPU has AMX")
def test_amx_is_an_error_where_there_is_none():
    done = run("-c", ONE_PRODUCT, products="amx")
    assert done.returncode != 0
    assert "MULKI_CPU_PRODUCTS: got amx" in done.stderr


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="brgemm is what runs anyway")
def test_brgemm_is_as_precise_where_amx_runs_otherwise():
    tests = "cpp and (test_every_operator or repeat_bit_for_bit or test_a_student)"
    options = ("-q", "-p", "no:cacheprovider", "-k", tests)
    files = [str(HERE / f"test_{name}.py") for name in ("precision", "teacher_kl")]
    done = run("-m", "pytest", *files, *options, products="brgemm")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


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
    options = ("-q", "-p", "no:cacheprovider", "-k", "cpp and test_every_operator")
    file = str(HERE / "test_precision.py")
    done = run("-m", "pytest", file, *options, capability=capability.lower())
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_bfloat16_where_onednn_does_not_multiply_it(instructions):
    options = ("-q", "-p", "no:cacheprovider", "-k", "cpp and test_every_operator")
    file = str(HERE / "test_precision.py")
    done = run("-m", "pytest", file, *options, products="brgemm", instructions=instructions)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


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


@pytest.mark.parametrize("operator", ["dual_teacher_kl", "teacher_kl_3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_extra_memory(operator, dtype):
    if dtype == "float16" and torch.cpu._is_amx_tile_supported():
        pytest.skip("with AMX float16 is multiplied as float32, of which copies are made")
    case = Case(operator, 4096, 4096, 512, dtype)
    loss = PROVIDERS["mulki"].make(case)
    found = call_cost.extra_memory("both", loss, case.inputs(), "cpu")
    assert found["memory"] <= 64 * MIB
