"""Kernels on a GPU: asked for by name, and with nobody to answer in their place.

MULKI_GPU_DEADLINE, a time in seconds since the epoch, ends a run early: what is left is skipped.
"""

from __future__ import annotations

import os
import time

import pytest
import torch

from mulki.kernels import lookup
from mulki.ops import backends


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = os.environ.get("MULKI_GPU_DEADLINE")
    if deadline and time.time() > float(deadline):
        pytest.skip("out of time")
    monkeypatch.setenv("MULKI_BACKEND", "triton")
    monkeypatch.setenv("MULKI_STRICT", "1")
    backends.read_environment()
    if reason := lookup.why_not("siglip", "cuda:0", torch.float32):
        pytest.skip(reason)
