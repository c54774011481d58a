"""The sigmoid loss, a block at a time."""

from __future__ import annotations

import pytest

from tests.ops.chunked.cut import right


@pytest.mark.parametrize("name", ["siglip", "siglip_block"])
def test_cut_in_rows_and_columns(name, cut_small):
    right(name)
