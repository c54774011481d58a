"""When `mulki run` tells OpenMP how long its threads spin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mulki.distributed.wait_policy import SPIN_COUNT, set_for_run


@pytest.mark.parametrize(
    ("command", "is_set"),
    [
        (["python", "/venv/bin/mulki", "run", "embedded"], True),
        (["C:/python.exe", "C:/venv/Scripts/mulki.exe", "run"], True),
        (["python", "-u", "-m", "mulki", "run", "--lr", "1"], True),
        (["python", "-m", "mulki", "plan"], True),
        (["python", "/venv/bin/mulki", "metrics", "run"], False),
        (["python", "/venv/bin/mulki"], False),
        (["python", "train.py", "run"], False),
        (["python", "train.py", "--data", "mulki", "run.csv"], False),
        (["python", "-c", "import mulki", "run"], False),
        (["python"], False),
    ],
)
def test_it_is_for_the_commands_that_train(
    command: list[str], is_set: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"HOME": "here"}
    monkeypatch.setattr(sys, "orig_argv", command)
    monkeypatch.setattr(os, "environ", environment)
    set_for_run()
    wanted = {"HOME": "here"} | ({"GOMP_SPINCOUNT": SPIN_COUNT} if is_set else {})
    assert environment == wanted


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"])
def test_what_a_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {name: "7"}
    monkeypatch.setattr(sys, "orig_argv", ["python", "mulki", "run"])
    monkeypatch.setattr(os, "environ", environment)
    set_for_run()
    assert environment == {name: "7"}


def test_it_is_set_before_torch_starts(tmp_path: Path) -> None:
    """OpenMP shows what it has read."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "mulki", "run", "--help"],
        env=settings | {"OMP_DISPLAY_ENV": "verbose"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch has another OpenMP here, or none")
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr
