from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mulki.choices.options import (
    check_options,
    convert,
    field_name,
    flag,
    option,
    option_name,
    whole_number,
)
from mulki.errors import InputError


@dataclass(frozen=True)
class Options:
    steps: int = option(10, "steps", low=1)
    rate: float = option(0.1, "rate", above=0, high=1)
    beta: float = option(0.9, "beta", low=0, below=1)
    flag: bool = option(True, "flag")
    label: str = option("a", "label")
    limit: int | None = option(None, "limit", low=1)
    clip_norm: float | None = option(None, "clip", above=0)
    path: str | None = option(None, "path")
    start: str | None = option(None, "start", none_is_text=True)
    mode: Literal["fast", "slow"] = option("fast", "mode")
    tasks: tuple[str, ...] = option(("t",), "tasks")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 3, 3),
        ("steps", "3", 3),
        ("steps", 3.0, 3),
        ("steps", 1e3, 1000),
        ("steps", "-3", -3),
        ("rate", 1, 1.0),
        ("rate", 0.5, 0.5),
        ("rate", "0.5", 0.5),
        ("rate", "1e-4", 1e-4),
        ("rate", "3", 3.0),
        ("flag", True, True),
        ("flag", False, False),
        ("flag", "true", True),
        ("flag", "False", False),
        ("label", "x", "x"),
        ("label", 5, "5"),
        ("label", "none", "none"),
        ("limit", None, None),
        ("limit", "none", None),
        ("limit", "None", None),
        ("limit", "null", None),
        ("limit", "7", 7),
        ("limit", 7.0, 7),
        ("clip_norm", None, None),
        ("clip_norm", "1", 1.0),
        ("path", "a/b", "a/b"),
        ("path", "null", None),
        ("path", "none", None),
        ("start", "none", "none"),
        ("start", None, None),
        ("mode", "slow", "slow"),
        ("mode", "neither", "neither"),
        ("tasks", "one", ("one",)),
        ("tasks", ["one", "two"], ("one", "two")),
        ("tasks", ("one",), ("one",)),
    ],
)
def test_convert(name, value, expected):
    (got,) = convert(Options, {name: value}).values()
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize("name", ["steps", "rate", "label", "limit", "clip_norm", "path", "mode"])
@pytest.mark.parametrize("value", [True, False])
def test_convert_refuses_booleans_for_anything_else(name, value):
    shown = name.replace("_", "-")
    with pytest.raises(InputError, match=f"^--{shown}: got {value}, wanted"):
        convert(Options, {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "3.0"),
        ("steps", 3.5),
        ("steps", "1e3"),
        ("steps", "many"),
        ("steps", "1_0"),
        ("steps", "\u0663"),
        ("rate", "1_0.5"),
        ("rate", "\u0663"),
        ("path", "a\0b"),
        ("steps", ""),
        ("steps", None),
        ("steps", [3]),
        ("steps", math.inf),
        ("steps", math.nan),
        ("rate", "quick"),
        ("rate", "nan"),
        ("rate", "inf"),
        ("rate", math.inf),
        ("rate", 10**400),
        ("rate", None),
        ("rate", {"a": 1}),
        ("flag", 1),
        ("flag", 0.0),
        ("flag", "yes"),
        ("flag", None),
        ("label", None),
        ("label", ["a"]),
        ("limit", "few"),
        ("clip_norm", [1.0]),
        ("mode", None),
        ("tasks", None),
        ("tasks", [1, 2]),
        ("tasks", 5),
    ],
)
def test_convert_names_the_option_whose_value_has_another_type(name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')}: got .*, wanted "):
        convert(Options, {name: value})


def test_convert_takes_what_yaml_reads():
    text = "{steps: 1_000, rate: 1e-4, flag: off, limit: ~, clip_norm: null, tasks: [a, b]}"
    assert convert(Options, yaml.safe_load(text)) == {
        "steps": 1000,
        "rate": 1e-4,
        "flag": False,
        "limit": None,
        "clip_norm": None,
        "tasks": ("a", "b"),
    }


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
def test_convert_round_trips_numbers_as_text(whole, number):
    assert convert(Options, {"steps": str(whole), "rate": str(number)}) == {
        "steps": whole,
        "rate": number,
    }


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()))
def test_convert_returns_the_type_or_an_input_error(value):
    types = {"steps": int, "rate": float, "flag": bool, "label": str, "tasks": tuple}
    for name, wanted in types.items():
        try:
            (got,) = convert(Options, {name: value}).values()
        except InputError as error:
            assert f"--{name}: got" in str(error)
        else:
            assert type(got) is wanted


