"""Tables of what users choose by name: adding to one, and where an item of it was defined."""

from __future__ import annotations

import inspect
import os
from collections.abc import MutableMapping
from typing import Any, TypeVar

from mulki.errors import InputError

T = TypeVar("T")


def register(table: MutableMapping[str, T], kind: str, name: str, thing: T) -> None:
    """Add a function or class to a table.

    Args:
        table: items by name.
        kind: what an error calls an item.
        name: what users will call it.

    Raises:
        InputError: the name is empty or taken; both places are named.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{kind}: got the name {name!r}, wanted text; give it a name")
    if name in table:
        raise taken(kind, name, table[name], thing)
    table[name] = thing


def taken(kind: str, name: str, first: Any, second: Any) -> InputError:
    """The error for two items of one name."""
    return InputError(
        f'{kind} "{name}": registered by {place_of(first)} and again by {place_of(second)}; '
        "rename one of the two"
    )


def place_of(thing: Any) -> str:
    """File and line that define a function or class; its module and name if these are unknown."""
    try:
        file = os.path.relpath(inspect.getsourcefile(thing) or "")
        return f"{file}, line {inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError, ValueError):
        known = thing if hasattr(thing, "__qualname__") else type(thing)
        return f"{known.__module__}.{known.__qualname__}"
