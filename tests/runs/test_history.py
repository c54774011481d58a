from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mulki.runs.history import BINS, FILE, StepRecord, add_step, mean_seconds, read_history


def record(index: int, step: int, **values: Any) -> StepRecord:
    given = {"task": f"t{index}", "steps": 9, "total": 9 * index + step, "losses": {"ce_loss": 1.5}}
    return StepRecord(
        index=index, step=step, **{"lr": 0.1, "images_per_second": 2.0, **given, **values}
    )


def test_what_is_written_is_read_in_order(tmp_path: Path) -> None:
    records = [
        record(0, 1, prepared=2.5, memory_mib=10.0),
        record(0, 5, teacher_weights={"previous": [1] * BINS}, seconds={"loading": 0.1}),
        record(1, 1, prototype_drift={"mean": 0.1, "max": 0.2}),
    ]
    for each in records:
        add_step(tmp_path, each)
    assert read_history(tmp_path) == records


def test_of_a_step_that_was_made_twice_the_later_counts(tmp_path: Path) -> None:
    for each in (record(0, 1), record(0, 5, lr=0.5), record(0, 3), record(0, 5, lr=0.25)):
        add_step(tmp_path, each)
    assert [(each.step, each.lr) for each in read_history(tmp_path)] == [
        (1, 0.1), (3, 0.1), (5, 0.25)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        '{"task": "t0", "ind',
        "[]",
        "7",
        "{}",
        json.dumps({**record(0, 2).__dict__, "losses": [1]}),
        json.dumps({**record(0, 2).__dict__, "lr": "fast"}),
        json.dumps({**record(0, 2).__dict__, "lr": float("inf")}),
        json.dumps({**record(0, 2).__dict__, "task": 5}),
        json.dumps({**record(0, 2).__dict__, "total": 10**400}),
        json.dumps({**record(0, 2).__dict__, "losses": {"ce_loss": None}}),
        json.dumps({**record(0, 2).__dict__, "teacher_weights": {"previous": [1, 2]}}),
        json.dumps({**record(0, 2).__dict__, "teacher_weights": {"previous": 3}}),
    ],
)
def test_a_damaged_line_is_left_out(tmp_path: Path, line: str) -> None:
    add_step(tmp_path, record(0, 1))
    with (tmp_path / FILE).open("a") as stream:
        stream.write(line + "\n")
    add_step(tmp_path, record(0, 3))
    assert [each.step for each in read_history(tmp_path)] == [1, 3]


def test_a_line_after_one_that_was_cut_off_is_kept(tmp_path: Path) -> None:
    add_step(tmp_path, record(0, 1))
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"task": "t0", "ind')
    add_step(tmp_path, record(0, 3))
    add_step(tmp_path, record(0, 5))
    assert [each.step for each in read_history(tmp_path)] == [1, 3, 5]


def test_a_record_counts_as_often_as_it_has_steps() -> None:
    # The first step is slow, and lines stand for 1, 9 and 10 steps.
    slow, *others = [{"loading": 8.0, "rest": 0.5}, {"loading": 1.0}, {"loading": 2.0}]
    history = [record(0, 1, seconds=slow), record(0, 10, seconds=others[0]), record(0, 15)]
    history.append(record(0, 25, seconds=others[1]))
    assert mean_seconds(history) == {"loading": (8 + 9 + 20) / 20, "rest": 0.5 / 20}
    assert mean_seconds([record(0, 0, seconds=slow)]) == slow
    assert mean_seconds([record(0, 1)]) == mean_seconds([]) == {}


def test_a_folder_without_it_has_none(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
