"""What a run folder says, for a terminal, a Markdown file and a browser."""

from mulki.report.html import render_html, write_html
from mulki.report.tables import matrix_table, metrics_table, print_matrix, summary_markdown

__all__ = [
    "matrix_table",
    "metrics_table",
    "print_matrix",
    "render_html",
    "summary_markdown",
    "write_html",
]
