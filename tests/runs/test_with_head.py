from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mulki.errors import InputError
from mulki.runs.answers import Answers, read_answers
from mulki.runs.folder import RunFolder
from mulki.runs.intervals import RunAnswers, paired_differences
from mulki.runs.metrics import HEAD_METRICS, ZERO_SHOT
from mulki.runs.reading import read_folder
from mulki.runs.results import read_evaluations
from mulki.runs.with_head import WithHead

TASKS = ("digits", "letters")


def right(*places: int) -> np.ndarray:
    return np.isin(np.arange(4), places)


def answers(own: np.ndarray, seen: np.ndarray | None, head: Answers | None = None) -> Answers:
    return Answers(own, seen, np.zeros(4, np.int32), None, head)


def run_with_heads(logs: Path, tasks: int = 2) -> RunFolder:
    run = RunFolder.create(
        logs, "run", method="lwf", order="I", seed=0, columns=TASKS, config={"model": "x"}
    )
    rows = [
        {name: answers(right(0), None) for name in TASKS},
        {
            "digits": answers(right(0, 1), right(0), answers(right(0, 1, 2), right(0, 1))),
            "letters": answers(right(0), None, answers(right(0), None)),
        },
        {
            "digits": answers(right(0), right(0), answers(right(0, 1), right(1))),
            "letters": answers(right(1, 2), right(1), answers(right(0, 1, 2, 3), right(1, 2))),
        },
    ]
    for after, row in list(zip((ZERO_SHOT, *TASKS), rows, strict=True))[: tasks + 1]:
        run.add_answers(after, row, seconds=dict.fromkeys(TASKS, 1.0), step=1)
    return run


def check_values(found: WithHead | None) -> None:
    assert found is not None
    assert found.matrix.rows == ((75.0, 25.0), (50.0, 100.0))
    assert found.class_incremental.after == {"digits": 50.0, "letters": 37.5}
    metrics = found.metrics()
    assert list(metrics) == list(HEAD_METRICS)
    assert metrics["head_last"] == 75.0 and metrics["head_forgetting"] == 25.0
    assert metrics["head_cil_last"] == 37.5


def test_results_with_a_head_stand_beside_those_of_texts(tmp_path: Path) -> None:
    run = run_with_heads(tmp_path)
    check_values(run.with_head)
    assert run.matrix.rows == ((50.0, 25.0), (25.0, 50.0))
    assert run.class_incremental.after == {"digits": 25.0, "letters": 25.0}
    lines = read_evaluations(run.path / "results.jsonl")
    by_metric = {m: [e.value for e in lines if e.metric == m] for m in {e.metric for e in lines}}
    assert by_metric["acc1_head"] == [75.0, 25.0, 50.0, 100.0]
    assert by_metric["acc1_seen_head"] == [50.0, 37.5] and len(by_metric["acc1"]) == 6
    check_values(read_folder(run.path).with_head)
    check_values(RunFolder.open(run.path).with_head)
    kept = read_answers(run.path)
    assert kept[ZERO_SHOT]["digits"].head is None
    of_head = kept["letters"]["letters"].head
    assert of_head is not None and of_head.said is not None and of_head.said.dtype == np.int32
    assert of_head.own.tolist() == [True] * 4 and of_head.seen.tolist() == right(1, 2).tolist()


def test_paired_differences_have_the_metrics_with_a_head(tmp_path: Path) -> None:
    found = RunAnswers.of_rows(read_answers(run_with_heads(tmp_path).path))
    assert found.head is not None and found.head.head is None
    worse = RunAnswers(found.own, found.seen, RunAnswers(found.own, found.seen))
    differences = paired_differences([found], [worse], resamples=20)
    assert differences["last"].value == 0 and differences["head_last"].value == 75 - 37.5
    assert differences["head_cil_last"].value == 12.5
    plain = RunAnswers(found.own, found.seen)
    assert not set(paired_differences([found], [plain], resamples=20)) & set(HEAD_METRICS)


def test_a_row_without_a_head_ends_them(tmp_path: Path) -> None:
    run = run_with_heads(tmp_path, tasks=1)
    row = {name: answers(right(0), right(0)) for name in TASKS}
    run.add_answers("letters", row, seconds=dict.fromkeys(TASKS, 1.0), step=2)
    assert run.with_head is None and read_folder(run.path).with_head is None
    assert RunFolder.open(run.path).with_head is None
    assert RunAnswers.of_rows(read_answers(run.path)).head is None


def test_they_are_as_old_as_the_matrix_and_whole(tmp_path: Path) -> None:
    run = run_with_heads(tmp_path)
    summary, results = (run.path / name for name in ("summary.json", "results.jsonl"))
    # As in a run that was killed before it wrote the summary of its last row.
    older = json.loads(summary.read_text())
    del older["with_head"], older["class_incremental"]["after"]["letters"]
    summary.write_text(json.dumps(older))
    found = read_folder(run.path)
    check_values(found.with_head)
    assert found.class_incremental.after == {"digits": 25.0, "letters": 25.0}
    lines = results.read_text().splitlines(keepends=True)
    for gone in (line for line in lines if "_head" in line):
        results.write_text("".join(line for line in lines if line != gone))
        assert read_folder(run.path).with_head is None
    results.unlink()
    assert read_folder(run.path).class_incremental.after == {}


@pytest.mark.parametrize("name", ["head_own/letters", "head_seen/digits", "head_said/letters"])
def test_damaged_answers_with_a_head(tmp_path: Path, name: str) -> None:
    run = run_with_heads(tmp_path)
    path = run.path / "answers" / "02_letters.npz"
    arrays = dict(np.load(path))
    del arrays["sha256"]
    short = arrays | {name: arrays[name][:3]}
    np.savez(path, **short)
    with pytest.raises(InputError, match=f"{name} has 3 images of 4"):
        read_answers(run.path)
    if not name.startswith("head_said"):
        del arrays[name]
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=f"{name} is missing"):
            read_answers(run.path)
