"""Which backend serves an operator, and what is said about the others."""

from __future__ import annotations

import threading

import pytest
import torch

from mulki import ops
from mulki.ops import backends, loader, use_backend, wins
from mulki.ops.operators import OPERATORS
from tests.ops.op_cases import NAMES, asking, make, requiring_grad, run

OP = "siglip"
HALF = torch.bfloat16
FULL = torch.float32


class Counted(backends.PlainPyTorch):
    """The reference, which counts its calls, or says why it cannot serve."""

    def __init__(self):
        super().__init__("mulki.ops.reference")
        object.__setattr__(self, "called", [])
        object.__setattr__(self, "reason", None)

    def refuse(self, reason):
        object.__setattr__(self, "reason", reason)

    def why_not(self, op, device_type, dtype):
        return self.reason

    def kernel(self, op):
        run_it = super().kernel(op)

        def counted(*args):
            self.called.append((op, threading.get_ident(), torch.is_autocast_enabled("cpu")))
            return run_it(*args)

        return counted


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No choice of the surroundings, nothing remembered."""
    for name in ("MULKI_BACKEND", "MULKI_STRICT", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends, "_fallbacks", {})
    backends.forget_choices()
    yield
    backends.forget_choices()


@pytest.fixture
def cpp(monkeypatch):
    backend = Counted()
    monkeypatch.setitem(backends.BACKENDS, "cpp", backend)
    return backend


def called(dtype=FULL, grad=False):
    case = make(OP, dtype=dtype)
    return run(requiring_grad(case) if grad else case)[0]


def test_cpu_tensors_go_to_cpp_and_those_of_float64_to_the_reference(cpp):
    called()
    assert [op for op, *_ in cpp.called] == [OP]
    for name in ("auto", "cpp", "triton", "reference"):
        with use_backend(name):
            assert backends.choose(OP, "cpu", torch.float64).backend == "reference"
            called(torch.float64)
    with use_backend("chunked"):
        assert backends.choose(OP, "cpu", torch.float64).backend == "chunked"
    assert len(cpp.called) == 1 and ops.fallbacks() == []


def test_a_fallback_is_recorded_once_with_its_reason(cpp):
    cpp.refuse("no compiler")
    for _ in range(3):
        called()
    called(HALF)
    with use_backend("triton"):
        called()
    found = [(f.op, f.dtype, f.backend, [*f.rejected]) for f in ops.fallbacks()]
    assert found == [
        (OP, FULL, "chunked", ["cpp"]),
        (OP, HALF, "chunked", ["cpp"]),
        (OP, FULL, "chunked", ["triton"]),
    ]
    assert ops.fallbacks()[0].rejected == {"cpp": "no compiler"} and cpp.called == []


def test_strict_makes_a_fallback_an_error_with_its_reason(cpp, monkeypatch):
    cpp.refuse("no compiler")
    called()
    for value in ("1", "1", "true", "yes"):
        monkeypatch.setenv("MULKI_STRICT", value)
        backends.read_environment()
        with pytest.raises(RuntimeError, match=f"mulki::{OP}.*cpu.*cpp: no compiler"):
            called()
    for value in ("0", ""):
        monkeypatch.setenv("MULKI_STRICT", value)
        backends.read_environment()
        called()


def test_use_backend_precedes_the_variable_nests_and_restores_on_an_error(cpp, monkeypatch):
    monkeypatch.setenv("MULKI_BACKEND", "reference")
    called()
    assert len(cpp.called) == 1  # it was not read yet
    backends.read_environment()
    called()
    assert len(cpp.called) == 1
    with use_backend("cpp"):
        called()
        with pytest.raises(KeyError), use_backend("reference"):
            called()
            raise KeyError
        called()
    called()
    assert len(cpp.called) == 3 and ops.fallbacks() == []


@pytest.mark.parametrize("names", [("reference", "cpp"), ("cpp", "cpp")])
def test_contexts_of_threads_may_end_in_the_order_they_began(cpp, monkeypatch, names):
    monkeypatch.setenv("MULKI_BACKEND", "reference")
    one, two = map(use_backend, names)
    one.__enter__()
    two.__enter__()
    called()
    one.__exit__(None, None, None)
    called()
    assert len(cpp.called) == 2
    two.__exit__(None, None, None)
    called()
    assert len(cpp.called) == 2


def test_use_backend_reaches_the_threads_of_autograd(cpp):
    """It is not thread-local: a backward pass may run in another thread."""
    out = called(grad=True)
    with use_backend("cpp"):
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()
    (_, here, _), (op, there, _) = cpp.called
    assert op == OP and there != here


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="^name: got 'cuda'"), use_backend("cuda"):
        called()
    monkeypatch.setenv("MULKI_BACKEND", "eager")
    backends.read_environment()
    with pytest.raises(ValueError, match="^MULKI_BACKEND: got 'eager'"):
        called()


def test_what_cpp_and_triton_do_not_take():
    cpp, triton = backends.Cpp(), backends.Triton()
    assert "not cuda" in cpp.why_not("siglip", "cuda", FULL)
    assert "float8" in cpp.why_not("siglip", "cpu", torch.float8_e4m3fn)
    assert cpp.why_not("siglip", "cpu", FULL) == loader.load()
    assert "triton" in triton.why_not("siglip", "cpu", FULL).lower()
    assert "float64" in triton.why_not("siglip", "cuda", torch.float64)


def test_triton_serves_unasked_from_the_size_on_from_which_it_wins(monkeypatch):
    """As if tensors of the CPU were a GPU's; the kernels of both backends are real ones."""
    triton = Counted()
    monkeypatch.setitem(backends.BACKENDS, "triton", triton)
    monkeypatch.setitem(backends.CANDIDATES, "cpu", backends.ELSEWHERE)
    monkeypatch.setenv("MULKI_STRICT", "1")
    x = make(OP, dtype=FULL).args[:2]
    logits = len(x[0]) * len(x[1])
    for least, calls in ((logits, 1), (logits + 1, 1), ("was wrong", 1)):
        monkeypatch.setattr(wins, "_shared", {OP: {"float32": least}})
        backends.forget_choices()
        called()
        called(HALF)  # of which nothing is known
        assert len(triton.called) == calls
    (served,) = [s for s in ops.report() if s[:3] == (OP, "cpu", FULL)]
    assert (served.backend, served.rejected) == ("chunked", {"triton": "was wrong"})
    with use_backend("triton"):
        called(HALF)
    assert len(triton.called) == 2 and ops.fallbacks() == []
    assert "mulki doctor --kernels" in wins.least("contrastive", "cpu", FULL)[1]


