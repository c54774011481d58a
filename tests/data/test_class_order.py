from __future__ import annotations

import pytest

from mulki.data import Task
from mulki.data.class_order import reordered
from mulki.errors import InputError
from tests.data.data_helpers import Blank


def task() -> Task:
    return Task("t", ("a", "b", "c"), ("{}",), Blank((0, 1, 2, 1)), Blank((2, 0)))


def test_images_keep_their_class() -> None:
    new = reordered(task(), (2, 0, 1))
    assert new.classes == ("c", "a", "b")
    for images, before in ((new.train, task().train), (new.test, task().test)):
        assert len(images) == len(before)
        assert [new.classes[t] for t in images.targets] == [
            task().classes[t] for t in before.targets
        ]
    assert new.train.name(2) == "2"
    assert new.train.load(0).size == (4, 4)


def test_the_order_is_in_the_fingerprint() -> None:
    prints = {reordered(task(), o).train.fingerprint() for o in ((0, 1, 2), (2, 0, 1), (2, 1, 0))}
    assert len(prints) == 3


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (0, 1, 3)])
def test_other_orders_are_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="wanted one of its 3 "):
        reordered(task(), order)
