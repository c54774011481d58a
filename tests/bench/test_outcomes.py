"""The outcome in chunks of rows."""

from __future__ import annotations

import pytest
import torch

from mulki.bench.cases import OPERATORS, PAIRED, Case
from mulki.bench.losses import EAGER
from mulki.bench.outcomes import in_chunks, outcome


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "similarity"])
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_chunks_of_rows_add_up_to_the_whole(operator: str, rows: int) -> None:
    case = Case(operator, 11, 11 if operator in PAIRED else 6, 8, "float32")
    inputs = case.inputs(torch.float64)
    whole = outcome(EAGER[operator], inputs)
    chunks = in_chunks(case, inputs, most=rows * case.p)
    assert chunks.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(chunks[name], value, rtol=1e-12, atol=1e-13)
