"""`python -m tests.fuzz kernels`: a batch of random cases."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import main


def test_a_batch_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--seconds", "0", "--seed", "1"]) == 0
    assert "kernels: 10 cases passed, seed 1" in capsys.readouterr().out
