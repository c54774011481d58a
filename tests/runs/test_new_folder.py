from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from mulki.errors import InputError
from mulki.report import write_report
from mulki.runs.metrics import ZERO_SHOT
from mulki.runs.new_folder import check_free, default_name
from tests import ROOT
from tests.runs.folder_helpers import make, row


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    run = make(tmp_path)
    run.add_row(ZERO_SHOT, row(1, 2, 3))
    before = sorted(path.read_bytes() for path in run.path.iterdir())
    with pytest.raises(InputError, match="not empty; give another --name, or remove it") as caught:
        make(tmp_path)
    assert str(tmp_path / "first") in str(caught.value)
    assert sorted(path.read_bytes() for path in run.path.iterdir()) == before


def test_a_folder_whose_run_never_began_is_taken_again(tmp_path: Path) -> None:
    run = make(tmp_path, config={"lr": 1})
    (run.path / "out.log").write_text("hello\n")
    (run.path / ".args.yaml.12345.tmp").write_text("half")
    with pytest.raises(InputError, match="first"):
        make(tmp_path)
    with pytest.raises(InputError, match="first"):
        check_free(tmp_path, "first")
    del run
    check_free(tmp_path, "first")
    again = make(tmp_path, config={"lr": 2})
    assert yaml.safe_load((again.path / "args.yaml").read_text()) == {"lr": 2}
    assert sorted(os.listdir(again.path)) == ["args.yaml", "env.json", "summary.json"]


@pytest.mark.parametrize("files", [["args.yaml"], ["env.json", "notes.txt"], ["out.log"]])
def test_a_folder_that_may_be_the_users_is_not_taken(tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "first").mkdir()
    for file in files:
        (tmp_path / "first" / file).write_text("mine")
    with pytest.raises(InputError, match="first"):
        make(tmp_path)
    assert all((tmp_path / "first" / file).read_text() == "mine" for file in files)


PAIR = f"""
import sys, types
package = types.ModuleType("mulki")
package.__path__ = [{str(ROOT / "mulki")!r}]
sys.modules["mulki"] = package
import mulki.runs.folder
mulki.runs.folder.environment = lambda hashes: {{}}
for number in range(5):
    sys.stdin.readline()
    try:
        run = mulki.runs.folder.RunFolder.create(
            sys.argv[1], str(number), method="m", order="I", seed=0, columns=("a",), config={{}}
        )
        print("made", flush=True)
    except ValueError:
        print("refused", flush=True)
    sys.stdin.readline()  # the folder is kept until the other one has answered
"""


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PAIR, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    pair: list[Any] = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]

    def go_on() -> None:
        for process in pair:
            process.stdin.write("\n")
            process.stdin.flush()

    try:
        for _ in range(5):
            go_on()
            said = sorted(process.stdout.readline() for process in pair)
            assert said == ["made\n", "refused\n"]
            go_on()
    finally:
        for process in pair:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "..", ".", "a\\b", "/a", "a\nb", "a\0", "caf\udce9", "\x1b[2J"]
)
def test_a_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="--name"):
        make(tmp_path / "logs", name)
    assert not (tmp_path / "logs").exists()


def test_logs_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--logs: got '.*caf\\udce9', not UTF-8"):
        check_free(tmp_path / "caf\udce9", None)


def test_logs_that_are_a_file(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(InputError, match="--logs"):
        make(tmp_path / "logs")


def test_wrong_columns_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='"a"'):
        make(tmp_path, columns=("a", "a"))
    assert not list(tmp_path.iterdir())


def test_default_names(tmp_path: Path) -> None:
    now = datetime(2026, 11, 25, 13, 4, 5)
    config: dict[str, object] = {"tasks": ["data/birds/", "embedded:flags"], "model": "ViT-B/32"}
    name = default_name("mulki", "II", 7, config, now)
    assert name == "2026_11_25-13_04_05-birds_embedded_flags-vit_b_32-mulki-order_ii-seed_7"
    assert default_name("a/b", "I", 0, {}, now) == "2026_11_25-13_04_05-a_b-order_i-seed_0"
    many = default_name("a", "I", 0, {"tasks": ["x" * 200] * 3}, now)
    assert len(many) < 80


def test_unnamed_runs_of_one_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mulki.runs.folder.default_name", lambda *_: "now")
    assert [make(tmp_path, None).name for _ in range(3)] == ["now", "now-2", "now-3"]


def test_a_report_of_a_run_that_never_began_does_not_keep_its_name(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.finish("interrupted")
    run.release()
    write_report(run.path, figures=True)
    make(tmp_path)
    assert sorted(os.listdir(run.path)) == ["args.yaml", "env.json", "summary.json"]


def test_curves_of_a_run_that_ended_before_its_first_row_go(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path) as run:
        (run.path / "tensorboard").mkdir()
        (run.path / "tensorboard" / "old").touch()
        raise KeyboardInterrupt
    run.release()
    assert not (make(tmp_path).path / "tensorboard").exists()
