"""Runs of tasks of captions, from their files to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mulki.app.cli import run_command
from mulki.errors import InputError
from mulki.report.comparison.compare import compare
from mulki.report.contents import read_contents
from mulki.report.figures import plots
from mulki.runs.answers import read_answers
from mulki.runs.folder import RunFolder
from mulki.runs.history import read_history
from mulki.runs.metrics import read_matrix
from mulki.runs.results import read_evaluations
from mulki.train.config.run_config import read_config, resolve
from tests.train.run_helpers import Run, check_same, resumed, stop_at, weights
from tests.train_helpers import same_state, write_pairs

METRICS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two tasks of captions, flags and animals."""
    root = tmp_path_factory.mktemp("stream")
    names = ("flags", "animals")
    flags, animals = (f"captions:{write_pairs(root / name, name, 8)}" for name in names)
    return flags, animals


def test_a_stream_of_captions(run: Run, stream: tuple[str, str]) -> None:
    folder = run(tasks=stream, method="mulki", lr=3e-3, iterations=12)
    path = folder.path
    assert folder.status == "complete" and folder.uses == ()
    lines = read_evaluations(path / "results.jsonl")
    assert [line.metric for line in lines] == METRICS * 6
    assert {line.n for line in lines} == {8}
    matrix = read_matrix(path / "matrix.csv")
    assert matrix.columns == matrix.tasks == ("flags", "animals")
    assert matrix.zero_shot is not None
    recall1 = [line.value for line in lines if line.metric == METRICS[0]]
    assert recall1 == [*matrix.zero_shot, *matrix.rows[0], *matrix.rows[1]]
    for row in read_answers(path).values():
        for name, each in row.items():
            assert each.seen is None and each.ranks is not None and each.said is not None
            assert len(each.own) == len(each.ranks.images) == len(each.ranks.texts) == 8, name
    summary = json.loads((path / "summary.json").read_text())
    assert summary["metrics"]["last"] == pytest.approx(sum(matrix.rows[1]) / 2)
    assert summary["class_incremental"]["after"] == {}
    assert summary["test_images"] == {"flags": 8, "animals": 8}
    said = (path / "summary.md").read_text()
    assert "recall@1 of captions by images in place of accuracy: flags, animals" in said
    assert "flags, after animals: image to text R@1 " in said
    assert run_command(["report", str(path)]) == 0
    assert len(list((path / "plots").glob("*.png"))) >= 3
    assert {plot.title for plot in plots(read_contents(path))} >= {"Recall@1 of each data set"}
    page = (path / "report.html").read_text()
    assert "Images and captions" in page and "Accuracy by class" not in page
    assert "not there" not in page
    assert not same_state(weights(path, "task_01*"), weights(path, "task_02*"))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mulki", "we_every": 2, "alpha": 0.8, "lock_text": True, "gate": "label",
         "hold_on": "task"},
        {"method": "mulki", "augment": "crop", "micro_batch": "2", "l2": 0.1},
        {"method": "wise_ft"},
    ],
)  # fmt: skip
def test_a_stopped_run_ends_as_if_it_had_not_been(
    run: Run,
    stream: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    whole = run("whole", tasks=stream, **options)
    folder = tmp_path / "logs" / "stopped"
    for go in (lambda: run("stopped", tasks=stream, **options), lambda: resumed(folder)):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
            stop_at(patch, 3, RuntimeError("stop"))
            go()
    check_same(resumed(folder).path, whole.path)


def test_captions_and_classes_mix(
    run: Run, stream: tuple[str, str], task_folders: tuple[str, str]
) -> None:
    folder = run(tasks=(task_folders[0], stream[0], task_folders[1]), method="mulki")
    alone = run("alone", tasks=task_folders, method="zero_shot")
    assert "vocabulary" in folder.uses[0]
    of_classes = {"ce", "alignment", "text_text", "image_anchor", "feature"}
    wanted = {"colours": of_classes, "flags": {"contrastive", "image_caption", "feature"}}
    for record in read_history(folder.path):
        terms = {name.removesuffix("_loss") for name in record.losses}
        assert terms == wanted.get(record.task, of_classes), record.task
    start, other = (read_answers(each.path)["zero-shot"] for each in (folder, alone))
    for name in ("colours", "shades"):
        assert start[name].own.tolist() == other[name].own.tolist()
    # All classes seen so far are those of the two other tasks.
    last = read_answers(folder.path)["shades"]
    assert last["flags"].seen is None
    assert len(last["colours"].seen) == 15 and len(last["shades"].seen) == 10  # type: ignore[arg-type]
    assert list(folder.class_incremental.after) == ["colours", "flags", "shades"]
    page = (folder.path / "report.html").read_text()
    assert "Images and captions" in page and "Accuracy by class" in page


@pytest.mark.parametrize(
    ("on", "of_classes", "of_captions"),
    [("image_caption", 0, 2), ("text_text", 2, 0), ("feature", 2, 2)],
)
def test_teachers_are_asked_in_the_tasks_that_have_their_terms(
    run: Run,
    stream: tuple[str, str],
    task_folders: tuple[str, str],
    on: str,
    of_classes: int,
    of_captions: int,
) -> None:
    names = ("image_caption", "text_text", "image_anchor", "feature", "feature_original")
    options = dict.fromkeys(names, 0.0) | {on: 0.25, "eliciting": False}
    folder = run(tasks=(stream[0], task_folders[0], stream[1]), method="mulki", **options)
    terms: dict[str, set[str]] = {}
    for record in read_history(folder.path):
        terms.setdefault(record.task, set()).update(record.losses)
        asked = of_captions if record.task in ("flags", "animals") else of_classes
        # No gate looks at images where texts alone are held.
        assert len(record.teacher_weights) == (asked if on != "text_text" else 0), record.task
    assert {task: f"{on}_loss" in found for task, found in terms.items()} == {
        "flags": of_captions > 0, "colours": of_classes > 0, "animals": of_captions > 0
    }  # fmt: skip


def test_the_label_space_of_all_leaves_captions_out(
    run: Run, stream: tuple[str, str], task_folders: tuple[str, str]
) -> None:
    options = {"method": "zero_shot", "label_space": "all"}
    both = run("both", tasks=(*stream, *task_folders), **options)
    alone = run("alone", tasks=task_folders, **options)
    found, wanted = (read_matrix(each.path / "matrix.csv").rows[-1] for each in (both, alone))
    assert found[2:] == wanted


def test_methods_that_do_not_learn_from_captions(
    run: Run, stream: tuple[str, str], tmp_path: Path
) -> None:
    refused: list[dict[str, Any]] = [
        {"method": "lwf"},
        {"method": "zscl", "reference": "current"},
        {"method": "mulki", "batch_size": 25},
    ]
    for options in refused:
        with pytest.raises(InputError, match="^--(method|batch-size): .*(flags|wise_ft)"):
            run(tasks=stream, **options)
    assert not (tmp_path / "logs").exists()


def test_options_about_classes_are_refused(
    run: Run, stream: tuple[str, str], task_folders: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="^--label-space all, --anchors none: "):
        run(tasks=stream, method="mulki", label_space="all", anchors="none")
    assert not (tmp_path / "logs").exists()
    run(tasks=(stream[0], task_folders[0]), method="zero_shot", label_space="all")


def test_runs_on_captions_are_compared(
    run: Run, stream: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        run(f"{method}-{seed}", tasks=stream, method=method, seed=seed).path
        for method in ("mulki", "finetune")
        for seed in (0, 1)
    ]
    (section,) = compare(folders, "finetune").sections
    assert section.tasks == ("flags", "animals")
    assert [each.label for each in section.differences] == ["mulki"]
    assert "cil_average" not in section.groups[0].means
    page = folders[0].parent / "comparison.html"
    assert run_command(["compare", *map(str, folders), "--html", str(page)]) == 0
    note = "ecall@1 of captions by images in place of accuracy: flags, animals"
    assert f"r{note}" in capsys.readouterr().out and f"R{note}." in page.read_text()


@pytest.fixture
def finished(run: Run, stream: tuple[str, str]) -> RunFolder:
    return run(tasks=stream, method="finetune")


def test_a_checkpoint_is_evaluated_again(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = read_evaluations(finished.path / "results.jsonl")
    wanted = {(e.eval_dataset, e.metric): e.value for e in lines if e.after_task == "animals"}
    assert run_command(["eval", str(finished.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == [] and found["all"] is None
    again = {(of["task"], name): of[name] for of in found["captions"] for name in METRICS}
    assert again == wanted
    assert run_command(["eval", str(finished.path)]) == 0
    table = capsys.readouterr().out
    assert f"{wanted['flags', METRICS[0]]:.2f}" in table and "weights" in table
    words = ["eval", str(finished.path), "--confusion", str(tmp_path / "c.csv")]
    assert run_command(words) == 2
    assert "--confusion: is about classes" in capsys.readouterr().err


def test_a_plan(
    finished: RunFolder, stream: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = resolve(read_config(finished.path / "args.yaml")).run
    words = ["plan", *stream, "--model", settings.model, "--batch-size", "6", "--iterations", "5"]
    assert run_command([*words, "--device", "cpu", "--precision", "fp32", "--json"]) == 0
    flags, animals = json.loads(capsys.readouterr().out)["tasks"]
    assert (flags["name"], flags["train"], flags["test"]) == ("flags", 24, 8)
    assert animals["learning"] > 0 and animals["testing"] > 0


def test_the_tasks_are_listed(stream: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tasks", *stream]) == 0
    out = capsys.readouterr().out
    assert "flags" in out and "the captions" in out and "24" in out
    assert run_command(["tasks", *stream, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {"name": "animals", "classes": []}
