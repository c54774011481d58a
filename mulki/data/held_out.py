"""Which images of a task without a split of its own are held out to test on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from numbers import Real
from typing import Protocol, TypeVar

from mulki.errors import InputError

# What a message proposes where a split is missing.
OPTION = "--test-fraction 0.2"

_Images = TypeVar("_Images", bound="Divisible")


class Divisible(Protocol):
    """Images that can be divided."""

    @property
    def files(self) -> Sequence[str]:
        """Names relative to the task's folder, no two alike, [n]."""

    @property
    def targets(self) -> Sequence[int]:
        """Class indices, [n]."""

    def chosen(self: _Images, chosen: Sequence[bool]) -> _Images:
        """The images whose place in `chosen`, [n], is true."""


def divided(
    splits: Sequence[_Images],
    test_fraction: float | None,
    *,
    where: str,
    classes: Sequence[str] = (),
) -> tuple[_Images, _Images]:
    """The images to train on and those to test on.

    Args:
        splits: these two, or all images in one.
        test_fraction: of all images in one, the share to test on; None where there are two, or
            where all of one are tested on.
        where: see `held_out`.
        classes: see `held_out`.

    Raises:
        InputError: see `held_out`.
    """
    if len(splits) == 2:
        assert test_fraction is None
        return splits[0], splits[1]
    (images,) = splits
    tested = [True] * len(images.targets)
    if test_fraction is not None:
        tested = held_out(images.files, images.targets, test_fraction, where=where, classes=classes)
    return images.chosen([not each for each in tested]), images.chosen(tested)


def held_out(
    names: Sequence[str],
    targets: Sequence[int],
    fraction: float,
    *,
    where: str,
    classes: Sequence[str] = (),
) -> list[bool]:
    """Choose the images to test on: the same share of each class.

    The images of a class are ordered by the SHA-256 of their names. The first ones are held out: as
    many as the share comes to, rounded to the nearest number, at least one, and not all. So the
    choice depends on nothing but the names and the classes: not on their order, a seed or a
    machine. Where an image is added, at most one other image changes sides, and only in its class.

    Args:
        names: relative to the task's folder, or numbers of rows, no two alike, [n].
        targets: class indices, [n]; all the same where there are no classes.
        fraction: the share, in (0, 1).
        where: the folder or file, for messages.
        classes: their names, for messages; none where there are no classes.

    Returns:
        [n], True for an image to test on.

    Raises:
        InputError: a class has one image, or the fraction lies outside (0, 1).
    """
    if not isinstance(fraction, Real) or not 0 < fraction < 1:
        raise InputError(
            f"test_fraction: got {fraction!r}, wanted a number above 0 and below 1, such as 0.2"
        )
    by_class: dict[int, list[int]] = {}
    for place, target in enumerate(targets):
        by_class.setdefault(target, []).append(place)
    if lonely := [target for target, places in by_class.items() if len(places) == 1]:
        of, remedy = "the task", ""
        if classes:
            of, remedy = f"class {classes[lonely[0]]}", " or remove the class"
        more = f"; {len(lonely) - 1} more like it" if len(lonely) > 1 else ""
        raise InputError(
            f"{where}: {of} has one image, {names[by_class[lonely[0]][0]]}, wanted at least one to "
            f"train on and one to test on; add images{remedy}{more}"
        )
    chosen = [False] * len(names)
    for places in by_class.values():
        places.sort(key=lambda place: _digest(names[place]))
        count = min(max(round(fraction * len(places)), 1), len(places) - 1)
        for place in places[:count]:
            chosen[place] = True
    return chosen


def _digest(name: str) -> bytes:
    # File names need not be valid UTF-8.
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
