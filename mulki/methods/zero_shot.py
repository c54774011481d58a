"""zero_shot: the start model without training, to which the trained methods are compared."""

from __future__ import annotations

from mulki.methods.base import Method


class ZeroShot(Method):
    """Trains nothing."""

    name = "zero_shot"
    summary = "the start model, untrained"
    trains = False
