from __future__ import annotations

from pathlib import Path

import pytest

from mulki.app.cli import run_command
from mulki.bench.report import COLUMNS


def bench(*arguments: str) -> int:
    return run_command(["bench", *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "siglp"], ["--ops", "siglp", '"siglip"']),
        (["--budget", "-1"], ["--budget"]),
        (["plot", "gone.csv", "out"], ["gone.csv"]),
        (["--dtypes", "fp8"], ["--dtypes", "fp8", "bfloat16"]),
        (["--modes", "sideways"], ["--modes", "sideways", "backward"]),
        (["--providers", "eagre"], ["--providers", '"eager"']),
        (["--shapes", "64"], ["--shapes", "64", "NxPxD"]),
        (["--shapes", "64x0"], ["--shapes", "64x0"]),
        (["--shapes", "64x10x"], ["--shapes", "64x10x"]),
        (["--shapes", "6x-5"], ["--shapes", "6x-5"]),
        (["--shapes", "6x5", "--ops", "siglip", "contrastive"], ["--shapes", "6x5", "N = P"]),
        (["--shapes", "6x5", "--quick"], ["--quick", "--shapes"]),
        (["--shapes"], ["--shapes", "mulki bench --help"]),
        (["--seconds", "0"], ["--seconds"]),
        (["--seconds", "fast"], ["--seconds", "fast"]),
        (["--threads", "-1"], ["--threads", "-1"]),
        (["--device", "toaster"], ["--device", "toaster", "cpu"]),
        (["--device", "meta"], ["--device", "meta", "cpu"]),
        (["--output", "gone/ops.csv"], ["gone/ops.csv"]),
        (["--output", "other.csv"], ["other.csv", "not a CSV of this benchmark"]),
        (["--bogus"], ["--bogus"]),
        (["tabel", "ops.csv"], ["tabel"]),
        (["table"], ["CSV"]),
        (["table", "gone.csv"], ["gone.csv", "No such file"]),
        (["table", "other.csv"], ["other.csv", "not a CSV of this benchmark"]),
        (["table", "damaged.csv"], ["damaged.csv, line 2"]),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("a,b\n1,2\n")
    Path("damaged.csv").write_text(",".join(COLUMNS) + "\nsimilarity,eager\n")
    assert bench(*arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("mulki: error: ") and error.count("\n") == 1
    assert all(part in error for part in said), error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        bench("--help")
    out = capsys.readouterr().out
    assert leave.value.code == 0
    assert all(word in out for word in ("--shapes", "--providers", "dual_teacher_kl", "--output"))
    assert "mulki bench plot ops.csv figures" in out and "--shapes 2048x345x768" in out
