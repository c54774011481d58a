"""zero_shot: the start model as it is, the reference for what training gains and loses."""

from __future__ import annotations

from mulki.methods.base import Method


class ZeroShot(Method):
    """Trains nothing."""

    name = "zero_shot"
    summary = "the start model, untrained"
    trains = False
