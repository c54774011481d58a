"""Extra memory, which is bounded whatever N and P; threads, and the C++ kernels' ways to multiply.

The builds of csrc/ and the ways of oneDNN run a part of the conformance test in new processes, as
the choice is made once for each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mulki.bench import call_cost
from mulki.bench.cases import Case, variant
from mulki.bench.losses import MULKI
from mulki.ops import loader, use_backend
from tests import python
from tests.ops.conftest import Backend
from tests.ops.oracle import computed, exact, relative

MIB = 2**20
CONFORMANCE = "-m pytest -q -x -p no:cacheprovider tests/ops/test_conformance.py -k".split()


@pytest.fixture
def cpp() -> None:
    if (reason := loader.load()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("operator", "n", "p", "d", "dtype"),
    [
        ("teacher_kl_3", 4096, 4096, 64, "float32"),
        ("teacher_kl_3", 4096, 4096, 64, "bfloat16"),
        ("dual_teacher_kl", 32768, 100, 256, "bfloat16"),
        ("prototype_cross_entropy", 8192, 4096, 32, "float16"),
        ("pair_kl", 4096, 4096, 32, "float32"),
        ("contrastive", 4096, 4096, 32, "float32"),
        ("siglip", 4096, 4096, 32, "bfloat16"),
    ],
)
def test_memory_is_bounded_whatever_n_and_p(
    operator: str, n: int, p: int, d: int, dtype: str, backend: Backend
) -> None:
    """At most 64 MiB beside the gradients; the logits of one model alone have as many or more."""
    if backend.name not in ("chunked", "cpp") and backend.device == "cpu":
        pytest.skip("promises nothing")
    case = Case(operator, n, p, d, dtype, backend.device)
    loss, inputs = MULKI[operator], case.inputs()
    found = call_cost.extra_memory("both", loss, inputs, backend.device)
    # In float32, as they wait for an upstream gradient in half precision.
    gradients = sum(leaf.numel() * 4 for leaf in inputs.leaves.values())
    beside = gradients if dtype != "float32" else 0
    assert found["memory"] <= 64 * MIB + beside + 60 * n * 4


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


def test_a_thread_may_have_a_small_stack() -> None:
    assert python("-c", SMALL_STACK) == "done\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say")
@pytest.mark.parametrize("name", ["ce_all", "kl_blend", "pairs_label", "contrastive", "siglip"])
def test_thousands_of_calls_leave_nothing_behind(name: str, cpp: None) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    case = variant(name, n=6, p=8, d=5)
    inputs = case.inputs()
    with use_backend("cpp"):
        for number in range(4_000):
            if number == 1000:
                before = resident()
            computed(case.operator, inputs)
    # A tensor that stays of each call would be some 2 MB.
    assert resident() - before < 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prototypes_that_are_packed_in_groups(dtype: str, cpp: None) -> None:
    """Too many for the scratch of packed prototypes, which come in turns for the super-blocks of
    rows; rows and prototypes end in the middle of one.
    """
    case = Case("dual_teacher_kl", 600, 3001, 1024, dtype)
    with use_backend("cpp"):
        found = computed(case.operator, case.inputs(), "sum")
    for key, want in exact(case.operator, case.inputs(), "sum").items():
        assert relative(found[key], want) < (2e-5 if dtype == "float32" else 5e-3), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_onednn(dtype: str, backend: Backend) -> None:
    case = variant("kl_label", 20, 33, 24, dtype, device=backend.device, scale=20.0)
    with_it = computed(case.operator, case.inputs())
    with torch.backends.mkldnn.flags(enabled=False):
        without = computed(case.operator, case.inputs())
    for key, value in with_it.items():
        assert relative(without[key], value) < 1e-2


@pytest.mark.long
@pytest.mark.parametrize("capability", loader.CAPABILITIES)
def test_every_build_is_as_precise(capability: str, cpp: None) -> None:
    if capability not in loader.cpu_capabilities():
        pytest.skip(f"this CPU has no {capability}")
    if capability == loader.capability():
        pytest.skip("all other tests run this build")
    if capability not in loader.built(loader.PACKAGE):
        pytest.skip(f"not built for {capability}: MULKI_BUILD_CAPABILITIES=all builds it")
    chosen = "cpp and (values or no_rows) and not float16"
    python(*CONFORMANCE, chosen, ATEN_CPU_CAPABILITY=capability.lower())


@pytest.mark.long
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_bfloat16_where_onednn_does_not_multiply_it(instructions: str, cpp: None) -> None:
    python(*CONFORMANCE, "cpp and values and bfloat16", ONEDNN_MAX_CPU_ISA=instructions)
