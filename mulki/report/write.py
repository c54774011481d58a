"""Writing the reports of a run into its folder."""

from __future__ import annotations

import os
from pathlib import Path

from mulki.files import write_atomic
from mulki.report.contents import read_contents
from mulki.report.figures import plots
from mulki.report.html import render_html
from mulki.report.tables import escape, summary_markdown

#: The folder of figures in a run folder.
PLOTS = "plots"


def write_report(folder: str | os.PathLike[str], *, figures: bool = False) -> Path:
    """Write ``summary.md`` and ``report.html`` into a run folder, of an unfinished run too.

    Each file is replaced atomically. What is missing or damaged in the folder is named on the page.

    Args:
        folder: of the run.
        figures: also write the page's figures into ``plots/``, as PNG and SVG.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: see `mulki.report.contents.read_contents`.
    """
    folder = Path(folder)
    contents = read_contents(folder)
    run = contents.data
    title = f"# {escape(run.name)}\n\nStatus: {escape(run.status)}\n\n"
    if run.fingerprint:
        title += f"Fingerprint: {run.fingerprint}\n\n"
    if contents.missing:
        title += "\n".join(f"- {escape(line)}" for line in contents.missing) + "\n\n"
    table = ""
    if contents.evaluated:
        table = summary_markdown(
            run.matrix,
            run.class_incremental,
            contents.evaluations,
            run.with_head,
            run.summary.get("method"),
        )
    write_atomic(folder / "summary.md", title + table)
    write_atomic(folder / "report.html", render_html(contents))
    if figures:
        (folder / PLOTS).mkdir(exist_ok=True)
        for plot in plots(contents):
            plot.write(folder / PLOTS)
    return folder / "report.html"
