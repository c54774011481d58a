from __future__ import annotations

import hashlib

import pytest

from mulki.data.published.splits import four_fifths
from tests.data.data_helpers import Blank

# SHA-256 of the indices of the three random splits of MTIL: should these change, so did the split.
PINNED = {
    8677: "bcba019ad9089348",
    27000: "c743d49acab3e7f0",
    108754: "72f9581c576325fb",
}


@pytest.mark.parametrize("count", PINNED)
def test_splits_of_mtil_stay_as_they_are(count: int) -> None:
    train, test = four_fifths(Blank((0,) * count))
    text = " ".join(map(str, (*train.indices, *test.indices)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PINNED[count]


def test_four_fifths_to_train_on() -> None:
    train, test = four_fifths(Blank(tuple(range(8677))))
    assert (len(train), len(test)) == (6941, 1736)
    assert sorted((*train.indices, *test.indices)) == list(range(8677))
