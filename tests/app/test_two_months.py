"""Three tasks this month; the next month a fourth one, from a copy of the checkpoint elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from mulki.app.cli import run_command
from mulki.runs.metrics import read_matrix
from tests import train_helpers
from tests.train_helpers import COLOURS, SHADES, write_task

start_model, tiny_models = train_helpers.start_model, train_helpers.tiny_models

TASKS = {
    "colours": COLOURS,
    "shades": SHADES,
    "warm": {"orange": (250, 150, 10), "pink": (250, 150, 180)},
    "cold": {"navy": (10, 10, 120), "cyan": (10, 240, 240)},
}
OPTIONS = "--method mulki --iterations 3 --batch-size 6 --lr 1e-3 --device cpu --precision fp32"


@pytest.mark.slow
def test_two_months(
    start_model: dict[str, str],
    tiny_models: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def mulki(line: str) -> str:
        with train_helpers.without_figures():
            status = run_command(line.split())
        out, error = capsys.readouterr()
        assert status == 0, error
        return out

    monkeypatch.chdir(tmp_path)
    for name, colours in TASKS.items():
        write_task(Path(name), colours)
    model = start_model["model"]
    mulki(f"run colours shades warm --model {model} --name first --seed 2 {OPTIONS}")
    mulki(f"run colours shades warm cold --model {model} --name whole --seed 2 {OPTIONS}")

    # The run folder and the images to train on are gone; what is left is elsewhere.
    shutil.copytree("logs/first/checkpoints/latest", "archive/model")
    shutil.rmtree("logs/first")
    for name in ("colours", "shades", "warm"):
        shutil.rmtree(Path(name, "train"))
    card = Path("archive/model/README.md").read_text()
    assert all(f"| {name} | " in card for name in ("colours", "shades", "warm"))
    assert " navy " not in mulki("predict archive/model cold/test --top 9")

    mulki("run cold --continue archive/model --name second")
    one, whole = (read_matrix(f"logs/{name}/matrix.csv") for name in ("second", "whole"))
    assert one.columns == whole.columns and one.zero_shot == whole.zero_shot
    # Of the models of the first month the last one is there.
    assert one.tasks == ("warm", "cold") and one.rows == whole.rows[2:]
    assert "shades" in Path("logs/second/report.html").read_text()

    said = mulki("predict logs/second cold/test --top 9 --csv said.csv")
    assert said == "said.csv: 10 images\n"
    _, *rows = Path("said.csv").read_text().splitlines()
    assert len(rows) == 10 and all(name in rows[0] for of in TASKS.values() for name in of)
    found = json.loads(mulki("eval logs/second --json"))
    again = [round(of["own"]["acc1"], 4) for of in found["tasks"]]
    assert tuple(again) == one.rows[-1]
    for source, to in (("archive/model", "exported"), ("logs/second", "exported-later")):
        assert "written" in mulki(f"export {source} --to huggingface {to}")
        assert (tmp_path / to / "model.safetensors").is_file()
    # Of the first month only the last task is in its matrix, so they are two parts of one page.
    compared = mulki("compare logs/second logs/whole").splitlines()
    assert {"warm, cold", "colours, shades, warm, cold"} <= {line.strip() for line in compared}

    # A third month, with two methods.
    write_task(Path("more"), {"white": (250, 250, 250), "grey": (128, 128, 128)})
    mulki("run more --continue logs/second --name third")
    assert read_matrix("logs/third/matrix.csv").tasks == ("warm", "cold", "more")
    mulki("run more --continue logs/second --name other --method finetune")
    assert "finetune" in mulki("compare logs/third logs/other")
    # What fails beside the results is a warning.
    assert "no examples of images" not in caplog.text and "no report" not in caplog.text
