"""A student and teachers of a few rows."""

from __future__ import annotations

import pytest

from mulki import Similarity
from tests.functional.formulas import D, N, P, scalar


@pytest.fixture
def student(unit):
    return Similarity(
        unit(N, D).requires_grad_(), unit(P, D).requires_grad_(), scalar(9.0, requires_grad=True)
    )


@pytest.fixture
def teachers(unit):
    """Three teachers, each with its own width and scale."""
    return [Similarity(unit(N, d), unit(P, d), s) for d, s in ((3, 8.0), (4, 10.0), (7, 5.0))]
