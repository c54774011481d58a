from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mulki.errors import InputError
from mulki.runs.reading import read_folder
from tests.report import conftest

folder = conftest.folder


@pytest.mark.parametrize("name", ["summary.json", "env.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_files_are_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(name)):
        read_folder(folder)


def test_a_folder_without_a_matrix(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"no matrix\.csv in it"):
            read_folder(path)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_does_not_depend_on_the_order_of_tasks(folder: Path) -> None:
    prints = []
    for tasks in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "1", "b": "3"}):
        hashes = {"weights": "f" * 64, "prompts": tasks, "splits": {"a": "9"}}
        (folder / "env.json").write_text(json.dumps({"hashes": hashes}))
        prints.append(read_folder(folder).fingerprint)
    assert re.fullmatch("weights f{12}, prompts [0-9a-f]{12}, splits [0-9a-f]{12}", prints[0])
    assert prints[0] == prints[1] != prints[2]
    (folder / "env.json").unlink()
    assert read_folder(folder).fingerprint == ""
