"""Which images are held out: by names and classes alone, and by other images for rounding alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulki.data.held_out import held_out
from mulki.errors import InputError

FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)


@st.composite
def images(draw: st.DrawFn) -> dict[str, int]:
    """Classes by name of an image, at least two images in each of one to four classes."""
    counts = draw(st.lists(st.integers(2, 30), min_size=1, max_size=4))
    names = draw(st.lists(st.text(), min_size=sum(counts), max_size=sum(counts), unique=True))
    targets = [target for target, count in enumerate(counts) for _ in range(count)]
    return dict(zip(names, targets, strict=True))


def held(classes: dict[str, int], fraction: float) -> set[str]:
    chosen = held_out([*classes], [*classes.values()], fraction, where="birds")
    assert len(chosen) == len(classes)
    return {name for name, each in zip(classes, chosen, strict=True) if each}


@given(images(), FRACTIONS)
def test_each_class_is_divided_by_the_share(classes: dict[str, int], fraction: float) -> None:
    chosen = held(classes, fraction)
    for target in {*classes.values()}:
        whole = {name for name, each in classes.items() if each == target}
        count = len(whole & chosen)
        assert 1 <= count <= len(whole) - 1
        # To the nearest, but where that would leave one side empty.
        nearest = abs(count - fraction * len(whole)) <= 0.5
        assert nearest or count in (1, len(whole) - 1)


@given(images(), FRACTIONS, st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(
    classes: dict[str, int], fraction: float, random: Any
) -> None:
    others = list(classes.items())
    random.shuffle(others)
    assert held(dict(others), fraction) == held(classes, fraction)


@given(images(), FRACTIONS, st.text(), st.integers(0, 3))
def test_an_image_more_moves_at_most_one_other(
    classes: dict[str, int], fraction: float, name: str, target: int
) -> None:
    if name in classes or target not in classes.values():
        return
    before, after = held(classes, fraction), held({**classes, name: target}, fraction)
    moved = before ^ (after - {name})
    assert len(moved) <= 1
    assert all(classes[each] == target for each in moved)


@given(images(), FRACTIONS, FRACTIONS)
def test_a_larger_share_holds_what_a_smaller_one_does(
    classes: dict[str, int], one: float, other: float
) -> None:
    assert held(classes, min(one, other)) <= held(classes, max(one, other))


def test_the_choice_is_the_same_for_good() -> None:
    # From the digests of the names, as sha256sum has them: 0 begins with 5f, 1 with 6b, 2 with d4,
    # 3 with 4e, 4 with 4b.
    names = ["0", "1", "2", "3", "4"]
    assert held_out(names, [0] * 5, 0.4, where="x") == [False, False, False, True, True]
    assert held_out(names, [0] * 5, 0.5, where="x") == [False, False, False, True, True]
    assert held_out(names, [0] * 5, 0.6, where="x") == [True, False, False, True, True]
    # In two classes, each by itself.
    assert held_out(names, [1, 1, 1, 0, 0], 0.1, where="x") == [True, False, False, False, True]


def test_names_that_are_no_utf_8() -> None:
    assert sum(held_out(["\udcff.png", "a.png"], [0, 0], 0.5, where="x")) == 1


def test_a_class_of_one_image_is_named() -> None:
    with pytest.raises(InputError) as caught:
        held_out(["a", "b", "c"], [0, 0, 1], 0.2, where="birds", classes=["crow", "jay"])
    assert str(caught.value) == (
        "birds: class jay has one image, c, wanted at least one to train on and one to test on; "
        "add images or remove the class"
    )
    with pytest.raises(InputError, match="class jay .*2 more like"):
        held_out(["a", "b", "c", "d", "e"], [0, 0, 1, 2, 3], 0.2, where="x", classes=["", "jay"])
    with pytest.raises(InputError, match="^birds: the task .*, a, "):
        held_out(["a"], [0], 0.2, where="birds")


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5, math.nan, math.inf, True, "0.2", 1j])
def test_what_is_no_share(fraction: Any) -> None:
    with pytest.raises(InputError, match="^test_fraction: got "):
        held_out(["a", "b"], [0, 0], fraction, where="birds")
