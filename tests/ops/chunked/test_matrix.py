"""The similarity matrix, a block at a time."""

from __future__ import annotations

import pytest

from tests.ops.chunked.cut import right


@pytest.mark.parametrize("name", ["similarity", "cosines"])
def test_cut_in_rows_and_columns(name, cut_small):
    right(name)
