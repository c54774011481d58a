"""Losses over the softmax of rows and of columns, a block at a time."""

from __future__ import annotations

import pytest

from tests.ops.chunked.cut import right


@pytest.mark.parametrize(
    "name", ["pairs", "pairs_label", "pairs_blend", "pairs_weights", "contrastive"]
)
def test_cut_in_rows_and_columns(name, cut_small):
    right(name)
