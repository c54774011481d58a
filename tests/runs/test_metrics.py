from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulki.errors import InputError
from mulki.runs.metrics import (
    DEFINITIONS,
    HEAD_METRICS,
    ZERO_SHOT,
    AccuracyMatrix,
    ClassIncremental,
    Metrics,
    compute_metrics,
    read_matrix,
    stacked_metrics,
    write_matrix,
)
from tests import FIXTURES

PUBLISHED: dict[str, Any] = json.loads(
    (FIXTURES / "published_matrices.json").read_text(encoding="utf-8")
)
CASES = [(name, order) for name in PUBLISHED if name != "source" for order in PUBLISHED[name]]

# Transfer, Average and Last of the same runs as published tables print them, to one decimal.
PRINTED = {
    ("zero-shot", "I"): (69.4, 65.3, 65.3),
    ("continual fine-tuning", "I"): (44.6, 55.9, 77.3),
    ("ZSCL", "I"): (68.1, 75.4, 83.6),
    ("ZSCL", "II"): (64.2, 74.5, 83.4),
}

# A slow or busy machine is no failure.
unhurried = settings(deadline=None)

percent = st.integers(0, 1_000_000).map(lambda n: n / 10_000)


@st.composite
def matrices(draw: st.DrawFn, min_size: int = 2) -> AccuracyMatrix:
    """Matrices with learned and unlearned columns in any order, with or without zero-shot."""
    total = draw(st.integers(min_size, 6))
    names = [f"set {i}" for i in range(total)]
    learned = draw(st.permutations(names))[: draw(st.integers(min_size, total))]
    row = st.tuples(*[percent] * total)
    return AccuracyMatrix(
        columns=tuple(names),
        tasks=tuple(learned),
        rows=tuple(draw(row) for _ in learned),
        zero_shot=draw(st.none() | row),
    )


squares = matrices().map(AccuracyMatrix.square)


def by_the_formula(a: np.ndarray) -> Metrics:
    """The definitions written out with 1-based loops, as the papers print them."""
    size = len(a)

    def at(i: int, j: int) -> float:
        return float(a[i - 1, j - 1])

    everything = range(1, size + 1)
    old = range(1, size)
    return Metrics(
        transfer=sum(sum(at(i, j) for i in range(1, j)) / (j - 1) for j in range(2, size + 1))
        / (size - 1),
        average=sum(at(i, j) for i in everything for j in everything) / size**2,
        last=sum(at(size, j) for j in everything) / size,
        forgetting=sum(max(at(i, j) for i in range(j, size)) - at(size, j) for j in old)
        / (size - 1),
        bwt=sum(at(size, j) - at(j, j) for j in old) / (size - 1),
    )


def close(metrics: Metrics, expected: Metrics) -> bool:
    return metrics.to_dict() == pytest.approx(expected.to_dict(), abs=1e-9)


@pytest.mark.parametrize(("name", "order"), CASES)
def test_published_matrices(name: str, order: str) -> None:
    published = PUBLISHED[name][order]
    metrics = compute_metrics(published["matrix"])
    assert metrics.transfer == pytest.approx(published["Transfer"], abs=0.01)
    assert metrics.average == pytest.approx(published["Avg"], abs=0.01)
    assert metrics.last == pytest.approx(published["Last"], abs=0.01)


@pytest.mark.parametrize(("name", "order"), PRINTED)
def test_printed_numbers(name: str, order: str) -> None:
    metrics = compute_metrics(PUBLISHED[name][order]["matrix"])
    found = (metrics.transfer, metrics.average, metrics.last)
    assert found == pytest.approx(PRINTED[name, order], abs=0.06)


def test_all_published_matrices_are_there() -> None:
    assert len(CASES) == 16


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_total_forgetting(tasks: int) -> None:
    # Every task falls from 100 to 0 as soon as the next is learned. Code that leaves the last
    # but one task out of the sum gives 0, 50 and 66.7 here.
    a = 100.0 * np.eye(tasks)
    found = compute_metrics(a)
    assert (found.forgetting, found.bwt, found.transfer) == (100.0, -100.0, 0.0)
    assert found.average == found.last == pytest.approx(100.0 / tasks)


