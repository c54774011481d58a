"""Tables of what users choose by name: a name is taken once, and errors say by whom."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from mulki.choices.registration import place_of, register
from mulki.errors import InputError


def first() -> None: ...


class Second: ...


def test_a_name_is_taken_once_and_both_places_are_named() -> None:
    table: dict[str, object] = {}
    register(table, "gate", "mine", first)
    with pytest.raises(InputError) as caught:
        register(table, "gate", "mine", Second)
    assert str(caught.value) == (
        f'gate "mine": registered by {place_of(first)} and again by {place_of(Second)}; '
        "rename one of the two"
    )
    assert table == {"mine": first}


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_name_is_a_text(name: object) -> None:
    table: dict[str, object] = {}
    with pytest.raises(InputError, match=f"^gate: got the name {name!r}"):
        register(table, "gate", name, first)  # type: ignore[arg-type]
    assert table == {}


def test_a_place_is_a_line_of_a_file_seen_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = os.path.relpath(__file__)
    assert place_of(first) == f"{file}, line {first.__code__.co_firstlineno}"
    assert file.startswith(os.pardir)


@pytest.mark.parametrize(
    ("thing", "place"),
    [(len, "builtins.len"), (int, "builtins.int"), (functools.partial(len), "functools.partial")],
)
def test_what_has_no_file_is_named_by_its_module(thing: object, place: str) -> None:
    assert place_of(thing) == place
