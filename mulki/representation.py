"""What `repr` shows of a loss: the arguments it was made with."""

from __future__ import annotations

import inspect


def arguments_shown(module: object, **values: object) -> str:
    """The arguments of a module that are not the defaults, for its `extra_repr`.

    Args:
        module: has them as attributes.
        values: of arguments of which that is not so.
    """
    shown = []
    for argument in inspect.signature(type(module)).parameters.values():
        name, default = argument.name, argument.default
        value = values.get(name, getattr(module, name, default))
        if repr(value) != repr(default):
            shown.append(f"{name}={value!r}")
    return ", ".join(shown)
