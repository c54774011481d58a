"""The table of operators, against the cases that the parametrised tests take."""

from __future__ import annotations

from mulki.ops.operators import OPERATORS
from tests.ops.op_cases import NAMES, asking, make


def test_every_operator_has_a_case():
    assert set(OPERATORS) == {make(name).op for name in NAMES}


def test_the_arguments_of_a_call_and_what_it_asks_for():
    operator = OPERATORS["siglip"]
    x, request = operator.split(asking(make("siglip"), "reduced").args)
    assert x.offset == 0 and x._fields == operator.arguments._fields
    assert request == (None, "mean", [True] * operator.leaves)
