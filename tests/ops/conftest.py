"""The backends that serve CPU tensors here, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mulki.ops import backends, loader, use_backend


@pytest.fixture(params=["reference", "chunked", "cpp"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run with each backend; strict, so that no other one answers in its place."""
    name: str = request.param
    if name == "cpp" and (reason := loader.load()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("MULKI_STRICT", "1")
    with use_backend(name):
        yield name


@pytest.fixture
def calls(monkeypatch):
    """The operators that were called, each with its arguments."""
    made = []

    class Spy(backends.PlainPyTorch):
        def kernel(self, op):
            kernel = super().kernel(op)
            return lambda x, request: (made.append((op, x, request)), kernel(x, request))[1]

    monkeypatch.setitem(backends.BACKENDS, "reference", Spy("mulki.ops.reference"))
    backends.forget_choices()
    with use_backend("reference"):
        yield made
    backends.forget_choices()
