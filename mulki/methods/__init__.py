"""Methods: what is trained. Each is one file; a new one needs no edit elsewhere.

A method registers itself by being a `Method` subclass with a `name`, in a module of this package or
in any other that has been imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields

from mulki.choices.options import option
from mulki.choices.registration import place_of, register
from mulki.errors import InputError, nearest
from mulki.methods.base import (
    PREVIOUS,
    SEEN,
    VOCABULARY,
    ZERO_SHOT,
    Encode,
    Method,
    Needs,
    Replay,
    TaskStart,
)

__all__ = [
    "PREVIOUS",
    "SEEN",
    "VOCABULARY",
    "ZERO_SHOT",
    "Encode",
    "Method",
    "Needs",
    "Replay",
    "TaskStart",
    "available",
    "get",
    "option",
]


def available() -> dict[str, type[Method]]:
    """Every method by name, sorted.

    Raises:
        InputError: two methods of one name, or one that lacks its summary or has an option that is
            not made by `mulki.methods.option`.
    """
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    found: dict[str, type[Method]] = {}
    classes = Method.__subclasses__()
    for cls in classes:  # which grows; one that inherits from two methods is found twice
        classes += [each for each in cls.__subclasses__() if each not in classes]
        if "name" in vars(cls):
            _check(cls)
            register(found, "method", cls.name, cls)
    return dict(sorted(found.items()))


def get(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        InputError: there is none.
    """
    methods = available()
    if name not in methods:
        raise InputError(
            f"--method: no method {name!r}{nearest(name, methods)}; choose from "
            f"{', '.join(methods)}"
        )
    return methods[name]


def _check(cls: type[Method]) -> None:
    if not isinstance(getattr(cls, "summary", None), str):
        raise _refused(cls, "has no summary; add a line of text, which --help shows")
    hints = vars(cls.Options).get("__annotations__", {})
    names = {item.name: item for item in fields(cls.Options)}
    for name in [*hints, *names]:
        if name not in names or "help" not in names[name].metadata:
            raise _refused(
                cls,
                f"option {name} is no field made by mulki.methods.option; write "
                f'{name}: float = option(1.0, "what it does") in a dataclass',
            )


def _refused(cls: type[Method], why: str) -> InputError:
    return InputError(f'method "{cls.name}" ({place_of(cls)}): {why}')
