"""The table of operators, against the cases that the parametrised tests take."""

from __future__ import annotations

import re

from mulki.ops.operators import OPERATORS
from tests.ops.op_cases import NAMES, make


def test_every_form_of_every_operator_is_there():
    forms = "_backward", "_reduced", "_with_labels"
    assert {re.sub(f"({'|'.join(forms)})$", "", op) for op in OPERATORS} == {
        make(name).op for name in NAMES
    }
