"""Time and memory of a call."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mulki import functional
from mulki.bench import call_cost, clocks
from mulki.bench.cases import (
    MODES,
    Case,
)
from mulki.bench.losses import EAGER


def test_providers_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], float]:
        def go() -> float:
            order.append(name)
            return float(len(order))

        return go

    times = call_cost.take_turns({name: call(name) for name in "abc"}, seconds=0.0)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    # Turning abc round would let each follow one other alone.
    assert len({pair for r in rounds for pair in (r[:2], r[1:])}) > 3
    # The first round warmed up: what is left starts with the second.
    assert {len(t) for t in times.values()} == {5}
    assert [times[name][0] for name in rounds[1]] == [4.0, 5.0, 6.0]
    before = order.copy()
    order.clear()
    call_cost.take_turns({name: call(name) for name in "abc"}, seconds=0.0)
    assert order == before


def test_the_clock_runs_for_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts forward passes tells which of them it saw."""
    calls: list[str] = []
    monkeypatch.setattr(clocks, "now", lambda device: float(len(calls)))
    inputs = Case("similarity", 3, 3, 4, "float32").inputs()

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, z: Tensor) -> Tensor:
            calls.append("forward")
            return z.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            calls.extend(["backward"] * 10)
            return grad

    def loss(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return Counted.apply(scale * x @ w.T)

    took = {mode: call_cost.timed(mode, loss, inputs, "cpu") for mode in MODES}
    assert took == {"forward": 1.0, "backward": 10.0, "both": 11.0}


def test_memory_notices_a_stored_matrix() -> None:
    case = Case("prototype_cross_entropy", 512, 1024, 4, "float32")
    inputs = case.inputs()
    matrix = 512 * 1024 * 4

    def without(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        return scale * (x.sum() + w.sum())

    stored = call_cost.extra_memory("both", EAGER[case.operator], inputs, "cpu")["memory"]
    lean = call_cost.extra_memory("both", without, inputs, "cpu")["memory"]
    assert stored >= 2 * matrix and lean < matrix / 10
    forward = call_cost.extra_memory("forward", EAGER[case.operator], inputs, "cpu")["memory"]
    assert matrix <= forward < stored


def test_memory_leaves_out_the_outputs() -> None:
    inputs = Case("similarity", 512, 1024, 4, "float32").inputs()
    matrix = 512 * 1024 * 4

    def once(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return x @ w.T

    def twice(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return once(x, w, scale) + once(x, w, scale)

    assert call_cost.extra_memory("forward", once, inputs, "cpu")["memory"] == 0
    assert call_cost.extra_memory("forward", twice, inputs, "cpu")["memory"] == 2 * matrix


def test_memory_counts_what_stays_with_the_calling_thread() -> None:
    inputs = Case("similarity", 4, 4, 4, "float32").inputs()
    kept, size = threading.local(), 1 << 20

    def loss(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        if not hasattr(kept, "scratch"):
            kept.scratch = torch.empty(size, dtype=torch.uint8)
        return x @ w.T

    loss(*inputs.arguments)
    for _ in range(2):
        assert call_cost.extra_memory("forward", loss, inputs, "cpu")["memory"] >= size


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_memory_is_that_of_a_call_in_its_context(mode: str) -> None:
    inputs = Case("prototype_cross_entropy", 4, 4, 4, "float32").inputs()
    seen: list[tuple[torch.dtype, bool]] = []

    def loss(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        z = scale * x @ w.T
        seen.append((z.dtype, torch.is_grad_enabled()))
        return z.sum()

    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    call_cost.extra_memory(mode, loss, inputs, "cpu", context)
    assert set(seen) == {(torch.bfloat16, mode == "both")}


def test_resident_memory_notices_what_the_allocator_is_not_asked_for() -> None:
    inputs = Case("similarity", 4, 4, 4, "float32").inputs()
    size = 64 << 20

    def loss(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        bytearray(size)[:: 1 << 12] = b"x" * (size >> 12)
        return x @ w.T

    found = call_cost.extra_memory("forward", loss, inputs, "cpu")
    if "resident_memory" not in found:
        pytest.skip("wants Linux and glibc")
    assert found["memory"] < size / 10 < size * 0.9 < found["resident_memory"]


def test_the_rate_of_products_grows_to_a_size_that_takes_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(torch, "mm", lambda a, b: sizes.append(len(a)))
    monkeypatch.setattr(
        functional, "prototype_similarity", lambda a, b: sizes.extend([len(a) // 2] * 4)
    )
    # A product of 512 takes 10 ms, one of 1024 takes 80; mulki's of 2048 four times as long.
    monkeypatch.setattr(clocks, "now", lambda device: sum((n / 512) ** 3 for n in sizes) / 100)
    rates = call_cost.product_rate(torch.float32, "cpu")
    assert set(sizes) == {512, 1024}
    assert rates.torch_mm == pytest.approx(2 * 512**3 / 0.01)
    assert rates.best == rates.similarity == pytest.approx(2 * 2048**3 / 0.32)


def test_a_copy_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(clocks, "now", lambda device: float(next(ticks)))
    assert call_cost.copy_rate("meta") == 2 * (1 << 30)
