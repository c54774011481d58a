from __future__ import annotations

import logging
import sys

import pytest

from mulki.printing import PrintableFormatter, printable, say


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\a\x7f", r"\x1b[31mred\x07\x7f"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b2J\u2028", r"\x9b2J\u2028"),
        ("owl\u202egpj.exe\u2066", r"owl\u202egpj.exe\u2066"),
        ("not UTF-8: \udcff", r"not UTF-8: \udcff"),
        # Joiners belong to words of Hindi and Persian.
        ("Zürich, क्‍ष, نمی‌خواهم, \\x1b", "Zürich, क्‍ष, نمی‌خواهم, \\x1b"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_some_are_kept() -> None:
    assert printable("a\nb\a", keep="\n") == "a\nb\\x07"


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb")
    say("c\x1b", sys.stderr)
    assert capsys.readouterr() == ("a\\nb\n", "c\\x1b\n")


def test_a_message_is_one_line_and_a_traceback_several() -> None:
    try:
        raise ValueError("\x1b[2J\nmulki: all is well")
    except ValueError:
        record = logging.LogRecord(
            "mulki", logging.INFO, "", 0, "task %s", ("\x1b\n",), sys.exc_info()
        )
    first, *others = PrintableFormatter("%(name)s: %(message)s").format(record).splitlines()
    assert first == r"mulki: task \x1b\n"
    assert others[0] == "Traceback (most recent call last):"
    assert "\x1b" not in "".join(others)