def test_worked_example() -> None:
    a = [[90, 40, 10], [95, 80, 30], [70, 60, 50]]
    assert compute_metrics(a).to_dict() == pytest.approx(
        {
            "transfer": (40 + (10 + 30) / 2) / 2,
            "average": 525 / 9,
            "last": 60.0,
            # The best of task 1 is 95, reached after task 2 was learned.
            "forgetting": ((95 - 70) + (80 - 60)) / 2,
            "bwt": ((70 - 90) + (60 - 80)) / 2,
        }
    )


def test_forgetting_ignores_accuracy_before_learning_and_is_not_clipped() -> None:
    # Task 2 was at 90 before it was learned at 50; the last model improved both old tasks.
    a = [[20, 90, 0], [30, 50, 0], [40, 60, 70]]
    assert compute_metrics(a).forgetting == pytest.approx(((30 - 40) + (50 - 60)) / 2)


def test_one_task_leaves_three_metrics_undefined() -> None:
    assert compute_metrics([[75.0]]) == Metrics(average=75.0, last=75.0)


def test_keys_are_those_of_the_command_line() -> None:
    keys = ["transfer", "average", "last", "forgetting", "bwt"]
    assert list(Metrics().to_dict()) == keys
    assert list(DEFINITIONS) == [*keys, "cil_average", "cil_last", *HEAD_METRICS]
    assert set(HEAD_METRICS.values()) == {*keys[1:4], "cil_average", "cil_last"}
    assert all("\n" not in definition for definition in DEFINITIONS.values())


def test_class_incremental_is_the_mean_and_the_end_of_its_curve() -> None:
    seen = ClassIncremental({"a": 90.0, "b": 60.0, "c": 30.0})
    assert (seen.average, seen.last) == (60.0, 30.0)
    assert seen.to_dict() == {"after": dict(seen.after), "average": 60.0, "last": 30.0}
    assert seen.metrics() == {"cil_average": 60.0, "cil_last": 30.0}
    nothing = ClassIncremental({})
    assert nothing.to_dict() == {"after": {}, "average": None, "last": None}


@pytest.mark.parametrize("value", [-0.1, 100.1, float("nan")])
def test_class_incremental_values_are_percentages(value: float) -> None:
    with pytest.raises(InputError, match='after "b": '):
        ClassIncremental({"a": 1.0, "b": value})


@pytest.mark.parametrize("tasks", [1, 2, 6])
def test_a_stack_has_the_metrics_of_each_matrix(tasks: int) -> None:
    a = np.random.default_rng(0).uniform(0, 100, (2, 3, tasks, tasks))
    stacked = stacked_metrics(a)
    for place in np.ndindex(2, 3):
        alone = {k: v for k, v in compute_metrics(a[place]).to_dict().items() if v is not None}
        assert {name: values[place] for name, values in stacked.items()} == pytest.approx(alone)
    assert ("transfer" in stacked) == (tasks > 1)


@unhurried
@given(squares)
def test_equals_the_printed_formulas(a: np.ndarray) -> None:
    assert close(compute_metrics(a), by_the_formula(a))


@unhurried
@given(matrices(), st.randoms())
def test_column_order_and_extra_columns_do_not_count(matrix: AccuracyMatrix, random: Any) -> None:
    order = list(range(len(matrix.columns)))
    random.shuffle(order)

    def extended(row: tuple[float, ...]) -> tuple[float, ...]:
        return (*(row[i] for i in order), random.uniform(0, 100))

    other = AccuracyMatrix(
        columns=(*(matrix.columns[i] for i in order), "only watched"),
        tasks=matrix.tasks,
        rows=tuple(map(extended, matrix.rows)),
        zero_shot=matrix.zero_shot and extended(matrix.zero_shot),
    )
    assert other.metrics() == matrix.metrics()
    assert other.zero_shot_metrics() == matrix.zero_shot_metrics()


@unhurried
@given(matrices(), st.data())
def test_a_partial_run_is_a_complete_run_of_its_tasks(
    matrix: AccuracyMatrix, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(matrix.tasks)))
    partial = AccuracyMatrix(matrix.columns, matrix.tasks[:k], matrix.rows[:k], matrix.zero_shot)
    assert partial.metrics() == compute_metrics(matrix.square()[:k, :k])


