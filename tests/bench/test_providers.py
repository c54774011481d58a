from __future__ import annotations

import os

import pytest

from mulki.bench.cases import (
    Case,
)
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


@pytest.mark.slow
def test_compiled_eager_is_right() -> None:
    case = Case("dual_teacher_kl", 9, 7, 16, "bfloat16")
    (result,) = measure_case(case, ("compile",), ("both",), seconds=0.01)
    if result.status == "failed" and "ompiler" in str(result.notes):
        pytest.skip("torch.compile finds no C++ compiler")
    assert result.status == "timed", result.notes
