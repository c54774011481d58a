"""``mulki completion``: commands and options that a shell completes.

A shell asks by running ``mulki`` with the line so far in its environment, see argcomplete. The
parser of the command, which has all of its options, answers and ends the process.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import suppress

from mulki.errors import InputError

SHELLS = ("bash", "zsh", "fish")


def is_asked() -> bool:
    """Whether this process was started by a shell that completes a line."""
    return "_ARGCOMPLETE" in os.environ


def answer(parser: argparse.ArgumentParser) -> None:
    """Complete the line by the options of a parser, and end the process.

    Args:
        parser: whose ``prog`` are the words that it comes after, as ``mulki bench plot``.
    """
    import argcomplete

    os.environ["_ARGCOMPLETE"] = str(len(parser.prog.split()))
    argcomplete.autocomplete(parser, exit_method=os._exit)


def complete(commands: Mapping[str, Callable[[list[str]], int]]) -> int:
    """Complete the line that the shell has so far.

    Args:
        commands: by name; each builds its parser before it does anything.
    """
    from argcomplete.lexers import split_line

    line, point = os.environ.get("COMP_LINE", ""), os.environ.get("COMP_POINT", "0")
    words = split_line(line, int(point))[3]
    if len(words) < 2:
        parser = argparse.ArgumentParser(prog="mulki")
        parser.add_argument("command", choices=list(commands))
        parser.add_argument("--version", action="store_true")
        answer(parser)
    elif words[1] in commands:
        given = _method(words) if words[1] in ("run", "plan") else words[2:]
        # There is nothing to offer for a line that is wrong by now.
        with suppress(InputError):
            commands[words[1]](given)
    return 0


def _method(words: list[str]) -> list[str]:
    # It alone says which options there are. Modules and files that the line names are not read:
    # a key that completes a word should run no code of others.
    from mulki import methods

    given = [part for word in words for part in word.split("=", 1)]
    name = given[given.index("--method") + 1] if "--method" in given[:-1] else ""
    return ["--method", name] if name in methods.available() else []
