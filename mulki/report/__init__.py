"""What a run folder says, for a terminal, a Markdown file and a browser."""

from mulki.report.contents import RunContents, read_contents
from mulki.report.html import render_html
from mulki.report.tables import matrix_table, metrics_table, print_matrix, summary_markdown
from mulki.report.write import write_report
from mulki.runs.reading import RunData, read_folder

__all__ = [
    "RunContents",
    "RunData",
    "matrix_table",
    "metrics_table",
    "print_matrix",
    "read_contents",
    "read_folder",
    "render_html",
    "summary_markdown",
    "write_report",
]
