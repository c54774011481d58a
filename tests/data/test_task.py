from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulki.data import Task
from mulki.data.task import split_fingerprint
from mulki.errors import InputError
from tests.data.data_helpers import Blank

TASK = Task("pets", ("cat", "dog"), ("a {}.", "the {}!"), Blank((0, 1)), Blank((1, 0)))


def test_prompts_fill_every_template_for_every_class() -> None:
    assert TASK.prompts() == [["a cat.", "the cat!"], ["a dog.", "the dog!"]]


def test_one_template_without_a_list() -> None:
    assert replace(TASK, templates="a {}.").prompts() == [["a cat."], ["a dog."]]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": ""}, ["empty name"]),
        ({"classes": ("cat", "caf\udce9")}, ["pets", r"'caf\udce9'", "not UTF-8", "rename"]),
        ({"classes": ("cat",)}, ["pets", "1 class", "at least two"]),
        ({"classes": ("cat", " ")}, ["pets", "class name is empty"]),
        ({"classes": ("cat", "cat")}, ["pets", '"cat" occurs twice', "rename or merge"]),
        ({"templates": ()}, ["pets", "no template"]),
        ({"templates": ("a photo",)}, ["pets", '"a photo"', "exactly one {}"]),
        ({"templates": ("{} {}",)}, ["pets", "exactly one {}"]),
        ({"train": Blank(())}, ["pets", "train split is empty", "add images"]),
        ({"test": Blank(())}, ["pets", "test split is empty"]),
        ({"test": Blank((0,), size=3)}, ["pets", "test", "3 images and 1 targets"]),
        ({"test": Blank((0, 2))}, ["pets", "target 2", "test", "0..1"]),
        ({"train": Blank((0, -1))}, ["pets", "target -1", "train", "0..1"]),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        replace(TASK, **change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_only_tested_may_be_smaller() -> None:
    small = replace(TASK, classes=("cat",), train=Blank(()), test=Blank((0,)), test_only=True)
    assert small.prompts() == [["a cat.", "the cat!"]]
    for change in ({"classes": ()}, {"test": Blank(())}, {"train": Blank((1,))}):
        with pytest.raises(InputError, match="pets"):
            replace(small, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ("cat", "cow")},
        {"templates": ("a {}.",)},
        {"train": Blank((0, 1), key="other")},
        {"test": Blank((0, 1), key="other")},
    ],
)
def test_fingerprint_changes_with_whatever_changes_results(change: dict[str, Any]) -> None:
    assert replace(TASK, **change).fingerprint() != TASK.fingerprint()


def test_fingerprint_ignores_the_name() -> None:
    assert replace(TASK, name="beasts").fingerprint() == TASK.fingerprint()


ROWS = st.lists(st.tuples(st.text(st.characters(exclude_characters="\0")), *[st.integers(0)] * 2))


@given(ROWS, ROWS)
def test_split_fingerprints_agree_exactly_for_equal_splits(a: list[Any], b: list[Any]) -> None:
    assert (split_fingerprint(a) == split_fingerprint(b)) == (a == b)


def test_split_fingerprint_takes_file_names_that_are_not_utf8() -> None:
    prints = {split_fingerprint([(os.fsdecode(name), 1, 0)]) for name in (b"\xe9", b"\xe8", b"e")}
    assert len(prints) == 3


def test_prompts_and_splits_have_fingerprints_of_their_own() -> None:
    one = Task("t", ("a", "b"), ("{}",), Blank((0, 1)), Blank((0, 1)))
    renamed = replace(one, classes=("a", "c"))
    moved = replace(one, train=Blank((0, 1), key="other"))
    assert one.prompts_fingerprint() == moved.prompts_fingerprint()
    assert one.prompts_fingerprint() != renamed.prompts_fingerprint()
    assert one.splits_fingerprint() == renamed.splits_fingerprint()
    assert one.splits_fingerprint() != moved.splits_fingerprint()
