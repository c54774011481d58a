"""The backends that serve here, one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from mulki.ops import loader, use_backend


class Backend(NamedTuple):
    """A backend, and the device of the tensors that it is given."""

    name: str
    device: str

    @property
    def cuts(self) -> bool:
        """Whether bfloat16 is cut off and not rounded, as Triton's interpreter does."""
        return self.name == "triton" and self.device == "cpu"


#: Triton serves the CPU in its interpreter, for which TRITON_INTERPRET=1 has to be set from the
#: start of the process: pytest tests/ops/test_conformance.py -k triton.
BACKENDS = [Backend(name, "cpu") for name in ("reference", "chunked", "cpp")]
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS.append(Backend("triton", "cpu"))
if torch.cuda.is_available():
    BACKENDS += [Backend(name, "cuda") for name in ("chunked", "triton")]


@pytest.fixture(params=BACKENDS, ids=lambda backend: "-".join(backend))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Run with each backend; strict, so that no other one answers in its place."""
    here: Backend = request.param
    if here.name == "cpp" and (reason := loader.load()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("MULKI_STRICT", "1")
    with use_backend(here.name):
        yield here
