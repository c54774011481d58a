"""Why a kernel does not serve, in words, and what is chosen without running one."""

from __future__ import annotations

import sys

import pytest
import torch

from mulki.kernels import lookup
from mulki.ops.operators import OPERATORS


def test_every_operator_has_a_kernel():
    assert sorted(lookup.OPERATORS) == sorted(OPERATORS)


def test_reasons_without_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op = "teacher_kl"
    assert "no Triton kernel for it" in str(lookup.why_not("sort", "cuda", torch.float32))
    assert "not torch.float64" in str(lookup.why_not(op, "cuda", torch.float64))
    assert "TRITON_INTERPRET=1" in str(lookup.why_not(op, "cpu", torch.float32))
    assert "not mps" in str(lookup.why_not(op, "mps", torch.float32))
    if not torch.cuda.is_available():
        assert "no GPU" in str(lookup.why_not(op, "cuda", torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert lookup.why_not(op, "cpu", torch.bfloat16) is None


def test_reason_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = str(lookup.why_not("siglip", "cuda", torch.float32))
    assert reason.startswith("triton is not importable (") and "install" in reason