def test_report_names_who_serves_and_why_others_do_not(cpp):
    cpp.refuse("no compiler")

    def of_the_cpu():
        return [served for served in ops.report() if served.device_type == "cpu"]

    cpu = of_the_cpu()
    assert {(s.op, s.dtype) for s in cpu} == {(o, d) for o in OPERATORS for d in (FULL, HALF)}
    losses = [s for s in cpu if s.op != "similarity"]  # which is plain PyTorch by design
    assert all(s.backend == "chunked" and s.rejected == {"cpp": "no compiler"} for s in losses)
    cpp.refuse(None)
    wanted = {o: "chunked" if o == "similarity" else "cpp" for o in OPERATORS}
    assert all(s.backend == wanted[s.op] and s.rejected == {} for s in of_the_cpu())
    with use_backend("reference"):
        served = of_the_cpu()[0]
        forced = dict.fromkeys(("cpp", "chunked"), "reference is forced")
        assert (served.backend, served.rejected) == ("reference", forced)
    # A report is a question, not a call.
    assert ops.fallbacks() == [] and cpp.called == []


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_off_inside_an_operator_and_changes_nothing(name, backend):
    case = make(name, dtype=FULL)
    case = asking(case, "backward", [True] * case.leaves)
    plain = run(case)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(case)
        assert torch.is_autocast_enabled("cpu")
    assert all(a.equal(b) for a, b in zip(plain, cast, strict=True))
