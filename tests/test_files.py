"""Tables that are read with clear errors, and files that are written whole or not at all."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mulki import files
from mulki.errors import InputError
from mulki.files import (
    Row,
    append_lines,
    check_regular,
    check_zip,
    from_json,
    gunzip,
    limit_members,
    new_folder,
    read_table,
    sweep,
    temporary_for,
    write_atomic,
)
from mulki.runs.metrics import AccuracyMatrix, read_matrix, write_matrix


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


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_pipes_and_links_to_nowhere_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    for name in ("pipe.csv", "loop.csv"):
        for read in (check_regular, read_matrix):
            with pytest.raises(InputError, match=f"{name}: (a pipe|cannot be read)"):
                read(tmp_path / name)
    check_regular(tmp_path)
    check_regular(tmp_path / "gone")


def test_temporaries_are_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    kept = [tmp_path / "a.tmp", tmp_path / ".b.tmp", tmp_path / "deep" / ".c.x.tmp"]
    for path in (*kept, temporary_for(tmp_path / "a"), temporary_for(tmp_path / "deep" / "b.csv")):
        path.write_text("")
    folder = temporary_for(tmp_path / "deep" / "latest")
    folder.mkdir()
    (folder / "x").write_text("")
    sweep(tmp_path)
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(kept) and not folder.exists()


def test_a_written_file_and_its_name_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_fsync: Callable[[int], None]
) -> None:
    seen = []

    def fsync(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "x", "text")
    assert seen == [(tmp_path / "x").stat().st_ino, tmp_path.stat().st_ino]


def test_a_new_folder_replaces_the_old_one_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("1", "2"):
        with new_folder(path) as new:
            (new / "file").write_text(content)
    assert (path / "file").read_text() == "2"
    with pytest.raises(ZeroDivisionError), new_folder(path) as new:
        (new / "file").write_text("3")
        _ = 1 / 0
    assert (path / "file").read_text() == "2"
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_max_member_mb", files.MAX_MEMBER_MB)


def test_what_unpacks_to_too_much_is_refused_before_it_is_unpacked(limits: None) -> None:
    packed = gzip.compress(bytes(300 * 10**6))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"^x\.gz: unpacks to more than 100 times its"):
            gunzip("x.gz", packed)
        assert tracemalloc.get_traced_memory()[1] < 100 * 10**6
    finally:
        tracemalloc.stop()
    small = gzip.compress(bytes(range(256)) * 8000)
    assert gunzip("x.gz", small) == bytes(range(256)) * 8000
    limit_members(2)
    with pytest.raises(InputError, match="x.gz: unpacks to more than 2 MB, see --max-member-mb"):
        gunzip("x.gz", small)
    limit_members(3)
    assert len(gunzip("x.gz", small)) == 256 * 8000
    for damaged in (small[:-9], small[:-4] + bytes(4), b"x" + small):
        with pytest.raises(ValueError, match="not a gzip file to its end"):
            gunzip("x.gz", damaged)


def test_members_of_a_zip_are_limited(limits: None, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(100 * 10**6, dtype=np.uint8))
    with pytest.raises(InputError, match=r"x\.npz: unpacks to more than 100 times"):
        check_zip(path)
    np.savez(path, a=np.zeros(3 * 10**6, dtype=np.uint8))
    limit_members(1)
    check_zip(path)  # it is as large as its file
    np.savez_compressed(path, a=np.zeros(3 * 10**6, dtype=np.uint8))
    with pytest.raises(InputError, match=r"x\.npz: unpacks to more than 1 MB"):
        check_zip(path)


def test_lines_are_put_behind_one_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    append_lines(file, "one\n")
    append_lines(file, "two")
    append_lines(file, "three\nfour\n")
    assert file.read_text() == "one\ntwo\nthree\nfour\n"


def test_json_that_is_none_is_a_value_error() -> None:
    assert from_json('{"a": [1]}') == {"a": [1]}
    for text in ("[" * 100_000, '{"a": ' * 100_000, "[1", "9" * 6000, ""):
        with pytest.raises(ValueError, match=".") as caught:
            from_json(text)
        assert len(str(caught.value).splitlines()) == 1