@unhurried
@given(matrices(min_size=1))
def test_rows_added_one_by_one_make_the_matrix(matrix: AccuracyMatrix) -> None:
    built = AccuracyMatrix(matrix.columns)
    if matrix.zero_shot is not None:
        built = built.with_row(ZERO_SHOT, dict(zip(matrix.columns, matrix.zero_shot, strict=True)))
    for task, row in zip(matrix.tasks, matrix.rows, strict=True):
        built = built.with_row(task, dict(zip(matrix.columns, row, strict=True)))
    assert built == matrix


def test_nothing_learned() -> None:
    matrix = AccuracyMatrix(("a", "b"), zero_shot=(1.0, 2.0))
    assert matrix.metrics() == Metrics()
    assert matrix.square().shape == (0, 0)
    assert matrix.zero_shot_metrics() is None


def test_zero_shot_metrics_are_those_of_the_row_repeated() -> None:
    published = PUBLISHED["zero-shot"]["I"]
    names = tuple(published["datasets"])
    rows = tuple(map(tuple, PUBLISHED["ZSCL"]["I"]["matrix"]))
    matrix = AccuracyMatrix(names, names, rows, tuple(published["matrix"][0]))
    assert matrix.zero_shot_metrics() == compute_metrics(published["matrix"])
    assert matrix.metrics() == compute_metrics(PUBLISHED["ZSCL"]["I"]["matrix"])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([[1.0, 2.0]], r"\[1, 2\]"),
        ([1.0], r"\[1\]"),
        (np.zeros((0, 0)), r"\[0, 0\]"),
        ([[1.0], [1.0, 2.0]], "array of numbers"),
        ([["x"]], "array of numbers"),
        ([[1.0, float("nan")], [1.0, 1.0]], r"got nan in entry \[0, 1\]"),
        ([[1.0, 1.0], [float("inf"), 1.0]], r"got inf in entry \[1, 0\]"),
    ],
)
def test_bad_arrays(bad: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        compute_metrics(bad)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"columns": ("a", "a")}, '"a" came twice'),
        ({"columns": ("",)}, "printable name"),
        ({"columns": (" a",)}, "printable name"),
        ({"columns": ("a\nb",)}, "printable name"),
        ({"columns": (ZERO_SHOT,)}, "another name"),
        ({"columns": ("digits",), "tasks": ("digit",), "rows": ((1,),)}, 'did you mean "digits"'),
        ({"columns": ("a",), "tasks": ("a", "a"), "rows": ((1,), (1,))}, '"a" came twice'),
        ({"columns": ("a",), "tasks": ("a",)}, "got 0 for 1"),
        ({"columns": ("a",), "tasks": ("a",), "rows": ((1, 2),)}, "got 2 values for 1"),
        ({"columns": ("a",), "zero_shot": (1, 2)}, f'"{ZERO_SHOT}": got 2 values'),
        ({"columns": ("a",), "tasks": ("a",), "rows": ((100.1,),)}, 'column "a": got 100.1'),
        ({"columns": ("a",), "zero_shot": (-0.1,)}, 'column "a": got -0.1'),
        ({"columns": ("a",), "zero_shot": (float("nan"),)}, 'column "a": got nan'),
    ],
)
def test_bad_matrices(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        AccuracyMatrix(**arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("after", "accuracies", "says"),
    [
        ("a", {"a": 1.0}, "no accuracy for b"),
        ("a", {"a": 1.0, "b": 1.0, "B": 1.0}, 'did you mean "b"'),
        ("c", {"a": 1.0, "b": 1.0}, '"c" has no column'),
        ("b", {"a": 1.0, "b": 1.0}, '"b" came twice'),
        (ZERO_SHOT, {"a": 1.0, "b": 1.0}, "evaluate the start model once, first"),
    ],
)
def test_bad_rows(after: str, accuracies: dict[str, float], says: str) -> None:
    matrix = AccuracyMatrix(("a", "b")).with_row("b", {"a": 1.0, "b": 2.0})
    with pytest.raises(InputError) as caught:
        matrix.with_row(after, accuracies)
    assert says in str(caught.value)


@unhurried
@given(matrices(min_size=1))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, matrix: AccuracyMatrix) -> None:
    path = tmp_path_factory.mktemp("matrix") / "matrix.csv"
    write_matrix(path, matrix)
    assert read_matrix(path) == matrix


