from __future__ import annotations

from dataclasses import dataclass

import pytest

from mulki.app.commands.parsing import Parser, add_options, with_hyphens
from mulki.choices.options import option
from mulki.errors import InputError


@dataclass(frozen=True)
class Options:
    switch: bool = option(False, "on or off")
    names: tuple[str, ...] = option((), "some")
    size: int = option(3, "how large, in %")


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="mulki test")
    add_options(parser, Options)
    return parser


def test_fields_are_options(parser: Parser) -> None:
    given = parser.parse_args(["--no-switch", "--names", "a", "b", "--size", "4"])
    assert vars(given) == {"switch": False, "names": ["a", "b"], "size": "4"}
    assert vars(parser.parse_args([])) == {"switch": None, "names": None, "size": None}
    assert "how large, in % (default: 3)" in parser.format_help()


def test_one_field_alone() -> None:
    parser = Parser(prog="mulki test")
    add_options(parser, Options, only="size")
    assert list(vars(parser.parse_args([]))) == ["size"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--siz", "4"], "--siz"),
        (["--size"], "expected one argument"),
        (["--switch=1"], "a switch takes no value"),
    ],
)
def test_errors_are_one_line(parser: Parser, words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        parser.parse_args(words)
    assert str(error.value).endswith("mulki test --help shows the usage")


def test_underscores_are_accepted_in_names_alone() -> None:
    assert with_hyphens(["--a_b=c_d", "e_f", "--g_h"]) == ["--a-b=c_d", "e_f", "--g-h"]
