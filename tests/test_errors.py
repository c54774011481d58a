"""Errors of one line, and the name that was probably meant."""

from __future__ import annotations

import pytest
from torch._utils import ExceptionWrapper

from mulki.data import BadImage
from mulki.errors import InputError, counted, nearest


def test_input_errors_are_one_line_and_value_errors() -> None:
    error = InputError("a\nb.csv: wrong")
    assert str(error) == "a b.csv: wrong"
    assert isinstance(error, ValueError)
    assert str(InputError("\x1b[31ma.csv\a: wrong")) == r"\x1b[31ma.csv\x07: wrong"


def test_an_error_of_a_loading_process_is_its_own_line() -> None:
    """torch makes it again of the traceback."""
    for kind in (InputError, BadImage):
        try:
            raise kind("a.csv: wrong")
        except kind:
            caught = ExceptionWrapper(where="in a process")
        with pytest.raises(kind, match="^a.csv: wrong$"):
            caught.reraise()


def test_nearest() -> None:
    assert nearest("eurosta", ["EuroSAT", "DTD"]) == ' (did you mean "EuroSAT"?)'
    assert nearest("mnist", ["DTD", "SUN397"]) == ""
    assert nearest("mnist", []) == ""


def test_one_thing_has_no_plural() -> None:
    assert [counted(n, "task") for n in (0, 1, 2)] == ["0 tasks", "1 task", "2 tasks"]
