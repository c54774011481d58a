from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mulki.app.cli import run_command
from mulki.app.commands.grid import whole
from mulki.errors import InputError
from mulki.report.comparison.compare import compare
from mulki.train import grid
from mulki.train.config.run_config import Settings
from tests.train_helpers import COLOURS, write_split

Refused = Callable[[Sequence[object]], str]


@pytest.fixture
def words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_model: dict[str, str],
    task_folders: tuple[str, str],
) -> list[str]:
    """A short run of two tasks, its folders in tmp_path/logs."""
    monkeypatch.chdir(tmp_path)
    fixed = "--device cpu --precision fp32 --batch-size 4 --iterations 2".split()
    return ["run", "--tasks", *task_folders, "--model", start_model["model"], *fixed]


def test_seeds_and_methods_make_a_grid_that_is_compared(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, "--methods", "finetune", "zero_shot", "--seeds", "0", "1", "--name", "g"]
    assert run_command(given) == 0
    out, said = capsys.readouterr()
    assert "less finetune" in out and "±" in out and said.count("is new") == 4
    folder = tmp_path / "logs" / "g"
    assert {path.name for path in folder.iterdir()} == {
        *(f"{m}-order_I-seed_{s}" for m in ("finetune", "zero_shot") for s in (0, 1)),
        "comparison.json",
        "comparison.html",
        "comparison.txt",
    }
    found = json.loads((folder / "comparison.json").read_text())
    (section,) = found["sections"]
    assert [group["seeds"] for group in section["groups"]] == [[0, 1], [0, 1]]
    assert section["baseline"] == "finetune" and section["differences"][0]["pairs"] == 2
    assert (folder / "comparison.txt").read_text() in out
    assert out.splitlines()[-1] == f"open: {Path('logs', 'g', 'comparison.html')}"
    # Its folder, all that lies in it, and a folder of runs and grids are compared likewise.
    logs = Path("logs")
    for given_folders in ([logs / "g"], sorted((logs / "g").iterdir()), list(logs.iterdir())):
        again = compare(given_folders)
        assert again.to_dict()["sections"] == found["sections"]

    assert run_command(given) == 0
    assert capsys.readouterr().err.count("is complete") == 4


def test_orders_are_compared_over_orders(
    start_model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "run embedded --preset quick --limit-images 10 --method zero_shot --name g".split()
    logs = ["--logs", str(tmp_path), "--no-save-checkpoints", "--model", start_model["model"]]
    assert run_command([*given, *logs, "--orders", "I", "II"]) == 0
    out = capsys.readouterr().out
    assert "over orders" in out
    found = json.loads((tmp_path / "g" / "comparison.json").read_text())
    assert len(found["sections"]) == 2 and found["orders"][0]["orders"] == 2


def test_bad_input(words: list[str], refused: Refused, tmp_path: Path) -> None:
    for more, said in (
        (["--seeds", "0", "--seed", "1"], "--seed: got it beside --seeds"),
        (["--seeds", "0", "0"], "--seeds: got 0 twice"),
        (["--seeds", "x"], "--seeds: got 'x', wanted a whole number from 0"),
        (["--seeds", "0", "--jobs", "0"], "--jobs: got '0', wanted a whole number from 1"),
        (["--methods", "finetune", "no_such"], "no_such"),
        (["--methods", "finetune", "lwf", "--method", "mulki"], "--method: got it beside"),
        (["--methods", "ewc", "finetune", "--distill-weight", "1"], "ewc has no such option"),
        (["--method", "ewc", "finetune", "--distill-weight", "1"], "ewc has no such option"),
        (["--methods", "ewc", "finetune", "--nothing", "1"], "--nothing: no such option"),
        (["--methods", "finetune", "lwf", "--distill-weight", "x"], "--distill-weight: got 'x'"),
        (["--orders", "I", "II"], "orders belong to a named sequence"),
    ):
        assert said in refused([*words, *more]), more
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("flags", [["--methods"], ["--method"]])
def test_an_option_is_for_the_methods_that_have_it(
    words: list[str], monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(grid, "run", lambda settings, *_, **__: seen.append(settings))
    given = [*words, *flags, "finetune", "lwf", "mulki", "--distill-weight", "0.5", "--l2", "0.2"]
    Path("own.yaml").write_text("method: mulki\nfeature: 0.3\nlr: 0.5\n")
    assert run_command([*given, "--config", "own.yaml"]) == 2  # nothing to compare
    options = {settings.run.method: settings.method for settings in seen}
    assert list(options) == ["finetune", "lwf", "mulki"]
    assert getattr(options["lwf"], "distill_weight") == 0.5  # noqa: B009
    assert not hasattr(options["finetune"], "distill_weight")
    assert {name: getattr(options["mulki"], name) for name in ("l2", "feature")} == {
        "l2": 0.2, "feature": 0.3
    }  # fmt: skip
    assert {settings.run.lr for settings in seen} == {0.5}


def test_the_help_of_a_grid_has_the_options_of_its_methods(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_command(["run", "--methods", "lwf", "lwf_vr", "--help-all"])
    said = capsys.readouterr().out
    assert "method lwf:" in said and "method lwf_vr:" in said
    assert said.count("  --distill-weight DISTILL") == 1 and "--hold-on" not in said


def test_a_file_of_options_gives_way_to_lists(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(grid, "run", lambda settings, *_, **__: seen.append(settings.run))
    Path("args.yaml").write_text("seed: 7\nlr: 0.5\nmethod: finetune\n")
    # The runs are not made, so there is nothing to compare.
    assert run_command([*words, "--config", "args.yaml", "--seeds", "1", "2"]) == 2
    assert [(run.seed, run.lr, run.method) for run in seen] == [
        (1, 0.5, "finetune"),
        (2, 0.5, "finetune"),
    ]


@pytest.mark.parametrize("value", ["", "-1", "1.5", "²", "1_0", "two"])
def test_numbers_that_are_not_whole(value: str) -> None:
    with pytest.raises(InputError, match=f"--x: got {value!r}"):
        whole("--x", value, 0)
    assert whole("--x", "12", 0) == 12


def test_every_seed_tests_the_same_images_of_a_task_without_a_split(
    words: list[str], tmp_path: Path
) -> None:
    write_split(tmp_path / "whole", COLOURS, 5)
    given = [*words[:2], str(tmp_path / "whole"), *words[4:], "--test-fraction", "0.4"]
    given += ["--method", "finetune", "--seeds", "0", "1", "--name", "g"]
    assert run_command(given) == 0
    one, other = (tmp_path / "logs" / "g" / f"finetune-order_I-seed_{seed}" for seed in (0, 1))
    hashes = [json.loads((each / "env.json").read_text())["hashes"] for each in (one, other)]
    assert hashes[0]["splits"] == hashes[1]["splits"] and [*hashes[0]["splits"]] == ["whole"]
    assert yaml.safe_load((one / "args.yaml").read_text())["test_fraction"] == 0.4
