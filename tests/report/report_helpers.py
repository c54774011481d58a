"""A small matrix with what reports find hard."""

from __future__ import annotations

from mulki.metrics import AccuracyMatrix

# Columns are neither in the order learned nor all learned, and one name is hostile.
SMALL = AccuracyMatrix(
    columns=("digits", "a|b <i>[red]", "letters"),
    tasks=("letters", "digits"),
    rows=((1.0, 2.0, 3.0), (100.0, 50.0, 6.0)),
    zero_shot=(4.0, 5.0, 7.0),
)
