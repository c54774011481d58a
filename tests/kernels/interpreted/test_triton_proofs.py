"""`mulki prove` with the interpreter in place of a GPU."""

from __future__ import annotations

import pytest
import torch

from mulki import functional
from mulki.app import prove
from mulki.ops import backends, prepared, proofs
from mulki.similarity import Similarity


@pytest.fixture(autouse=True)
def interpreter_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(prove, "SECONDS", 0.01)
    monkeypatch.setitem(backends.CANDIDATES, "cpu", ("triton", "reference"))
    backends.forget_choices()
    yield
    backends.forget_choices()


def verdict(op: str, numbers: str) -> proofs.Verdict:
    """Of this process, whose kernels a test may change."""
    return prove.verdict_of(prove.Job(op, numbers, "small", ((8, 8, 16), (9, 9, 24))), "cpu")


def choice(op: str, dtype: torch.dtype, size: str) -> str:
    return backends.choose(op, "cpu", dtype, size=size).backend


@pytest.mark.parametrize("op", prove.CASES)
def test_every_operator_is_right_and_the_interpreter_slower(op):
    for numbers in ("tf32", "bfloat16"):
        found = verdict(op, numbers)
        assert found.problems == () and found.failure is None
        assert "slower" in (found.why_not() or "") and found.numbers == numbers
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"


def test_a_proof_is_made_in_processes():
    job = prove.Job("siglip", "float32", "small", ((8, 8, 16),))
    (found,) = prove.prove(proofs.cards("cpu"), wanted=[job])
    assert found.problems == () and "slower" in (found.why_not() or "")
    assert choice("siglip", torch.float32, "small") == "reference"
    functional.siglip(torch.randn(4, 8), torch.randn(4, 8), 1.0, 0.0)  # allocates as a kernel does


def test_where_the_kernels_are_right_and_faster_they_are_taken():
    (subject,) = proofs.subjects("cpu")
    speedups = {"small": 1.5, "medium": 1.0, "large": 0.9}
    verdicts = [
        proofs.Verdict("siglip", "float32", size, (), s, 2.0) for size, s in speedups.items()
    ]
    proofs.store(subject, verdicts)
    assert choice("siglip", torch.float32, "small") == "triton"
    assert choice("siglip", torch.float32, "large") == "reference"
    assert choice("siglip", torch.float16, "small") == "reference"
    assert choice("similarity", torch.float32, "small") == "reference"
    functional.siglip(torch.randn(4, 8), torch.randn(4, 8), 1.0, 0.0)  # allocates as a kernel does


def wrong(monkeypatch, op: str, form: str, *results: int) -> None:
    """Make some results of a kernel one per cent too large, in calls of one kind."""
    triton = type(backends.BACKENDS["triton"])
    right = triton.kernel

    def kernel(self, asked):
        found = right(self, asked)

        def run(x, request):
            out = found(x, request)
            made = "backward" if request.grad is not None else request.reduction
            spoiled = results if made == form else ()
            return tuple(1.01 * t if i in spoiled else t for i, t in enumerate(out))

        return run if asked == op else found

    monkeypatch.setattr(triton, "kernel", kernel)


def test_a_kernel_that_is_wrong_in_one_form_is_found(monkeypatch):
    wrong(monkeypatch, "prototype_cross_entropy", "backward", 1, 2, 3)
    found = verdict("prototype_cross_entropy", "float32")
    assert any("row by row at 8x8x16: gradient" in problem for problem in found.problems)
    assert "was wrong" in (found.why_not() or "")


@pytest.mark.parametrize(
    ("op", "form", "result", "name"),
    [
        ("teacher_kl", "none", 3, "entropy beside the losses"),
        ("teacher_kl", "mean", 1, "kl beside the mean"),
        ("teacher_kl", "mean", 2, "weights beside the mean"),
        ("pair_kl", "none", 1, "kl beside the losses"),
    ],
)
def test_a_by_product_that_is_wrong_is_found(op, form, result, name, monkeypatch):
    """Neither the loss nor its gradients show it."""
    wrong(monkeypatch, op, form, result)
    found = verdict(op, "float32")
    assert found.problems and all(f": {name}: " in problem for problem in found.problems)
    assert any(problem.startswith("by-products at 8x8x16") for problem in found.problems)


def test_launches_that_are_kept_are_what_is_compared(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(prove, "FIRST_CALLS", {})
    monkeypatch.setattr(prepared, "MOST_STEPS", 200)  # filling memory with NaN takes some
    assert verdict("siglip", "float32").problems == ()
    right = prepared.again
    monkeypatch.setattr(
        prepared, "again", lambda *given: tuple(1.01 * one for one in right(*given))
    )
    assert any("siglip at 8x8x16: loss" in one for one in verdict("siglip", "float32").problems)


def test_a_kernel_that_raises_did_not_run(monkeypatch):
    def kernel(self, op):
        torch.empty(1)  # allocates as a kernel does
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(type(backends.BACKENDS["triton"]), "kernel", kernel)
    found = verdict("siglip", "float32")
    assert found.failure == "RuntimeError: no such instruction" and found.problems == ()


def test_the_operator_asks_with_the_size_of_its_call(monkeypatch):
    asked = []
    monkeypatch.setattr(
        proofs,
        "why_not",
        lambda op, device_type, dtype, size, gradients: asked.append((op, size, gradients)),
    )
    monkeypatch.setitem(proofs.SIZES, "small", 40)
    x = torch.randn(8, 16, requires_grad=True)
    for rows, size in ((5, "small"), (6, "medium")):
        asked.clear()
        similarity = Similarity(x, torch.randn(rows, 16), 1.0)
        functional.prototype_cross_entropy(similarity, torch.arange(8) % 5).backward()
        assert ("prototype_cross_entropy", size, True) in asked
        asked.clear()
        backends.forget_choices()
        functional.prototype_cross_entropy(similarity.detach(), torch.arange(8) % 5)
        functional.siglip(x.detach(), x.detach(), 1.0, 0.0, reduction="none")
        wanted = ("prototype_cross_entropy", size, False), ("siglip", "medium", False)
        assert set(asked) >= set(wanted)
