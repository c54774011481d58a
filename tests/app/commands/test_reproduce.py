from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml
from rich.cells import cell_len

from mulki.app.cli import run_command
from mulki.data.published.rows import published_rows
from mulki.runs.metrics import read_matrix
from mulki.train import grid

Refused = Callable[[Sequence[object]], str]


@pytest.fixture
def rows(start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path) -> Path:
    """A file of one benchmark: two easy tasks, with figures that no run can miss, and others."""
    short = {"iterations": 2, "batch_size": 4, **start_model}
    content = {
        "band": 50.0,
        "sources": {"us": "a fixture"},
        "methods": {
            "tuned": {"title": "Tuned", "run": {"method": "finetune", **short}},
            "other": {"title": "Other", "protocol": "coop"},
        },
        "benchmarks": {
            "two": {
                "title": "two tasks",
                "run": {"tasks": list(task_folders)},
                "rows": {
                    "tuned": {"figures": [50, 50, 50], "source": "us"},
                    "other": {"figures": [None, 99, None], "source": "us"},
                },
            },
            "hard": {
                "title": "two tasks, beyond reach",
                "run": {"tasks": list(task_folders)},
                "rows": {"tuned": {"figures": [500, None, 50], "source": "us"}},
            },
        },
    }
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_row_is_run_and_judged(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--rows", str(rows), "--logs", str(tmp_path / "logs"), "--device", "cpu"]
    assert run_command(["reproduce", "tuned-two", *fixed, "--seeds", "0", "1"]) == 0
    out, said = capsys.readouterr()
    assert "verdict: reproduced" in out and "a fixture" in out and "0.00 to 100.00" in out
    assert said.count("is new") == 2
    # The runs are there; only the verdict is made again.
    assert run_command(["reproduce", "tuned-two", *fixed, "--seeds", "0", "1", "--json"]) == 0
    out, said = capsys.readouterr()
    found = json.loads(out)
    assert said.count("is complete") == 2 and found["verdict"] == "reproduced"
    assert [each["metric"] for each in found["figures"]] == ["transfer", "average", "last"]
    assert all(each["half_width"] is not None for each in found["figures"])
    # Those runs against a row whose Transfer is out of reach.
    runs = ["--runs", *found["runs"]]
    assert run_command(["reproduce", "tuned-hard", "--rows", str(rows), *runs]) == 1
    out = capsys.readouterr().out
    assert "verdict: not reproduced" in out and "below the band" in out
    # And in the list, but for one that is not complete.
    summary = Path(found["runs"][1], "summary.json")
    summary.write_text(summary.read_text().replace('"complete"', '"interrupted"'))
    assert run_command(["reproduce", "--list", "--rows", str(rows), *runs]) == 0
    out = capsys.readouterr().out
    assert out.count("finetune, ours:") == 2  # in both benchmarks
    assert f"left out: {found['runs'][1]} is interrupted" in out
    assert run_command(["reproduce", "--list", "--json", "--rows", str(rows), *runs]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in listed if "name" in each] == list(published_rows(rows))
    ours = [each for each in listed if "run" in each]
    assert {each["benchmark"] for each in ours[:2]} == {"two tasks", "two tasks, beyond reach"}
    for each in ours[:2]:
        assert (each["run"], each["method"]) == (found["runs"][0], "finetune")
        wanted = read_matrix(Path(each["run"], "matrix.csv")).metrics().to_dict()
        assert each["figures"].items() >= wanted.items()
    assert ours[2:] == [{"run": found["runs"][1], "status": "interrupted"}]


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    sources = list(dict.fromkeys(row.source for row in published_rows().values()))
    for name, row in published_rows().items():
        lines = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert all(f"{value:.2f}" in lines[0] for value in row.figures.values())
        assert len(lines) > 1 and f"[{sources.index(row.source) + 1}]" in " ".join(lines)
    tables = out.partition("Sources:")[0]
    assert max(map(cell_len, tables.splitlines())) <= 80
    assert "Conceptual Captions" in out and "DPW (CVPR 2026, arXiv 2604.18075)" in out
    assert run_command(["reproduce", "--list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(published_rows())


def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(config: dict[str, Any], **options: Any) -> str:
        raise OSError("no route to\nhost")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    logs = tmp_path / "logs"
    given = ["reproduce", "zscl-mtil-order1", "--data-root", str(tmp_path), "--logs", str(logs)]
    assert run_command(given) == 1
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("- ")]
    for name in ("aircraft", "stanfordcars", "sun397", "mnist"):
        assert sum(line.startswith(f"- {name}: ") for line in lines) == 1, name
    assert len([line for line in lines if "--data-root" in line or "instead" in line]) >= 9
    (weights,) = (line for line in lines if line.startswith("- --model"))
    assert "--pretrained openai" in weights and "no route to host" in weights
    assert any(line.startswith("- --reference: ") for line in lines)
    assert not logs.exists()
    assert run_command([*given, "--json"]) == 1
    lacking = json.loads(capsys.readouterr().out)
    assert lacking == {
        "row": "zscl-mtil-order1", "missing": [line.removeprefix("- ") for line in lines]
    }  # fmt: skip
    # Without a data root it says that, once.
    assert run_command(["reproduce", "mulki-mtil-order1"]) == 1
    out = capsys.readouterr().out
    assert out.count("- --data-root: ") == 1 and out.count("\n- ") == 2


def test_bad_input(refused: Refused, rows: Path, tmp_path: Path) -> None:
    assert "did you mean" in refused(["reproduce", "zscl-mtil-order3"])
    assert "--list" in refused(["reproduce"])
    assert "--list" in refused(["reproduce", "zscl-mtil-order1", "--list"])
    assert "mulki has no recipe for it" in refused(["reproduce", "dpw-mtil-order1"])
    assert "cannot be read" in refused(["reproduce", "--list", "--rows", tmp_path])
    assert "--seeds" in refused(["reproduce", "tuned-two", "--rows", rows, "--seeds", "-x"])
    other = tmp_path / "other.yaml"
    content = yaml.safe_load(rows.read_text())
    content["benchmarks"]["two"]["metrics"] = ["transfer", "average", "acc"]
    other.write_text(yaml.safe_dump(content))
    assert "got acc" in refused(["reproduce", "tuned-two", "--rows", other])
    assert "no matrix.csv" in refused(["reproduce", "dpw-mtil-order1", "--runs", tmp_path])
    for option in ("--lr", "--vocabulary"):
        assert option in refused(["reproduce", "zscl-mtil-order1", option, "1"])
    twice = ["reproduce", "tuned-two", "--rows", rows, "--seeds", "0", "00"]
    assert "--seeds: got 0 twice" in refused(twice)
    judged = ["reproduce", "tuned-two", "--rows", rows, "--runs", tmp_path]
    for option in ("--seeds", "--jobs", "--data-root"):
        assert f"{option}: no run is made with --runs" in refused([*judged, option, "1"])
        assert f"{option}: no run is made with --list" in refused(
            ["reproduce", "--list", option, "1"]
        )


def test_a_run_given_twice_counts_once(
    rows: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(rows.read_text())
    options = yaml.safe_load((finished / "args.yaml").read_text())
    content["methods"]["tuned"]["run"] = {k: v for k, v in options.items() if k != "tasks"}
    content["benchmarks"]["two"]["run"] = {"tasks": options["tasks"]}
    rows.write_text(yaml.safe_dump(content))
    runs = [str(finished), str(finished / ".." / finished.name)]
    given = ["reproduce", "tuned-two", "--rows", str(rows), "--json", "--runs", *runs]
    assert run_command(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 1
    assert [each["half_width"] for each in found["figures"]] == [None] * 3


def test_under_torchrun_the_first_process_judges(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other processes may be done before the first has written the last summary.
    def ends_early(cells: Any, jobs: int, console: Any) -> None:
        assert console.quiet

    monkeypatch.setattr(grid, "run_cells", ends_early)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = ["--rows", str(rows), "--logs", str(tmp_path / "logs"), "--device", "cpu"]
    assert run_command(["reproduce", "tuned-two", *given]) == 0
    assert capsys.readouterr() == ("", "")
