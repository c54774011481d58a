"""Where the time of a step goes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

PARTS = ("data", "teachers", "forward", "loss", "backward", "optimiser", "rest")


class Stopwatch:
    """Laps of one step, added up by part; none is taken between `stop` and `start`.

    Args:
        device: an accelerator is waited for at the start and the end, and at every lap if `exact`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.exact = True
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._runs = True
        self._loss_is_open = True
        self._begun = self._last = self._now(wait=True)

    def lap(self, part: str) -> None:
        """What has passed since the last lap was `part`."""
        if not self._runs:
            return
        now = self._now(wait=self.exact)
        self.parts[part] += now - self._last
        self._last = now

    def stop(self) -> float:
        """Seconds of the whole step."""
        now = self._now(wait=True)
        self.parts["rest"] += now - self._last
        self._runs = False
        return now - self._begun

    def end_loss_at(self, features: Tensor) -> Tensor:
        """Count the backward pass as the loss's until a gradient arrives at student features."""

        def arrived(gradient: Tensor) -> None:
            if self._loss_is_open:
                self.lap("loss")
                self._loss_is_open = False

        if features.requires_grad:
            features.register_hook(arrived)
        return features

    def _now(self, *, wait: bool) -> float:
        if wait and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
