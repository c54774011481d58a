"""Options: dataclass fields that are also command line options and config keys."""

from __future__ import annotations

import keyword
import math
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mulki.errors import InputError, nearest

Choices = Iterable[str] | Callable[[], Iterable[str]]
_BOUNDS = {
    "low": (operator.ge, "at least"),
    "high": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


def option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Choices | None = None,
    alias: str = "",
    repeat: str = "",
    of_classes: bool = False,
    none_is_text: bool = False,
    separator: str = "",
) -> Any:
    """A field of an options dataclass.

    A field whose option is called as a Python keyword has an underscore behind its name: `import_`
    is ``--import``, and `import` in a config file.

    Args:
        default: the default.
        text: the help text of its command line option.
        low: of a number, the least value.
        high: the greatest.
        above: what it has to exceed.
        below: what it has to stay below.
        choices: the values that a text may have, or a function that returns them, which is called
            whenever they are needed: so what was registered in between is among them. Where they
            never change, the field's type can be a ``Literal`` instead.
        alias: another spelling of its flag, as other tools of the field have it.
        repeat: of a tuple, that the flag takes one value and may be given several times; the text
            is what help calls that value. Otherwise it takes all values at once.
        of_classes: that it has no effect where no task has classes, and is then refused.
        none_is_text: that the text "none" is a value, which differs from leaving the option out.
        separator: between several of the choices, where more than one may be given.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    about = {"help": text, "alias": alias, "repeat": repeat, "choices": choices}
    rules = {"of_classes": of_classes, "none_is_text": none_is_text, "separator": separator}
    return field(default=default, metadata=about | bounds | rules)


def option_name(name: str) -> str:
    """The option of a field, with underscores, as it is in a config file."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def field_name(name: str) -> str:
    """The field of an option, which may be written with hyphens."""
    name = name.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def whole_number(text: str) -> int | None:
    """The number that a few ASCII digits are, None for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def flag(name: str) -> str:
    """The flag on the command line, of a field or option."""
    return f"--{option_name(name).replace('_', '-')}"


def choices_of(item: Field[Any], hint: Any) -> tuple[str, ...]:
    """The values that a field may have; empty where any will do.

    Args:
        item: the field, made by `option`.
        hint: its type.
    """
    for each in (hint, *get_args(hint)):  # one that may be left out is a union with None
        if get_origin(each) is Literal:
            return get_args(each)
    choices = item.metadata["choices"]
    return tuple(choices() if callable(choices) else choices or ())


def check_options(options: Any) -> None:
    """Check a dataclass made of `option` fields against their bounds and choices.

    Raises:
        InputError: naming the first option that is out of bounds.
    """
    hints = get_type_hints(type(options))
    for item in fields(options):
        value, bounds = getattr(options, item.name), item.metadata
        choices = choices_of(item, hints[item.name])
        separator = bounds["separator"]
        for part in str(value).split(separator) if separator else [value]:
            if choices and part is not None and part not in choices:
                more = f", or several with {separator} between" if separator else ""
                raise InputError(
                    f"{flag(item.name)}: got {part!r}{nearest(str(part), choices)}, "
                    f"wanted one of {', '.join(choices)}{more}"
                )
        for bound, (holds, words) in _BOUNDS.items():
            limit = bounds[bound]
            # A NaN fails every comparison, so it is refused wherever a bound is set.
            if limit is not None and value is not None and not holds(value, limit):
                raise InputError(f"{flag(item.name)}: got {value}, wanted a number {words} {limit}")


def convert(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as strings (command line) or as YAML reads them, to the types of an options dataclass.

    Args:
        options: a dataclass made of `option` fields.
        given: values by field name.

    Raises:
        InputError: naming the first option whose value does not have its type.
    """
    hints = get_type_hints(options)
    text = {item.name for item in fields(options) if item.metadata["none_is_text"]}
    return {
        key: value if key in text and value == "none" else _convert(value, hints[key], key)
        for key, value in given.items()
    }


def _convert(value: Any, hint: Any, name: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None or value in ("null", "none", "None"):
            return None
        hint = next(a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is tuple:
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts):
            return tuple(_convert(part, str, name) for part in parts)
        raise _wrong(name, value, "a list of names or paths")
    if get_origin(hint) is Literal:
        # `check_options` checks which string it is. YAML reads on, off, yes and no as booleans, so
        # no choice may have one of these names.
        hint = str
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
    if isinstance(value, bool) or value is None:
        if hint is bool and value is not None:
            return value
        raise _wrong(name, value, words)
    try:
        if hint is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if hint is int and isinstance(value, float):
            if not value.is_integer():
                raise ValueError
            return int(value)
        if not isinstance(value, (str, int, float)):
            raise ValueError
        # Python reads 1_0 and digits of other scripts as numbers; no file has a NUL in its name.
        if isinstance(value, str) and (
            "\0" in value if hint is str else "_" in value or not value.isascii()
        ):
            raise ValueError
        converted = hint(value)
        if hint is float and not math.isfinite(converted):
            words = "a finite number"
            raise ValueError
        return converted
    except (ValueError, KeyError, OverflowError):
        raise _wrong(name, value, words) from None


def _wrong(name: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{flag(name)}: got {value!r}, wanted {wanted}")
