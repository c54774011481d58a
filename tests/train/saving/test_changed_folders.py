"""Runs that go on after their folder, their images or the clock has been changed from outside."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.train.run_helpers import resumed, weights
from tests.train_helpers import same_state


def test_damaged_answers_are_told_and_change_nothing_else(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Path(shutil.copytree(stopped, tmp_path / "whole"))
    (file,) = (stopped / "answers").glob("01_*.npz")
    file.write_bytes(file.read_bytes()[:-30])
    resumed(stopped)
    assert re.search(r"01_\w+\.npz: .*; the run goes on, and its page lacks all", caplog.text)
    resumed(whole)
    for task in ("task_01*", "task_02*"):
        assert same_state(weights(stopped, task), weights(whole, task))
