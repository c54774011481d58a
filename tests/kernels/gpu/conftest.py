"""Kernels on a GPU: asked for by name, and with nobody to answer in their place.

MULKI_GPU_DEADLINE, a time in seconds since the epoch, ends a run early: what is left is skipped.
Values and gradients on a GPU are in tests/ops/test_conformance.py (-k triton).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from mulki.kernels import lookup
from mulki.ops import use_backend


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    deadline = os.environ.get("MULKI_GPU_DEADLINE")
    if deadline and time.time() > float(deadline):
        pytest.skip("out of time")
    if reason := lookup.why_not("siglip", "cuda:0", torch.float32):
        pytest.skip(reason)
    monkeypatch.setenv("MULKI_STRICT", "1")
    with use_backend("triton"):
        yield
