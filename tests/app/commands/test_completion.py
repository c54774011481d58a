from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import argcomplete
import pytest

from mulki.app.cli import run_command
from mulki.app.commands.completion import SHELLS

Ask = Callable[[str], list[str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """What a shell is offered after a line, by the variables that its code sets."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    # It would take descriptor 9, which is pytest's.
    monkeypatch.setattr(argcomplete.CompletionFinder, "_init_debug_stream", lambda self: None)
    monkeypatch.chdir(tmp_path)

    def ask(line: str) -> list[str]:
        answer = tmp_path / "answer"
        answer.write_text("")
        for name, value in {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "_ARGCOMPLETE_IFS": "\n",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        }.items():
            monkeypatch.setenv(name, value)
        try:
            run_command([])
        except SystemExit as left:
            assert left.code == 0
        monkeypatch.delenv("_ARGCOMPLETE")
        return [word.strip() for word in answer.read_text().split("\n") if word.strip()]

    return ask


def test_commands_are_offered(ask: Ask) -> None:
    assert {"run", "compare", "bench", "completion", "--version"} <= {*ask("mulki ")}
    assert ask("mulki comp") == ["compare", "completion"]
    assert ask("mulki gone ") == []


def test_options_are_offered(ask: Ask) -> None:
    assert ask("mulki compare --ht") == ["--html"]
    assert {"--shapes", "table", "plot"} <= {*ask("mulki bench ")}
    assert ask("mulki bench plot a.csv out --mo") == ["--mode"]
    assert ask("mulki bench plot a.csv out --mode ") == ["forward", "backward", "both"]
    assert ask("mulki completion z") == ["zsh"]
    assert {*SHELLS} < {*ask("mulki completion ")}


def test_a_run_has_the_options_of_its_method(ask: Ask) -> None:
    assert "--order" in ask("mulki run embedded --or") and ask("mulki run embedded --alp") == [
        "--alpha"
    ]
    assert ask("mulki run --method finetune embedded --alp") == []
    assert ask("mulki run --method=finetune embedded --alp") == []
    assert {"mulki", "finetune"} <= {*ask("mulki run --method ")}
    assert ask("mulki run embedded-f") == ["embedded-flags"]


def test_a_line_that_is_completed_runs_no_code_that_it_names(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("open('ran', 'w')\n")
    (tmp_path / "a.yaml").write_text("import: [mine.py]\n")
    for command in ("run", "plan", "eval birds", "export birds", "reproduce", "tasks embedded"):
        for named in ("--import mine.py", "--config a.yaml"):
            found = ask(f"mulki {command} {named} --he")
            assert "--help" in found or command not in ("run", "plan")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_code(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "mulki" in code and "_ARGCOMPLETE" in code
    if shell == "bash":
        asked = "complete -p mulki"
        done = subprocess.run(["bash", "-c", code + asked], capture_output=True, text=True)
        assert "_python_argcomplete" in done.stdout and not done.stderr


def test_an_unknown_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["completion", "csh"]) == 2
    error = capsys.readouterr().err
    assert "csh" in error and error.count("\n") == 1
