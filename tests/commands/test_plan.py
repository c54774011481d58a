from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mulki.cli import run_command
from mulki.commands import plan as command

Refused = Callable[[Sequence[object]], str]


@pytest.fixture
def words(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    monkeypatch.chdir(tmp_path)
    fixed = ["--device", "cpu", "--precision", "fp32", "--batch-size", "4", "--iterations", "9"]
    return ["plan", *task_folders, "--model", start_model["model"], *fixed]


def test_a_plan_is_printed_and_nothing_is_written(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([*words, "--name", "first"]) == 0
    out, said = capsys.readouterr()
    lines = out.splitlines()
    heads = [line[:8].strip() for line in lines if line[:1].isalpha() and line[8:9] == " "]
    for head in ("run", "model", "device", "kernels", "steps", "memory", "stored", "needs", "fits"):
        assert heads.count(head) == 1, head
    assert any(line.startswith("time") and "whole run" in line for line in lines)
    assert all(len(line) <= 80 for line in lines if line.startswith(("needs", "fits")))
    assert lines[-1].startswith("before: until its first step") and len(lines[-1]) <= 80
    rows = {
        line.split()[0]: line.split()[1:5] for line in lines if line[:7] in ("colours", "shades ")
    }
    assert rows == {"colours": ["3", "18", "15", "9"], "shades": ["2", "12", "10", "9"]}
    assert "measuring task 2 of 2, shades" in said
    assert not list(tmp_path.iterdir())


def test_a_plan_as_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*words, "--json", "--method", "zero_shot"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["downloads"], found["stored"]) == ("zero_shot", [], 0)
    assert found["parameters"] > found["trainable"] > 0
    assert [each["name"] for each in found["tasks"]] == ["colours", "shades"]


def test_weights_that_would_be_downloaded_are_named_and_not_loaded(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def far(model: str, pretrained: str | None) -> str:
        asked.append((model, pretrained))
        return "owner/weights"

    monkeypatch.setattr(command, "weights_to_download", far)
    words[words.index("--model") + 1] = "tiny-vit"
    words += ["--pretrained", "best", "--method", "zero_shot"]
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert "download owner/weights, about" in out and asked == [("tiny-vit", "best")]
    assert run_command([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (download,) = found["downloads"]
    wanted = {"from": "owner/weights", "bytes": 4 * found["parameters"], "estimated": True}
    assert download == wanted


def test_a_batch_that_does_not_fit_is_told(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mulki.engine.memory.free_memory", lambda device: 0)
    words += ["--method", "finetune"]
    assert run_command(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    said = "fits 1 image at a time in half of the free memory, but a step has 4: pass --micro-batch"
    assert f"{said} auto" in out
    assert run_command([*words, "--micro-batch", "1"]) == 0
    (fits,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("fits"))
    assert "--micro-batch" not in fits


def test_what_a_run_refuses_a_plan_refuses(
    words: list[str], refused: Refused, tmp_path: Path, finished: Path
) -> None:
    assert "--seeds" in refused([*words, "--seeds", "0", "1"])
    assert "--resume" in refused(["plan", "--resume", finished])
    taken = ["--logs", finished.parent, "--name", finished.name]
    assert "exists and is not empty" in refused([*words, *taken])
    assert "no such option" in refused([*words, "--no-such-option", "1"])
    words[1] = str(tmp_path / "nothing")
    assert "nothing" in refused(words)
