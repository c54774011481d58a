from __future__ import annotations

import shutil
from pathlib import Path

from mulki.report import read_contents, render_html, summary_markdown, write_report
from mulki.runs.folder import RunFolder
from mulki.runs.lock import FolderLock
from mulki.runs.reading import read_folder


def test_the_page_reads_the_run_folder_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    assert write_report(moved) == moved / "report.html"
    assert (moved / "report.html").read_text() == render_html(read_contents(moved))
    assert "<title>first</title>" in render_html(read_contents(moved))


def test_names_are_text_in_the_summary(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script> & [x](y)"
    name = "a<b>b"
    run = RunFolder.create(
        tmp_path, name, method="m", order="I", seed=0, columns=(odd, "b"), config={}
    )
    run.add_row(odd, {odd: 1.0, "b": 2.0})
    write_report(run.path)
    text = (run.path / "summary.md").read_text()
    assert text.startswith("# a&lt;b&gt;b\n")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\[x\\](y)" in text and "<" not in text


def test_the_summary_holds_name_status_and_matrix(folder: Path) -> None:
    write_report(folder)
    text = (folder / "summary.md").read_text()
    assert text.startswith("# first\n\nStatus: complete\n\n")
    run = read_folder(folder)
    assert summary_markdown(run.matrix, method=run.summary["method"]) in text
    assert "\nFingerprint: weights 0123abcd, splits " in text
    assert "\n- history.jsonl is not there: no losses" in text


def test_figures_are_written_where_they_are_asked_for(whole: Path) -> None:
    write_report(whole)
    assert not (whole / "plots").exists()
    write_report(whole, figures=True)
    names = {path.name for path in (whole / "plots").iterdir()}
    assert len(names) == 20 and {"accuracy.png", "accuracy.svg", "losses.png"} <= names


def test_a_run_that_goes_on_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    run = RunFolder.create(
        tmp_path, "first", method="m", order="I", seed=0, columns=("a",), config={}
    )
    run.add_row("a", {"a": 1.0})
    assert 'class="status running"' in write_report(run.path).read_text()
    run.release()
    assert 'class="status interrupted"' in write_report(run.path).read_text()
    lock = FolderLock(run.path)
    assert read_folder(run.path).status == "running"
    lock.release()
