"""The largest case that fits into a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.app.cli import run_command
from mulki.bench import call_cost, largest, point
from mulki.bench.cases import (
    Case,
)
from mulki.bench.losses import EAGER
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS, Provider
from mulki.bench.report import markdown, rows_of
from tests.bench.bench_helpers import CASE, MACHINE

OF_THE_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
OF_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")


def starving(beyond: int, error: RuntimeError = OF_A_GPU) -> Provider:
    """A provider whose memory ends at so many rows."""

    def make(case: Case) -> Callable[..., Tensor]:
        def loss(x: Tensor, *others: Any) -> Tensor:
            if x.shape[0] > beyond:
                raise error
            return EAGER[case.operator](x, *others)

        return loss

    return Provider("mulki", make)


def test_a_lack_of_memory_is_a_result_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(point, "free_memory", freed.append)
    monkeypatch.setitem(PROVIDERS, "mulki", starving(5))
    results = measure_case(CASE, ("eager", "mulki"), ("both",), seconds=1e-9)
    assert [r.status for r in results] == ["timed", "out of memory"] and freed == ["cpu"]
    assert results[1].notes == ("CUDA out of memory. Tried to",)
    rates = call_cost.ProductRates(torch_mm=1e9, similarity=1e9)
    monkeypatch.setattr(call_cost, "product_rate", lambda dtype, device: rates)
    monkeypatch.setattr(call_cost, "copy_rate", lambda device: 1e9)
    given = ("--shapes", "6x6x4", "--ops", "siglip", "--dtypes", "fp32", "--seconds", "1e-9")
    assert run_command(["bench", *given, "--providers", "mulki"]) == 0
    assert "mulki: out of memory: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fits", "n", "why"),
    [
        (100, 96, "104 does not fit"),
        (64, 64, "72 does not fit"),
        (15, 0, "does not fit"),
        (4096, 1024, "search ends"),
    ],
)
def test_the_search_doubles_and_halves(fits: int, n: int, why: str) -> None:
    tried: list[int] = []

    def seconds(samples: int) -> float | None:
        tried.append(samples)
        return 0.1 if samples <= fits else None

    found = largest.largest(seconds, 16, 1024)
    assert found.n == n and why in found.why and len(tried) <= 10


def test_the_search_ends_where_a_call_takes_long() -> None:
    found = largest.largest(lambda n: n / 2, 16, 1024)
    assert found == (32, "where a call took 16 s")


def test_the_largest_n_of_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "PROTOTYPES", 4)
    monkeypatch.setattr(largest, "START", 8)
    monkeypatch.setattr(largest, "LIMIT", 64)
    monkeypatch.setitem(PROVIDERS, "mulki", starving(20))
    monkeypatch.setitem(PROVIDERS, "wrong", Provider("wrong", lambda case: 1 / 0))
    (case,) = largest.cases(["prototype_cross_entropy"], ["float32"], "cpu")
    other = Provider("other", lambda case: 1 / 0, refusal=lambda case: "has another loss")
    monkeypatch.setitem(PROVIDERS, "other", other)
    mulki, eager, graph, wrong, refused = largest.search(
        case, ["mulki", "eager", "graph", "wrong", "other"]
    )
    assert (mulki.status, mulki.case.n, mulki.case.p) == ("searched", 20, 4)
    assert mulki.notes == ("N = 20, and 22 does not fit",)
    assert eager.case.n == 64 and eager.metrics["largest_n"].median == 64
    assert graph.status == refused.status == "not applicable" and wrong.status == "failed"
    text = markdown([row for r in (mulki, eager) for row in rows_of(r, MACHINE)])
    assert "Largest N" in text and "| mulki | eager |" in text
    assert "| prototype_cross_entropy | N x 4 x 512 | float32 | 20 | 64 |" in text
    # A search without a result is no time that is missing.
    text = markdown([row for r in (mulki, wrong) for row in rows_of(r, MACHINE)])
    assert "ms" not in text and "| float32 | 20 | failed |" in text


def test_a_matrix_is_searched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "START", 8)
    (case,) = largest.cases(["similarity"], ["float32"], "cpu")
    (found,) = largest.search(case, ["eager"], limit=16)
    assert (found.status, found.case.n) == ("searched", 16)


def test_the_time_of_a_search_is_not_that_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((0.0, 60.0, 60.0, 61.0))
    monkeypatch.setattr(largest.time, "perf_counter", lambda: next(seconds))
    (case,) = largest.cases(["siglip"], ["float32"], "cpu")
    assert largest._seconds(largest.with_samples(case, 8), PROVIDERS["eager"]) == 1.0


@pytest.mark.parametrize(
    "words", [("--shapes", "8x8"), ("--modes", "forward"), ("--seconds", "3"), ("--quick",)]
)
def test_options_of_timing_are_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["bench", "--largest", "--limit", "2048", *words]) == 2
    assert f"{words[0]}: given with --largest" in capsys.readouterr().err


def test_pairs_are_searched_along_the_diagonal() -> None:
    case = Case("siglip", 1024, 1024, 512, "bfloat16")
    assert largest.with_samples(case, 4096).p == 4096


def test_on_a_cpu_the_search_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(largest, "WIDTH", 4)
    monkeypatch.setitem(PROVIDERS, "mulki", starving(1600, OF_THE_CPU))
    words = ("--largest", "--limit", "2048", "--ops", "siglip", "--dtypes", "fp32")
    chosen = ("--providers", "mulki", "eager", "products")
    assert run_command(["bench", *words, *chosen]) == 0
    out = capsys.readouterr().out
    assert "mulki: N = 1536, and 1664 does not fit" in out
    assert "eager: N = 2048, where the search ends" in out
    assert "products: not applicable: computes no loss" in out
