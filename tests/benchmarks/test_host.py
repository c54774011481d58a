"""What a chunk costs the host, by count."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton", reason="needs Triton, which this installation has not")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing where it interprets", allow_module_level=True)

import torch
from triton.runtime import driver

from benchmarks.kernels import host
from mulki.kernels import chunks, common, schedule


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_a_chunk_takes_few_calls():
    assert 5 < host.of_a_chunk(host.python_calls) <= 16


def test_a_view_more_in_a_chunk_would_be_seen(monkeypatch):
    """Each chunk multiplies by the same views of prototypes and logits."""
    views = []
    right = chunks.multiply
    monkeypatch.setattr(
        chunks, "multiply", lambda *given, **add: (views.append(given), right(*given, **add))
    )
    with host.idle():
        host.call_of(3)()
    logits = [given for given in views if given[2].shape == (host.ROWS, host.P)]
    assert len(logits) == 9
    assert len({id(given[1]) for given in logits}) == len({id(given[2]) for given in logits}) == 3


def test_nothing_is_left_of_the_idle_driver(capsys):
    before = torch.mm, torch.addmm, schedule.plans, driver._active
    assert host.main() == 0
    assert re.match(
        r"a chunk of dual_teacher_kl: \d+ us of Python, \d+ calls", capsys.readouterr().out
    )
    assert (torch.mm, torch.addmm, schedule.plans, driver._active) == before
    assert common._assumed is None
