"""Which backend serves an operator, and what is said about the others."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import traceback
import types
from pathlib import Path

import pytest
import torch

import mulki
from mulki import Similarity, ops
from mulki.functional import dual_teacher_kl
from mulki.ops import backends, torch_private, use_backend
from mulki.ops.operators import OPERATORS
from tests.ops.op_cases import NAMES, asking, make, requiring_grad, run

HALF = torch.bfloat16
FULL = torch.float32


class Stub:
    """A backend that serves what it is told to, and answers with the reference's kernels."""

    def __init__(self, reason: str | None = None):
        self.reason = reason
        self.called: list[tuple[str, int]] = []

    def why_not(self, op, device_type, dtype):
        return self.reason

    def kernel(self, op):
        reference = backends.BACKENDS["reference"].kernel(op)

        def counted(*args):
            self.called.append((op, threading.get_ident()))
            return reference(*args)

        return counted


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No choice of the surroundings, nothing remembered."""
    for name in ("MULKI_BACKEND", "MULKI_STRICT", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends, "_kernels", {})
    monkeypatch.setattr(backends, "_fallbacks", {})


@pytest.fixture
def cpp(monkeypatch):
    stub = Stub()
    monkeypatch.setitem(backends.BACKENDS, "cpp", stub)
    return stub


def similarity(dtype=FULL, grad=False):
    case = make("similarity", dtype=dtype)
    return run(requiring_grad(case) if grad else case)[0]


def test_cpu_tensors_go_to_cpp_when_it_serves_them(cpp):
    similarity()
    assert [op for op, _ in cpp.called] == ["similarity"]
    assert ops.fallbacks() == []


def test_a_fallback_is_recorded_once_with_its_reason(cpp):
    cpp.reason = "no compiler"
    for _ in range(3):
        similarity()
    similarity(HALF)
    assert [(f.op, f.dtype, f.backend, f.rejected) for f in ops.fallbacks()] == [
        ("similarity", FULL, "chunked", {"cpp": "no compiler"}),
        ("similarity", HALF, "chunked", {"cpp": "no compiler"}),
    ]
    assert cpp.called == []


def test_strict_makes_a_fallback_an_error_with_its_reason(cpp, monkeypatch):
    cpp.reason = "no compiler"
    similarity()
    for value in ("1", "1", "true", "yes"):
        monkeypatch.setenv("MULKI_STRICT", value)
        with pytest.raises(RuntimeError, match="mulki::similarity.*cpu.*cpp: no compiler"):
            similarity()
    for value in ("0", ""):
        monkeypatch.setenv("MULKI_STRICT", value)
        similarity()


def test_float64_is_the_references_by_design(cpp, monkeypatch):
    monkeypatch.setenv("MULKI_STRICT", "1")
    for name in ("auto", "cpp", "triton", "reference"):
        with use_backend(name):
            assert backends.choose("similarity", "cpu", torch.float64, name).backend == "reference"
            similarity(torch.float64)
    assert cpp.called == [] and ops.fallbacks() == []
    assert backends.choose("similarity", "cpu", torch.float64, "chunked").backend == "chunked"


def test_use_backend_forces_one_nests_and_restores_on_an_error(cpp):
    with use_backend("reference"):
        similarity()
        assert cpp.called == []
        with use_backend("cpp"):
            similarity()
            assert len(cpp.called) == 1
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        similarity()
        assert len(cpp.called) == 1
    similarity()
    assert len(cpp.called) == 2
    assert ops.fallbacks() == []


@pytest.mark.parametrize("names", [("reference", "cpp"), ("cpp", "cpp")])
def test_contexts_of_threads_may_end_in_the_order_they_began(cpp, monkeypatch, names):
    monkeypatch.setenv("MULKI_BACKEND", "reference")
    one, two = map(use_backend, names)
    one.__enter__()
    two.__enter__()
    similarity()
    one.__exit__(None, None, None)
    similarity()
    assert len(cpp.called) == 2
    two.__exit__(None, None, None)
    similarity()
    assert len(cpp.called) == 2


def test_use_backend_reaches_the_threads_of_autograd(cpp):
    """It is not thread-local: a backward pass may run in another thread."""
    out = similarity(grad=True)
    with use_backend("cpp"):
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()
    (_, here), (op, there) = cpp.called
    assert op == "similarity" and there != here


def test_the_variable_is_read_at_every_call_and_use_backend_precedes_it(cpp, monkeypatch):
    monkeypatch.setenv("MULKI_BACKEND", "reference")
    similarity()
    assert cpp.called == []
    with use_backend("auto"):
        similarity()
    assert len(cpp.called) == 1
    monkeypatch.setenv("MULKI_BACKEND", "cpp")
    similarity()
    assert len(cpp.called) == 2


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="^name: got 'cuda'"):
        use_backend("cuda")
    monkeypatch.setenv("MULKI_BACKEND", "eager")
    with pytest.raises(ValueError, match="^MULKI_BACKEND: got 'eager'"):
        similarity()


def test_a_forced_backend_that_cannot_serve_is_a_recorded_fallback(cpp, monkeypatch):
    cpp.reason = "not built"
    with use_backend("cpp"):
        similarity()
    with use_backend("triton"):
        similarity()
    reasons = [f.rejected for f in ops.fallbacks()]
    assert reasons[0] == {"cpp": "not built"}
    assert "TRITON_INTERPRET=1" in reasons[1]["triton"]


@pytest.mark.parametrize(
    ("device_type", "wanted"),
    [("cpu", "cpp"), ("cuda", "triton"), ("xpu", "triton"), ("mps", "triton")],
)
def test_candidates_by_device_type(cpp, monkeypatch, device_type, wanted):
    monkeypatch.setitem(backends.BACKENDS, "triton", Stub())
    monkeypatch.setattr(backends.proofs, "why_not", lambda *_: None)
    for dtype in (FULL, HALF):
        served = backends.choose("siglip", device_type, dtype)
        assert (served.backend, served.rejected) == (wanted, {})


def test_a_device_that_triton_does_not_know_falls_back_with_a_reason(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", Stub("not for MPS"))
    backends.kernel("siglip", "mps", FULL)
    assert [(f.device_type, f.rejected) for f in ops.fallbacks()] == [
        ("mps", {"triton": "not for MPS"})
    ]


def test_what_cpp_does_not_take(monkeypatch):
    loader = types.ModuleType("mulki.ops.loader")
    monkeypatch.setitem(sys.modules, "mulki.ops.loader", loader)
    cpp = backends.Cpp()
    assert "not cuda" in cpp.why_not("siglip", "cuda", FULL)
    assert "float8" in cpp.why_not("siglip", "cpu", torch.float8_e4m3fn)
    # A module that is not what it should be must not stop the reference from answering.
    assert "AttributeError" in cpp.why_not("siglip", "cpu", FULL)
    loader.load = lambda: "no compiler"
    assert cpp.why_not("siglip", "cpu", FULL) == "no compiler"
    loader.load = lambda: None
    there = torch_private.has_cpu_kernel("siglip")
    assert cpp.why_not("siglip", "cpu", FULL) == (
        None if there else "the library has no kernel for siglip"
    )


def test_what_triton_does_not_take(monkeypatch):
    triton = backends.Triton()
    monkeypatch.setitem(sys.modules, "mulki.kernels.lookup", None)
    assert "mulki.kernels" in triton.why_not("siglip", "cuda", FULL)
    lookup = types.ModuleType("mulki.kernels.lookup")
    monkeypatch.setitem(sys.modules, "mulki.kernels.lookup", lookup)
    lookup.kernel = lambda op: len
    lookup.why_not = lambda op, device_type, dtype: f"no {op} on {device_type}"
    assert triton.why_not("siglip", "cuda", FULL) == "no siglip on cuda"
    assert triton.kernel("siglip").function is len
    assert "TRITON_INTERPRET" in triton.why_not("siglip", "cpu", FULL)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.why_not("siglip", "cpu", FULL) == "no siglip on cpu"

    def broken(op, device_type, dtype):
        raise ImportError("no module named triton")

    lookup.why_not = broken
    assert triton.why_not("siglip", "cuda", FULL) == "ImportError: no module named triton"


def test_triton_serves_a_gpu_where_it_is_forced(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", Stub())
    served = backends.choose("siglip", "cuda", FULL)
    assert served.backend == "chunked" and "mulki prove" in served.rejected["triton"]
    with backends.use_backend("triton"):
        served = backends.choose("siglip", "cuda", FULL, backends._setting())
    assert served.backend == "triton" and not served.rejected


def test_triton_serves_a_gpu_at_the_sizes_where_a_proof_says_so(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", Stub())
    monkeypatch.setattr(
        backends.proofs,
        "why_not",
        lambda op, device_type, dtype, size, gradients: "is slower" if size == "small" else None,
    )
    assert backends.choose("siglip", "cuda", FULL, size="small").rejected == {"triton": "is slower"}
    assert backends.choose("siglip", "cuda", FULL, size="large").backend == "triton"
    sizes = [backends.kernel("siglip", "cuda", FULL, size) for size in ("small", "large")]
    assert [isinstance(kernel, functools.partial) for kernel in sizes] == [True, False]


def test_what_is_slower_is_no_failure_and_what_was_wrong_is_told(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", Stub())
    monkeypatch.setenv("MULKI_STRICT", "1")
    reasons = iter([f"{backends.proofs.SLOWER} here", f"{backends.proofs.WRONG} (loss)"])
    monkeypatch.setattr(backends.proofs, "why_not", lambda *_: next(reasons))
    backends.kernel("siglip", "cuda", FULL, "small")
    with pytest.raises(RuntimeError, match=r"MULKI_STRICT.*\(loss\)"):
        backends.kernel("siglip", "cuda", FULL, "large")
    monkeypatch.delenv("MULKI_STRICT")
    monkeypatch.setattr(backends.proofs, "why_not", lambda *_: f"{backends.proofs.WRONG} (loss)")
    with pytest.warns(UserWarning, match=r"mulki::siglip.*\(loss\)"):
        backends.kernel("siglip", "cuda", FULL, "large")


def test_report_names_who_serves_and_why_others_do_not(cpp):
    cpp.reason = "no compiler"

    def of_the_cpu():
        return [served for served in ops.report() if served.device_type == "cpu"]

    cpu = of_the_cpu()
    assert {(s.op, s.dtype) for s in cpu} == {(o, d) for o in OPERATORS for d in (FULL, HALF)}
    assert all(s.backend == "chunked" and s.rejected == {"cpp": "no compiler"} for s in cpu)
    cpp.reason = None
    assert all(s.backend == "cpp" and s.rejected == {} for s in of_the_cpu())
    with use_backend("reference"):
        served = of_the_cpu()[0]
        forced = dict.fromkeys(("cpp", "chunked"), "reference is forced")
        assert (served.backend, served.rejected) == ("reference", forced)
    # A report is a question, not a call.
    assert ops.fallbacks() == [] and cpp.called == []


def test_autocast_is_off_inside_an_operator(cpp):
    seen = []
    cpp.kernel = lambda op: (
        lambda x, request: (seen.append(torch.is_autocast_enabled("cpu")), [x[0] + 0] * 4)[1]
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert similarity().dtype == FULL
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_a_backward_changes_nothing(name, backend):
    case = make(name, dtype=FULL)
    case = asking(case, "backward", [True] * case.leaves)
    plain = run(case)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(case)
    assert all(a.equal(b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_a_call_passes_few_files_and_returns_to_none(monkeypatch, unit, grad):
    """From the public function to the kernel, each file of the package is entered once."""
    stack: list[str] = []

    class Watched(Stub):
        def kernel(self, op):
            reference = backends.BACKENDS["reference"].kernel(op)

            def watched(x, request):
                stack.extend(frame.filename for frame in traceback.extract_stack())
                return reference(x, request)

            return watched

    monkeypatch.setitem(backends.BACKENDS, "cpp", Watched())
    x, w = unit(6, 4).float().requires_grad_(grad), unit(5, 4).float()
    student, teacher = Similarity(x, w, 9.0), Similarity(x.detach(), w, 8.0)
    dual_teacher_kl(student, teacher, teacher, gate="uniform")
    package = Path(mulki.__file__).parent
    files = [
        Path(file).relative_to(package) for file in stack if Path(file).is_relative_to(package)
    ]
    passed = [str(file) for file, _ in itertools.groupby(files)]
    assert passed == [
        "functional.py",
        str(Path("ops/teacher_kl.py")),
        str(Path("ops/direct.py")),
        *([str(Path("ops/autograd.py"))] if grad else []),
        str(Path("ops/backends.py")),
    ]
