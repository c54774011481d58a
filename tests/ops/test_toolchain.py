"""What Triton needs beside torch, and what is said where it is not there."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from mulki.ops.toolchain import missing


def test_a_compiler_and_its_header_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Python.h").touch()
    for name in ("gcc", "mycc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert missing() == []
    monkeypatch.setenv("CC", "mycc")
    assert missing() == []
    # Triton would take it, although gcc is there.
    monkeypatch.setenv("CC", "gone")
    assert len(missing()) == 1 and "CC is 'gone'" in missing()[0]


def test_what_is_missing_is_said_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    compiler, header = missing()
    assert "no C compiler" in compiler and "apt-get install gcc" in compiler
    version = "{}.{}".format(*sys.version_info)
    assert f"no Python.h in {tmp_path}" in header and f"python{version}-dev" in header
