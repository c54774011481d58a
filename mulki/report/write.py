"""Writing the reports of a run into its folder."""

from __future__ import annotations

import os
from pathlib import Path

from mulki.files import write_atomic
from mulki.report.folder import read_folder
from mulki.report.html import render_html
from mulki.report.tables import escape, summary_markdown


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``summary.md`` and ``report.html`` into a run folder.

    Each file is replaced atomically.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: see `mulki.report.folder.read_folder`.
    """
    folder = Path(folder)
    run = read_folder(folder)
    title = f"# {escape(run.name)}\n\nStatus: {escape(run.status)}\n\n"
    if run.fingerprint:
        title += f"Fingerprint: {run.fingerprint}\n\n"
    write_atomic(folder / "summary.md", title + summary_markdown(run.matrix, run.class_incremental))
    write_atomic(folder / "report.html", render_html(run))
    return folder / "report.html"
