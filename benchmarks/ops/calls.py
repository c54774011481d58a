"""How a provider is called at a case: as a function, or as a CUDA graph of one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from . import call_cost, graphs
from .cases import MODES, Case, Inputs
from .losses import Loss
from .outcomes import Outcome, named, outcome
from .providers import Provider


class Calls(Protocol):
    """What is asked of a provider at a case."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of MODES that it can be timed in."""

    def outcome(self) -> Outcome: ...

    def seconds(self, mode: str, ahead: bool) -> float: ...

    def memory(self, mode: str) -> dict[str, int]:
        """Extra bytes by kind; empty where they cannot be told."""


class FunctionCalls:
    """A loss is called each time."""

    modes = MODES

    def __init__(self, provider: Provider, case: Case, loss: Loss, inputs: Inputs) -> None:
        self._loss, self._inputs, self._device = loss, inputs, case.device
        self._context = functools.partial(provider.context, case)

    def outcome(self) -> Outcome:
        with self._context():
            return outcome(self._loss, self._inputs)

    def seconds(self, mode: str, ahead: bool) -> float:
        with self._context():
            return call_cost.timed(mode, self._loss, self._inputs, self._device, ahead)

    def memory(self, mode: str) -> dict[str, int]:
        return call_cost.extra_memory(mode, self._loss, self._inputs, self._device, self._context)


class GraphCalls:
    """A graph is replayed each time; its memory stays with it, and belongs to no call."""

    modes = ("forward", "both")

    def __init__(self, provider: Provider, case: Case, loss: Loss, inputs: Inputs) -> None:
        self._inputs, self._device = inputs, case.device

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
        return named(alone, value, gradients, self._inputs)

    def seconds(self, mode: str, ahead: bool) -> float:
        return call_cost.timed_call(self._replays[mode].replay, self._device, ahead)

    def memory(self, mode: str) -> dict[str, int]:
        return {}


def calls_of(provider: Provider, case: Case, inputs: Inputs) -> Calls:
    """The calls of a provider, made ready."""
    kind: Callable[..., Calls] = GraphCalls if provider.graphed else FunctionCalls
    return kind(provider, case, provider.make(case), inputs.without(provider.without))
