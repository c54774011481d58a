"""The table of operators, against the cases that the parametrised tests take."""

from __future__ import annotations

from mulki.ops.operators import OPERATORS
from tests.ops.op_cases import NAMES, make


def test_every_form_of_every_operator_is_there():
    assert {op.removesuffix("_backward").removesuffix("_reduced") for op in OPERATORS} == {
        make(name).op for name in NAMES
    }