def test_defaults_pass():
    check_options(Options())


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 1), ("rate", 1.0), ("rate", 1e-300), ("beta", 0.0), ("limit", None), ("limit", 1)],
)
def test_check_accepts_bounds_that_belong(name, value):
    check_options(Options(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", 0, "at least 1"),
        ("rate", 0.0, "above 0"),
        ("rate", -1.0, "above 0"),
        ("rate", 1.1, "at most 1"),
        ("rate", math.nan, "at most 1|above 0"),
        ("beta", 1.0, "below 1"),
        ("beta", -0.1, "at least 0"),
        ("limit", 0, "at least 1"),
        ("clip_norm", 0.0, "above 0"),
    ],
)
def test_check_refuses_what_is_out_of_bounds(name, value, words):
    shown = name.replace("_", "-")
    with pytest.raises(InputError, match=f"^--{shown}: got {value}, wanted a number ({words})$"):
        check_options(Options(**{name: value}))


def test_check_of_a_choice_offers_the_nearest():
    with pytest.raises(
        InputError, match=r"^--mode: got 'fsat' \(did you mean \"fast\"\?\), .*slow"
    ):
        check_options(Options(mode="fsat"))
    with pytest.raises(InputError, match="^--mode: got 'xyz', .*fast, slow$"):
        check_options(Options(mode="xyz"))


def test_choices_are_looked_up_when_they_are_checked():
    known = ["a"]

    @dataclass(frozen=True)
    class Dynamic:
        fixed: str = option("x", "fixed", choices=("x", "y"))
        kind: str = option("a", "kind", choices=lambda: known)

    with pytest.raises(InputError, match="^--kind: got 'bee', .* a$"):
        check_options(Dynamic(kind="bee"))
    known.append("bee")
    check_options(Dynamic(kind="bee", fixed="y"))
    with pytest.raises(InputError, match="^--kind: got 'be' .* a, bee$"):
        check_options(Dynamic(kind="be"))
    with pytest.raises(InputError, match="^--fixed: got 'z', .* x, y$"):
        check_options(Dynamic(fixed="z"))


@pytest.mark.parametrize(
    ("field", "name", "shown"),
    [("lambda_", "lambda", "--lambda"), ("batch_size", "batch_size", "--batch-size")],
)
def test_fields_named_as_keywords(field, name, shown):
    assert option_name(field) == name and field_name(name) == field
    assert flag(field) == flag(name) == shown and field_name(shown[2:]) == field


def test_an_underscore_behind_another_name_stays():
    assert option_name("id_") == "id_" and field_name("id_") == "id_"


def test_errors_show_the_option_of_a_keyword():
    @dataclass(frozen=True)
    class Keyword:
        lambda_: float = option(1.0, "lambda", above=0)

    with pytest.raises(InputError, match="^--lambda: got 'x'"):
        convert(Keyword, {"lambda_": "x"})
    with pytest.raises(InputError, match="^--lambda: got 0"):
        check_options(Keyword(lambda_=0))


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("007", 7), ("9" * 18, 10**18 - 1), ("", None), ("-1", None), ("1_0", None)]
    + [(text, None) for text in ("\u0661", "1\n", " 1", "9" * 6000, "x")],
)
def test_a_whole_number_has_a_few_ascii_digits(text, number):
    assert whole_number(text) == number
