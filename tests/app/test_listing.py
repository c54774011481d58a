from __future__ import annotations

import json
from pathlib import Path

import pytest

from mulki.app.listing import list_tasks
from mulki.data import Source
from mulki.data.published import entry
from mulki.data.published.collections import COLLECTIONS
from mulki.data.published.prepare import State
from mulki.errors import InputError
from tests.data.published.conftest import data_root, written, zscl
from tests.train_helpers import COLOURS, write_split

__all__ = ["data_root", "written", "zscl"]


def test_published_classes_need_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_tasks(["mtil"], "II", Source(), as_json=True) == 0
    tasks = json.loads(capsys.readouterr().out)
    assert tasks[0]["name"] == "stanfordcars"
    assert sum(len(task["classes"]) for task in tasks) == 1201


def test_published_facts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_tasks(["mtil:dtd", "mtil:mnist"], "I", Source()) == 0
    out = capsys.readouterr().out
    assert "1880" in out and "60000" in out and "zscl" in out and "aircraft" not in out
    assert "596 MiB" in out and "11 MiB" in out
    assert list_tasks(["cil"], "I", Source()) == 0
    assert "imagenet-r" in capsys.readouterr().out


@pytest.mark.parametrize("sequence", ["mtil", "xtail", "cil"])
def test_nothing_is_cut_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sequence: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert list_tasks([sequence], "I", Source()) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out and "│" not in out
    members = COLLECTIONS[sequence].members
    words = {word for name in members for word in (name, *entry(name).title.split())}
    assert words <= set(out.split())
    # Numbers end where their title does.
    head, _, *rows = out.splitlines()
    end = head.index("classes") + len("classes")
    counts = [row[:end].split()[1] for row in rows if row.startswith(members)]
    assert len(counts) == len(members) and all(count.isdecimal() for count in counts)
    assert all(row[end] == " " for row in rows if row.startswith(members))


def test_with_data_they_are_read(zscl: Source, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_tasks(["mtil:dtd"], "I", zscl) == 0
    assert "47" in capsys.readouterr().out
    with pytest.raises(InputError, match="^mtil:dt: "):
        list_tasks(["mtil:dt"], "I", Source())


def test_what_is_missing_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mulki.app import listing

    found = [State("dtd", None, "dtd: ask somebody")]
    monkeypatch.setattr(listing, "prepare", lambda *_: iter(found))
    assert list_tasks(["mtil:dtd"], "I", Source(tmp_path), download=True) == 1
    out = capsys.readouterr().out
    assert "missing" in out and out.endswith("dtd: ask somebody\n")
    found[:] = []
    assert list_tasks(["mtil"], "I", Source(tmp_path), download=True) == 0


def test_only_published_data_sets_are_downloaded(tmp_path: Path) -> None:
    for names in (["embedded"], ["mtil:dtd", "embedded:digits"], ["mtil:dtd", "xtail:food"]):
        with pytest.raises(InputError, match="^--prepare: got "):
            list_tasks(names, "I", Source(tmp_path), download=True)
    with pytest.raises(InputError, match="^--prepare: got no tasks"):
        list_tasks([], "I", Source(tmp_path), download=True)
    with pytest.raises(InputError, match="^--json: "):
        list_tasks(["mtil"], "I", Source(tmp_path), download=True, as_json=True)


def test_single_data_sets_have_no_order() -> None:
    with pytest.raises(InputError, match='^order "II": orders belong to a named sequence'):
        list_tasks(["mtil:dtd"], "II", Source())


def test_a_share_is_of_tasks_without_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "colours", COLOURS, 10)
    assert list_tasks([str(tmp_path / "colours")], "I", Source(), test_fraction=0.3) == 0
    assert ["colours", "3", "21", "9"] in [
        line.split()[:4] for line in capsys.readouterr().out.splitlines()
    ]
    for names in (["embedded"], ["mtil"]):
        with pytest.raises(InputError, match=r"^--test-fraction 0\.3: "):
            list_tasks(names, "I", Source(), test_fraction=0.3)
