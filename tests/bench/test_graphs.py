"""CUDA graphs, captured and replayed by objects that stand for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.bench import graphs
from mulki.bench.cases import (
    MODES,
    Case,
)
from mulki.bench.point import measure_case
from mulki.bench.providers import GRAPH_LOGITS, PROVIDERS
from tests.bench.bench_helpers import CASE, VERIFIED


class FakeGraph:
    """What `graphs.capture` makes, without a GPU: a replay calls again."""

    def __init__(self, call: Callable[[], tuple[Tensor, ...]]) -> None:
        self.call, self.count = call, 0
        self.outputs = call()

    def replay(self) -> None:
        self.count += 1
        for old, new in zip(self.outputs, self.call(), strict=True):
            old.data.copy_(new)


def test_a_graph_is_verified_and_timed_by_its_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeGraph] = []

    def capture(call: Callable[[], tuple[Tensor, ...]], device: str) -> graphs.Replay:
        made.append(FakeGraph(call))
        return graphs.Replay(made[-1].replay, made[-1].outputs)

    monkeypatch.setattr(graphs, "capture", capture)
    results = measure_case(VERIFIED, ("eager", "graph", "mulki-graph"), MODES, seconds=1e-9)
    by = {(r.provider, r.mode): r for r in results}
    for name in ("graph", "mulki-graph"):
        assert by[name, "backward"].status == "not applicable"
        for mode in ("forward", "both"):
            found = by[name, mode]
            assert found.status == "timed", found.notes
            assert "speedup_over_eager" in found.metrics and "memory" not in found.metrics
    assert "speedup_over_graph" in by["eager", "both"].metrics
    assert len(made) == 4 and all(graph.count > 5 for graph in made)


def test_compiled_code_is_captured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda loss, **options: lambda *a: loss(*a))
    made: list[FakeGraph] = []

    def capture(call: Callable[[], tuple[Tensor, ...]], device: str) -> graphs.Replay:
        made.append(FakeGraph(call))
        return graphs.Replay(made[-1].replay, made[-1].outputs)

    monkeypatch.setattr(graphs, "capture", capture)
    case = Case("dual_teacher_kl", 18, 33, 64, "float32")
    results = measure_case(case, ("eager", "compile", "compile-graph"), ("both",), seconds=1e-9)
    assert [r.status for r in results] == ["timed"] * 3
    assert "speedup_over_compile-graph" in results[0].metrics
    # A reset between the two would have the first compiled again while it is timed.
    assert len(made) == 2 and len(resets) == 1


def test_a_graph_that_replays_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(call: Callable[[], tuple[Tensor, ...]], device: str) -> graphs.Replay:
        outputs = tuple(t.clone() for t in call())
        return graphs.Replay(lambda: outputs[-1].zero_(), outputs)

    monkeypatch.setattr(graphs, "capture", capture)
    (result,) = measure_case(CASE, ("graph",), ("both",), seconds=1e-9)
    assert result.status == "failed" and "gradient of scale" in str(result.notes)


def test_the_order_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        order.append(f"enter {name}")
        yield
        order.append(f"leave {name}")

    def stream(name: str) -> Any:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: order.append(f"{name} waits for {other.name}")
        )

    current = stream("current")
    graph = SimpleNamespace(replay=lambda: order.append("replay"))
    fake = SimpleNamespace(
        device=lambda device: noted(device),
        current_stream=lambda: current,
        Stream=lambda: stream("side"),
        stream=lambda side: noted(side.name),
        CUDAGraph=lambda: graph,
        graph=lambda one: noted("graph"),
    )
    monkeypatch.setattr(torch, "cuda", fake)

    def call() -> tuple[Tensor, ...]:
        order.append("call")
        return (torch.ones(1),)

    made = graphs.capture(call, "cuda:1")
    made.replay()
    assert order == [
        *("enter cuda:1", "side waits for current", "enter side", "call", "call", "call"),
        *("leave side", "current waits for side", "enter graph", "call", "leave graph"),
        *("leave cuda:1", "replay"),
    ]


def test_large_calls_are_not_captured() -> None:
    side = int(GRAPH_LOGITS**0.5)
    refusal = PROVIDERS["graph"].refusal
    assert refusal(Case("siglip", side, side, 8, "float32")) is None
    assert "at most" in str(refusal(Case("siglip", 2 * side, 2 * side, 8, "float32")))