def test_csv_is_as_documented(tmp_path: Path) -> None:
    matrix = AccuracyMatrix(("a, b", "ü"), ("ü",), ((100.0, 2 / 3),), (0.0, 33.25))
    write_matrix(tmp_path / "matrix.csv", matrix)
    assert (tmp_path / "matrix.csv").read_bytes().decode() == (
        'after_task,"a, b",ü\nzero-shot,0.0000,33.2500\nü,100.0000,0.6667\n'
    )


def test_four_decimals_tell_apart_large_test_sets(tmp_path: Path) -> None:
    n = 500_000
    row = (100 * 123_456 / n, 100 * 123_457 / n)
    write_matrix(tmp_path / "m.csv", AccuracyMatrix(("a", "b"), zero_shot=row))
    read = read_matrix(tmp_path / "m.csv").zero_shot or ()
    assert [round(value * n / 100) for value in read] == [123_456, 123_457]


def test_spreadsheet_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes("\ufeffafter_task, a ,b\r\n\r\n b ,1,2.5\r\n,,\r\n".encode())
    assert read_matrix(path) == AccuracyMatrix(("a", "b"), ("b",), ((1.0, 2.5),))


HEAD = "after_task,digits,letters\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["empty", "header"]),
        ("\n\n", ["empty"]),
        ("task,digits\ndigits,1\n", ["line 1", '"task"', '"after_task"']),
        ("\ntask,digits\n", ["line 2", '"task"']),
        ("after_task;digits\ndigits;1\n", ["line 1", '"after_task;digits"', "commas"]),
        ("after_task\n", ["line 1", "no data set columns"]),
        ("after_task,a,a\na,1,2\n", ["line 1", '"a" came twice']),
        ("after_task,a,\na,1,2\n", ["line 1", "''"]),
        (HEAD, ["no rows"]),
        (HEAD + "digitz,1,2\n", ["line 2", '"digitz"', 'did you mean "digits"']),
        (HEAD + "zero_shot,1,2\n", ["line 2", '"zero_shot"', 'did you mean "zero-shot"']),
        (HEAD + "digits,1\n", ["line 2", "got 1 values, wanted 2"]),
        (HEAD + "digits,1,2,3\n", ["line 2", "got 3 values, wanted 2"]),
        (HEAD + "digits,1,2\nletters,1,x\n", ["line 3", 'column "letters"', '"x"', "63.25"]),
        (HEAD + 'digits,1,"88,4"\n', ["line 2", 'column "letters"', '"88,4"']),
        (HEAD + "digits,1,88%\n", ["line 2", 'column "letters"', '"88%"']),
        (HEAD + "digits,,2\n", ["line 2", 'column "digits"', "an empty cell"]),
        (HEAD + "digits,nan,2\n", ["line 2", 'column "digits"', '"nan"']),
        (HEAD + "digits,1_0,2\n", ["line 2", 'column "digits"', '"1_0"']),
        (HEAD + "digits,\u0661\u0662,2\n", ["line 2", 'column "digits"', '"\u0661\u0662"']),
        (HEAD + "digits,infinity,2\n", ["line 2", '"infinity"']),
        (HEAD + "digits,1,inf\n", ["line 2", 'column "letters"', '"inf"']),
        (HEAD + "digits,-1,2\n", ["line 2", 'column "digits"', '"-1"']),
        (HEAD + "digits,1,100.5\n", ["line 2", 'column "letters"', '"100.5"']),
        (HEAD + "digits,1,2\ndigits,1,2\n", ["line 3", '"digits" came twice']),
        (HEAD + "zero-shot,1,2\nzero-shot,1,2\n", ["line 3", "start model once"]),
        (HEAD + "digits,1,2\nzero-shot,1,2\n", ["line 3", "start model once"]),
        (HEAD + 'digits,1,"2\n', ["line 2", "not comma-separated"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: list[str]) -> None:
    path = tmp_path / "matrix.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_matrix(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for part in says:
        assert part in message


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff\xfe")
    for path in ("missing.csv", "", "image.csv", "image.csv/matrix.csv"):
        with pytest.raises(InputError, match=f"^{tmp_path / path}: "):
            read_matrix(tmp_path / path)
