from __future__ import annotations

from pathlib import Path

import pytest

from mulki.data import Source, load_sequence
from mulki.data.published.collections import COLLECTIONS
from mulki.errors import InputError
from tests.data.published import layouts

MTIL = COLLECTIONS["mtil"]


def names(tasks: list) -> list[str]:  # type: ignore[type-arg]
    return [task.name for task in tasks]


def test_order_ii_is_the_permutation_of_zscl() -> None:
    first = MTIL.in_order("I")
    assert MTIL.in_order("II") == tuple(first[i] for i in (9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2))
    assert list(first) == sorted(first)


def test_all_of_mtil_is_read_in_any_order(zscl: Source) -> None:
    tasks = load_sequence(["mtil"], source=zscl)
    assert names(tasks) == list(MTIL.members)
    assert sum(len(task.classes) for task in tasks) == 1201
    backwards = ",".join(reversed(MTIL.members))
    assert names(load_sequence(["mtil"], backwards, source=zscl)) == backwards.split(",")


def test_single_tasks_mix_with_others(zscl: Source) -> None:
    tasks = load_sequence(["mtil:mnist", "embedded:digits", "mtil:dtd"], source=zscl)
    assert names(tasks) == ["mnist", "digits", "dtd"]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("III", 'order "III": mtil has the orders I, II; another order is all its tasks'),
        ("dtd,aircraft", "caltech101"),
        ("dtd,cars", "task cars"),
        (",".join([*MTIL.members, "dtd"]), "twice"),
    ],
)
def test_other_orders_are_refused(order: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        load_sequence(["mtil"], order, source=Source(tmp_path))


def test_what_is_missing_is_named_at_once(data_root: Path, tmp_path: Path) -> None:
    layouts.mnist(tmp_path)
    with pytest.raises(InputError, match=r"^mtil: 10 .*aircraft, calt.*--prepare"):
        load_sequence(["mtil"], source=Source(tmp_path))


def test_unknown_tasks_and_protocols_are_refused(tmp_path: Path) -> None:
    for words, given, said in (
        (["mtil:Aircraft"], Source(tmp_path), '"aircraft"'),
        (["xtail"], Source(tmp_path, "zscl"), "^--protocol zscl: xtail .*coop"),
        (["embedded"], Source(tmp_path, "coop"), "^--protocol: got coop"),
        (["mtil:dtd", "xtail:mnist"], Source(tmp_path), "got mtil:dtd with zscl, xtail:mnist with"),
        (["mtil:dtd"], Source(), "^--data-root: "),
        (["cil"], Source(tmp_path), "^cil: .*cil:c"),
    ):
        with pytest.raises(InputError, match=said):
            load_sequence(words, source=given)
