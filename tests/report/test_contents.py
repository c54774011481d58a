from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mulki.errors import InputError
from mulki.report import read_contents, render_html
from mulki.report.contents import NEEDED_FOR
from tests.report.report_helpers import TASKS


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def test_a_whole_run_lacks_nothing(whole: Path) -> None:
    found = read_contents(whole)
    assert found.missing == () and found.evaluated
    assert found.data.status == "complete" and found.options["model"] == "mulki-mini"
    assert len(found.history) == 18 and len(found.examples) == 2
    assert tuple(found.data_sets) == TASKS and list(found.answers) == ["zero-shot", *TASKS]
    assert len(found.evaluations) == 15  # 4 rows of 3 data sets, and 3 of all classes seen


@pytest.mark.parametrize("name", NEEDED_FOR)
def test_a_missing_file_is_named_and_the_rest_is_read(whole: Path, name: str) -> None:
    remove(whole / name)
    found = read_contents(whole)
    assert found.missing[0] == f"{name} is not there: no {NEEDED_FOR[name]}"
    # Answers cannot be told apart without the matrix.
    assert len(found.missing) == (2 if name == "matrix.csv" else 1)
    assert found.evaluated == (name != "matrix.csv")


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\x80", "a: [", "1,2"])
@pytest.mark.parametrize("name", [name for name in NEEDED_FOR if "." in name])
def test_no_damage_stops_a_report(whole: Path, name: str, content: str) -> None:
    (whole / name).write_bytes(content.encode("latin-1"))
    found = read_contents(whole)
    # Lines of the history are left out one by one, and an empty YAML file has no options.
    quiet = name == "history.jsonl" or (name, content) == ("args.yaml", "")
    quiet |= name == "results.jsonl"  # a last line without its end is one that was cut off
    assert quiet or any(name in line or "answers" in line for line in found.missing)
    assert all(str(whole) not in line for line in found.missing if line.startswith(name))


@pytest.mark.parametrize(
    "content", ['{"hashes": []}', '{"test_images": 3, "class_incremental": 3, "status": []}']
)
def test_json_of_another_shape(whole: Path, content: str) -> None:
    for name in ("env.json", "summary.json"):
        (whole / name).write_text(content)
    contents = read_contents(whole)
    assert contents.data.fingerprint == ""
    assert "<h2>Metrics</h2>" in render_html(contents)


DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.yaml", "name: 2026-13-45"),
        ("args.yaml", "a: " + "[" * 2000 + "]" * 2000),
        ("args.yaml", "seed: !!int ''"),
        *((name, DEEP) for name in ("summary.json", "env.json", "tasks.json", "examples.json")),
        ("results.jsonl", DEEP + "\n"),
    ],
    ids=lambda text: text[:30],
)
def test_what_readers_of_json_and_yaml_cannot_read_is_named(
    whole: Path, name: str, content: str
) -> None:
    (whole / name).write_text(content)
    found = read_contents(whole)
    assert found.missing and all(line.startswith(name) for line in found.missing)
    assert "<h2>Metrics</h2>" in render_html(found)


@pytest.mark.parametrize("seconds", ["Infinity", "NaN", "1e400"])
def test_a_duration_that_is_not_finite_is_left_out(whole: Path, seconds: str) -> None:
    (whole / "summary.json").write_text(f'{{"status": "complete", "seconds": {seconds}}}')
    assert ">took " not in render_html(read_contents(whole))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("examples.json", "data_set", [1]),
        ("examples.json", "kind", 3),
        ("examples.json", "kind", None),
        ("examples.json", "before", {"a": 1}),
        ("results.jsonl", "after_task", [1]),
        ("results.jsonl", "seconds", "x"),
        ("results.jsonl", "seconds", 10**400),
        ("results.jsonl", "value", float("nan")),
        ("tasks.json", "train", float("inf")),
    ],
)
def test_fields_of_another_kind_are_named(whole: Path, name: str, key: str, value: Any) -> None:
    text = (whole / name).read_text()
    if name == "results.jsonl":
        first, rest = text.split("\n", 1)
        (whole / name).write_text(f"{json.dumps(json.loads(first) | {key: value})}\n{rest}")
    else:
        content = json.loads(text)
        content[name.removesuffix(".json")][0][key] = value
        (whole / name).write_text(json.dumps(content))
    found = read_contents(whole)
    assert len(found.missing) == 1 and found.missing[0].startswith(name)


def test_damaged_answers_are_named(whole: Path) -> None:
    (path, *_) = sorted((whole / "answers").iterdir())
    path.write_bytes(b"no archive")
    found = read_contents(whole)
    assert found.answers == {} and len(found.missing) == 1
    assert found.missing[0].startswith("answers/00_zero-shot.npz: cannot be read")


def test_a_run_before_its_first_evaluation(whole: Path) -> None:
    for name in ("matrix.csv", "answers", "examples.json", "results.jsonl"):
        remove(whole / name)
    found = read_contents(whole)
    assert not found.evaluated and found.data.matrix.columns == ()
    assert len(found.missing) == 4


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        read_contents(tmp_path / "missing")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="no file of a run in it"):
        read_contents(tmp_path)
