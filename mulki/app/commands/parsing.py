"""Parsing of a command line: options of a dataclass as flags, errors in one line.

tyro 1.0 and jsonargparse 4.53 were tried in place of this file, and were not taken. For `mulki run
--method lwf --alpha 1`, mulki says that lwf has no such option, which methods have it, and what to
do. tyro shows "Unrecognized options: --alpha, 1" in a frame; jsonargparse says the same below its
whole usage, and has no --no-lock-text. Neither tells what a user gave from what is a default, which
presets and configuration files need. Either would replace this file alone: bounds, presets, YAML,
the options of the chosen method and the messages would stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Sequence
from dataclasses import fields
from typing import Any, NoReturn, get_origin, get_type_hints

from mulki.app.commands import completion
from mulki.choices.options import choices_of, flag, option_name
from mulki.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are an `InputError`, and that takes no abbreviated options."""

    def __init__(self, **arguments: Any):
        super().__init__(allow_abbrev=False, **arguments)
        # Parsers without help look for a few options before the others are known.
        self._answers = self.add_help and completion.is_asked()

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        self._answer()
        return super().parse_known_args(*given, **named)

    def parse_known_intermixed_args(self, *given: Any, **named: Any) -> Any:
        self._answer()
        return super().parse_known_intermixed_args(*given, **named)

    def _answer(self) -> None:
        if self._answers:
            self._answers = False  # argcomplete parses by the same methods
            completion.answer(self)

    def error(self, message: str) -> NoReturn:
        if "ignored explicit argument" in message:
            message += " (a switch takes no value: --x or --no-x)"
        raise InputError(f"{message}; {self.prog} --help shows the usage")


class Once(argparse.Action):
    """Stores the values of an option that is given once: argparse would drop those given before."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest, None) is not None:
            raise argparse.ArgumentError(self, "got it twice; pass all values behind one")
        setattr(namespace, self.dest, values)


def add_options(
    group: argparse._ActionsContainer,
    options: type,
    only: str = "",
    defaults: bool = True,
    hidden: bool = False,
    skipped: Container[str] = (),
) -> None:
    """Add the fields of an options dataclass as flags.

    Args:
        group: a parser, or a group of one.
        options: the dataclass.
        only: the one field to add.
        defaults: whether the help tells them. A command that takes another value for what is left
            out does not.
        hidden: the help leaves them out.
        skipped: fields that are left out.
    """
    hints = get_type_hints(options)
    for item in fields(options):
        if (only and item.name != only) or item.name in skipped:
            continue
        flags = [flag(item.name), *filter(None, [item.metadata["alias"]])]
        text = item.metadata["help"]
        if defaults and item.default is not None:
            text += f" (default: {_shown(item.default)})"
        text = text.replace("%", "%%")
        how: dict[str, Any] = {"metavar": option_name(item.name).upper()}
        if hints[item.name] is bool:
            how = {"action": argparse.BooleanOptionalAction, "default": None}
        elif item.metadata["repeat"]:
            how = {"action": "append", "metavar": item.metadata["repeat"]}
        elif get_origin(hints[item.name]) is tuple:
            how |= {"nargs": "+", "action": Once}
        elif choices := choices_of(item, hints[item.name]):
            how["metavar"] = "{" + ",".join(choices) + "}"
        text = argparse.SUPPRESS if hidden else text
        added = group.add_argument(*flags, dest=item.name, help=text, **how)
        complete_by(added, choices_of(item, hints[item.name]))


def complete_by(added: argparse.Action, choices: Sequence[str]) -> None:
    """Let a shell complete the values of an argument by these; by files where there are none."""
    if choices:
        added.completer = lambda **_: choices  # type: ignore[attr-defined]


def _shown(default: Any) -> str:
    return (" ".join(default) or "none") if isinstance(default, tuple) else str(default)


def with_hyphens(argv: list[str]) -> list[str]:
    # Only names of options are changed: a value keeps its underscores.
    def hyphens(word: str) -> str:
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + value if word.startswith("--") else word

    return [hyphens(word) for word in argv]
