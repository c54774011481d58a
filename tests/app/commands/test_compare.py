from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mulki.app.cli import run_command
from tests import cli_helpers
from tests.cli_helpers import one_line

command = cli_helpers.command


def test_compare(
    command: Callable[..., int], task_folders: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("finetune", "mulki"):
        given = f"--method {name} --iterations 2 --logs logs --name {name}".split()
        assert command(*task_folders, *given) == 0
    capsys.readouterr()
    assert run_command(["compare", "logs/finetune", "logs/mulki", "--json"]) == 0
    (section,) = json.loads(capsys.readouterr().out)["sections"]
    assert section["tasks"] == ["colours", "shades"] and section["baseline"] == "finetune"
    (difference,) = section["differences"]
    assert "images" in difference["over"] and difference["metrics"].keys() == {
        "transfer", "average", "last", "forgetting", "cil_average", "cil_last",
        "head_average", "head_last", "head_forgetting", "head_cil_average", "head_cil_last",
    }  # fmt: skip
    assert run_command(["compare", "logs/finetune", "logs/mulki", "--baseline", "mulki"]) == 0
    out = capsys.readouterr().out
    assert "colours, shades" in out and "less mulki" in out and "CIL average" in out
    assert run_command(["compare", "logs/mulki", "--baseline", "lwf"]) == 2
    assert "--baseline" in one_line(capsys)
    assert run_command(["compare", "--html", "logs", "logs/mulki"]) == 2
    assert "--html: got logs, but it is a folder" in one_line(capsys)
    Path("taken").touch()
    assert run_command(["compare", "logs/mulki", "--figures", "taken"]) == 2
    assert "--figures: got taken, which is a file" in one_line(capsys)
    # Numbers alone on standard output, with one run whose file is gone.
    Path("logs/finetune/args.yaml").rename("kept.yaml")
    given = ["logs/finetune", "logs/mulki", "--json", "--html", "all.html", "--figures", "drawn"]
    assert run_command(["compare", *given]) == 0
    out, error = capsys.readouterr()
    assert "args.yaml is not there" in json.loads(out)["warnings"][0]
    assert error == "page: all.html\nfigures: drawn\n"
    assert "<h2>colours, shades</h2>" in Path("all.html").read_text()
    assert {path.suffix for path in Path("drawn").iterdir()} == {".png", ".svg"}
    Path("kept.yaml").rename("logs/finetune/args.yaml")
    # A report of a run, and of one whose process was killed.
    Path("logs/finetune/matrix.csv").unlink()
    assert run_command(["report", "logs/mulki", "logs/finetune"]) == 0
    pages = capsys.readouterr().out.splitlines()
    assert pages == [str(Path("logs", name, "report.html")) for name in ("mulki", "finetune")]
    page, damaged = (Path(each).read_text() for each in pages)
    assert "Missing in this folder" not in page and page.count("<svg") == 10
    assert "matrix.csv is not there" in damaged
    assert (Path("logs/mulki/plots") / "losses.png").exists()
