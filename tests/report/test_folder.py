from __future__ import annotations

import re
from pathlib import Path

import pytest

from mulki.errors import InputError
from mulki.report import read_folder, render_html, write_report


@pytest.mark.parametrize("name", ["summary.json", "env.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_files_are_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(name)):
        render_html(read_folder(folder))


def test_a_folder_without_a_matrix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no matrix\.csv in it"):
        write_report(tmp_path)
    with pytest.raises(InputError, match=r"no matrix\.csv in it"):
        write_report(tmp_path / "missing")
    assert not list(tmp_path.iterdir())
