from __future__ import annotations

import json
from pathlib import Path

import pytest

from mulki.errors import InputError
from mulki.runs.results import read_evaluations
from tests.runs.folder_helpers import evaluate, make


def test_a_line_cut_off_by_a_crash_is_left_out_and_others_are_errors(tmp_path: Path) -> None:
    run = make(tmp_path)
    path = run.path / "results.jsonl"
    whole = evaluate(run, "digits")
    with path.open("a") as stream:
        stream.write('{"run": "first", "or')
    assert read_evaluations(path) == [whole]
    for bad in ("{", "[]", '{"run": "first"}', "3"):
        path.write_text(f"{json.dumps(whole.__dict__)}\n{bad}\n")
        with pytest.raises(InputError, match="line 2: "):
            read_evaluations(path)
    with pytest.raises(InputError, match="results.jsonl"):
        read_evaluations(tmp_path / "results.jsonl")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_evaluations(path)
