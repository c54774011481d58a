"""How a provider is called at a case: as a function, as a CUDA graph of one, or its products."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mulki.bench import call_cost, graphs
from mulki.bench.cases import MODES, Case, Inputs
from mulki.bench.clocks import Window
from mulki.bench.losses import Loss
from mulki.bench.outcomes import Outcome, outcome
from mulki.bench.providers import Provider


class FunctionCalls:
    """A loss is called each time."""

    modes = MODES  # those of them that it can be timed in

    def __init__(self, provider: Provider, case: Case, loss: Loss, inputs: Inputs) -> None:
        self._loss, self._inputs, self._device = loss, inputs, case.device
        self._context = functools.partial(provider.context, case)
        self._windows = {mode: Window() for mode in self.modes}

    def outcome(self) -> Outcome:
        with self._context():
            return outcome(self._loss, self._inputs)

    def seconds(self, mode: str, ahead: bool) -> float:
        """Of one call; with `ahead` of the device alone, and NaN where it cannot be told."""
        with self._context():
            window = self._windows[mode] if ahead else None
            return call_cost.timed(mode, self._loss, self._inputs, self._device, window)

    def memory(self, mode: str) -> dict[str, int]:
        """Extra bytes by kind; empty where they cannot be told."""
        return call_cost.extra_memory(mode, self._loss, self._inputs, self._device, self._context)


class GraphCalls:
    """A graph is replayed each time; its memory stays with it, and belongs to no call."""

    modes = ("forward", "both")

    def __init__(self, provider: Provider, case: Case, loss: Loss, inputs: Inputs) -> None:
        self._inputs, self._device, self._window = inputs, case.device, Window()

        def call(mode: str) -> Callable[[], tuple[Tensor, ...]]:
            def once() -> tuple[Tensor, ...]:
                with provider.context(case):
                    return call_cost.outputs(mode, loss, inputs)

            return once

        self._replays = {mode: graphs.capture(call(mode), case.device) for mode in self.modes}

    def outcome(self) -> Outcome:
        for replay in self._replays.values():
            replay.replay()
        alone, (value, *gradients) = (
            self._replays["forward"].outputs[0],
            self._replays["both"].outputs,
        )
        return {"loss": value, "loss without autograd": alone} | {
            f"gradient of {name}": g for name, g in zip(self._inputs.leaves, gradients, strict=True)
        }

    def seconds(self, mode: str, ahead: bool) -> float:
        window = self._window if ahead else None
        return call_cost.timed_call(self._replays[mode].replay, self._device, window)

    def memory(self, mode: str) -> dict[str, int]:
        return {}


class ProductCalls:
    """The least number of products of a case, by torch's library, and nothing else.

    No loss comes of them, so that there is nothing to verify. All logits share one matrix.
    """

    modes = MODES

    def __init__(self, case: Case, inputs: Inputs) -> None:
        x, w, *rest = (a.detach() if isinstance(a, Tensor) else a for a in inputs.arguments)
        teachers = rest[1] if case.teachers else ()
        self._models = [(x, w), *((u, v) for u, v, _ in teachers)]
        self._logits = x.new_empty(case.n, case.p)
        self._dx, self._dw = torch.empty_like(x), torch.empty_like(w)
        self._device, self._window = case.device, Window()
        self.forward()  # so that no gradient is formed of what memory happened to hold

    def forward(self) -> None:
        for features, prototypes in self._models:
            torch.mm(features, prototypes.T, out=self._logits)

    def backward(self) -> None:
        x, w = self._models[0]
        torch.mm(self._logits, w, out=self._dx)
        torch.mm(self._logits.T, x, out=self._dw)

    def both(self) -> None:
        self.forward()
        self.backward()

    def outcome(self) -> Outcome:
        return {}

    def seconds(self, mode: str, ahead: bool) -> float:
        call = {"forward": self.forward, "backward": self.backward, "both": self.both}[mode]
        return call_cost.timed_call(call, self._device, self._window if ahead else None)

    def memory(self, mode: str) -> dict[str, int]:
        return {}


Calls = FunctionCalls | GraphCalls | ProductCalls


def calls_of(provider: Provider, case: Case, inputs: Inputs) -> Calls:
    """The calls of a provider, made ready."""
    if provider.products:
        return ProductCalls(case, inputs)
    kind = GraphCalls if provider.graphed else FunctionCalls
    return kind(provider, case, provider.make(case), inputs.without(provider.without))
