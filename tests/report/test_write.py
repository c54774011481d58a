from __future__ import annotations

import shutil
from pathlib import Path

from mulki.report import read_folder, render_html, summary_markdown, write_report


def test_the_page_reads_the_run_folder_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    assert write_report(moved) == moved / "report.html"
    assert (moved / "report.html").read_text() == render_html(read_folder(moved))
    assert "<title>first</title>" in render_html(read_folder(moved))


def test_the_summary_holds_name_status_and_matrix(folder: Path) -> None:
    write_report(folder)
    text = (folder / "summary.md").read_text()
    assert text.startswith("# first\n\nStatus: complete\n\n")
    assert summary_markdown(read_folder(folder).matrix) in text
    assert "\nFingerprint: weights 0123abcd, splits " in text
