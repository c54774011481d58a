from __future__ import annotations

import os
from functools import partial

import pytest
import torch

from mulki.bench.cases import Case
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS
from tests.bench.bench_helpers import CASE


def test_the_reference_is_asked_for_by_its_variable_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for before in (None, "auto"):
        if before is None:
            monkeypatch.delenv("MULKI_BACKEND", raising=False)
        else:
            monkeypatch.setenv("MULKI_BACKEND", before)
        with PROVIDERS["mulki-reference"].context(CASE):
            assert os.environ["MULKI_BACKEND"] == "reference"
            assert PROVIDERS["mulki"].note(CASE) == "served by reference"
        assert os.environ.get("MULKI_BACKEND") == before


def test_compiled_eager_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without inductor, which tests/ops/test_compile.py takes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = Case("dual_teacher_kl", 9, 7, 16, "bfloat16")
    (result,) = measure_case(case, ("compile",), ("both",), seconds=0.01)
    assert result.status == "timed", result.notes
