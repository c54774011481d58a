from __future__ import annotations

import json
from pathlib import Path

import pytest

from mulki.app import listing
from mulki.data import Source
from mulki.data.published import entry
from mulki.data.published.collections import COLLECTIONS
from mulki.data.published.prepare import State
from mulki.errors import InputError
from mulki.train.config.run_config import RunConfig
from tests.data.published.conftest import data_root, written, zscl
from tests.train_helpers import COLOURS, write_split

__all__ = ["data_root", "written", "zscl"]


def listed(
    names: list[str],
    order: str = "I",
    root: Path | None = None,
    test_fraction: float | None = None,
    **how: bool,
) -> int:
    config = RunConfig(
        tasks=tuple(names),
        order=order,
        data_root=None if root is None else str(root),
        test_fraction=test_fraction,
    )
    return listing.list_tasks(config, **how)


def test_published_classes_need_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(["mtil"], "II", as_json=True) == 0
    tasks = json.loads(capsys.readouterr().out)
    assert tasks[0]["name"] == "stanfordcars"
    assert sum(len(task["classes"]) for task in tasks) == 1201


def test_published_facts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(["mtil:dtd", "mtil:mnist"]) == 0
    out = capsys.readouterr().out
    assert "1880" in out and "60000" in out and "zscl" in out and "aircraft" not in out
    assert "596 MiB" in out and "11 MiB" in out
    assert listed(["cil"]) == 0
    assert "imagenet-r" in capsys.readouterr().out


@pytest.mark.parametrize("sequence", ["mtil", "xtail", "cil"])
def test_nothing_is_cut_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sequence: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert listed([sequence]) == 0
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
    assert listed(["mtil:dtd"], "I", zscl.root) == 0
    assert "47" in capsys.readouterr().out
    with pytest.raises(InputError, match="^mtil:dt: "):
        listed(["mtil:dt"])


def test_what_is_missing_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [State("dtd", None, "dtd: ask somebody")]
    monkeypatch.setattr(listing, "prepare", lambda *_: iter(found))
    assert listed(["mtil:dtd"], "I", tmp_path, download=True) == 1
    out = capsys.readouterr().out
    assert "missing" in out and out.endswith("dtd: ask somebody\n")
    found[:] = []
    assert listed(["mtil"], "I", tmp_path, download=True) == 0


def test_only_published_data_sets_are_downloaded(tmp_path: Path) -> None:
    for names in (["embedded"], ["mtil:dtd", "embedded:digits"], ["mtil:dtd", "xtail:food"]):
        with pytest.raises(InputError, match="^--prepare: got "):
            listed(names, "I", tmp_path, download=True)
    with pytest.raises(InputError, match="^--prepare: got no tasks"):
        listed([], "I", tmp_path, download=True)
    with pytest.raises(InputError, match="^--json: "):
        listed(["mtil"], "I", tmp_path, download=True, as_json=True)


def test_single_data_sets_have_no_order() -> None:
    with pytest.raises(InputError, match='^order "II": orders belong to a named sequence'):
        listed(["mtil:dtd"], "II")


def test_a_share_is_of_tasks_without_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "colours", COLOURS, 10)
    assert listed([str(tmp_path / "colours")], test_fraction=0.3) == 0
    assert ["colours", "3", "21", "9"] in [
        line.split()[:4] for line in capsys.readouterr().out.splitlines()
    ]
    for names in (["embedded"], ["mtil"]):
        with pytest.raises(InputError, match=r"^--test-fraction 0\.3: "):
            listed(names, test_fraction=0.3)
