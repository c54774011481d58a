"""Triton kernels in Triton's interpreter, over random shapes, layouts, dtypes, masks and scales.

TRITON_INTERPRET=1 has to be set before Triton is imported.
"""

from __future__ import annotations

import os
from unittest import mock

import torch
from hypothesis import strategies as st

from tests.fuzz import operators

BATCH = 10  # a case takes up to a second

# The interpreter cuts bfloat16 off where a GPU rounds.
CASES = operators.cases(st.integers(1, 40), (torch.float32, torch.float16), ("triton",))


def is_right(drawn: operators.Drawn) -> None:
    """As of the other backends; a kernel that is not there is no success."""
    with mock.patch.dict(os.environ, MULKI_STRICT="1"):
        operators.is_right(drawn)


tries = {is_right: CASES}
