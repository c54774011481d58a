from __future__ import annotations

import os

import pytest

from mulki.distributed.torchrun import launcher


def test_a_torchrun_is_told_by_its_run_and_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    first = launcher()
    assert first is not None and first.startswith(f"torchrun abc {os.getppid()} on ")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert launcher() != first
