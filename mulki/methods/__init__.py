"""Methods: what is trained. One file each; a new one needs no edit elsewhere.

A method registers itself by being a `Method` subclass with a `name`, in a module of this package or
in any other that has been imported.
"""

from __future__ import annotations

import importlib
import pkgutil

from mulki.errors import InputError, nearest
from mulki.methods.base import PREVIOUS, ZERO_SHOT, Method, Needs, TaskStart

__all__ = ["PREVIOUS", "ZERO_SHOT", "Method", "Needs", "TaskStart", "available", "get"]


def available() -> dict[str, type[Method]]:
    """Every method by name, sorted."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    found = {}
    pending = list(Method.__subclasses__())
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if "name" in vars(cls):
            found[cls.name] = cls
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
