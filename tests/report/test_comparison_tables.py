from __future__ import annotations

import io

from rich.console import Console

from mulki.intervals import Difference
from mulki.report.compare import compare
from mulki.report.comparison_tables import difference_text, mean_text, print_comparison
from tests.report.report_helpers import Make


def test_numbers_have_their_intervals_where_there_are_some() -> None:
    assert mean_text(70.125, None) == "70.12" and mean_text(70.0, 1.5) == "70.00 ± 1.50"
    assert difference_text(Difference(-1.0, None, None)) == "-1.00"
    assert difference_text(Difference(2.0, -0.5, 4.5)) == "+2.00 [-0.50, +4.50]"


def test_no_number_is_cut_in_a_narrow_terminal(make: Make) -> None:
    stream = io.StringIO()
    print_comparison(compare([make("a", "lwf"), make("b")]), Console(file=stream, width=20))
    text = stream.getvalue()
    assert "CIL last" in text and "…" not in text and "less lwf" in text
