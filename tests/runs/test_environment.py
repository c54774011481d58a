"""What env.json holds: versions, hardware, commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from mulki.runs.environment import environment, git_state
from mulki.runs.folder import RunFolder


def test_environment(tmp_path: Path) -> None:
    run = RunFolder.create(
        tmp_path, "first", method="mulki", order="I", seed=3, columns=("a",), config={}
    )
    found = json.loads((run.path / "env.json").read_text())
    of_run = {
        "date": datetime.date.today().isoformat(),
        "parameters": None,
        "learned_before": [],
        "learned_with": [],
    }
    assert found == json.loads(json.dumps(environment() | of_run))
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == version("numpy")
    assert found["open_clip"] == version("open_clip_torch")
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu_count"] == os.cpu_count()
    assert found["cpu"]
    assert found["hashes"] == {}
    assert {"mulki", "triton", "platform", "cuda", "devices"} <= set(found)


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    none = {"git_commit": None, "git_modified": None}
    assert git_state(tmp_path) == none
    git("init")
    assert git_state(tmp_path) == none
    (tmp_path / "inner").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == {"git_commit": commit, "git_modified": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"git_commit": commit, "git_modified": True}
    # A package installed below somebody else's checkout is not of that commit.
    assert git_state(tmp_path / "inner") == none
