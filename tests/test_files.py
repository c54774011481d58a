"""Tables that are read with clear errors, and files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mulki.files import Row, read_table, write_atomic
from mulki.metrics import AccuracyMatrix, read_matrix, write_matrix


def test_a_table_names_its_lines_and_leaves_out_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "sizes.csv"
    path.write_bytes("\ufeffname, size ,note\r\n\r\n a ,3,\r\n,,\r\nb,,x\r\n".encode())
    header, rows = read_table(path, "a table", ["name"], ["size", "weight"])
    assert header == ["name", "size", "note"]
    assert rows == [
        Row(f"{path}, line 3", {"name": "a", "size": "3"}),
        Row(f"{path}, line 5", {"name": "b", "size": ""}),
    ]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "matrix.csv"
    old = AccuracyMatrix(("a",), zero_shot=(1.0,))
    write_matrix(path, old)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_matrix(path, old.with_row("a", {"a": 2.0}))
    assert read_matrix(path) == old
    assert os.listdir(tmp_path) == ["matrix.csv"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_written_files_are_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
