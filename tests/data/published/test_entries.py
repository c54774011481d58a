from __future__ import annotations

import re

import pytest

from mulki.data.published import PROTOCOLS, entry, entry_names
from mulki.data.published.collections import COLLECTIONS
from mulki.errors import InputError

# Of ZSCL: classes, prompt templates, training and test images.
MTIL = {
    "aircraft": (100, 2, 3334, 3333),
    "caltech101": (101, 34, 6941, 1736),
    "cifar100": (100, 18, 50000, 10000),
    "dtd": (47, 8, 1880, 1880),
    "eurosat": (10, 3, 21600, 5400),
    "flowers": (102, 1, 1020, 6149),
    "food": (101, 1, 75750, 25250),
    "mnist": (10, 1, 60000, 10000),
    "oxfordpet": (37, 1, 3680, 3669),
    "stanfordcars": (196, 9, 8144, 8041),
    "sun397": (397, 2, 87003, 21751),
}


def test_mtil_has_1201_classes() -> None:
    assert sum(entry(name).num_classes for name in COLLECTIONS["mtil"].members) == 1201


def test_xtail_has_1100_classes() -> None:
    members = COLLECTIONS["xtail"].members
    assert len(members) == 10
    assert sum(entry(name).protocol("coop").num_classes for name in members) == 1100


@pytest.mark.parametrize("name", MTIL)
def test_numbers_are_the_published_ones(name: str) -> None:
    facts = entry(name)
    zscl = facts.protocol("zscl")
    found = (facts.num_classes, len(zscl.templates), zscl.train, zscl.test)
    assert found == MTIL[name]
    assert len(facts.classes) == zscl.num_classes == facts.num_classes


@pytest.mark.parametrize("name", entry_names())
def test_facts_are_whole(name: str) -> None:
    facts = entry(name)
    assert facts.title and facts.licence and facts.names and facts.home.startswith("http")
    assert len(facts.classes) in (0, facts.num_classes)
    # Readers tell names apart by their letters and digits.
    keys = {re.sub("[^a-z0-9]", "", name.casefold()) for name in facts.classes}
    assert len(keys) == len(facts.classes)
    assert set(facts.protocols) <= set(PROTOCOLS)
    for protocol in facts.protocols.values():
        assert all(template.count("{}") == 1 for template in protocol.templates)
        assert bool(protocol.split) == bool(protocol.images)
    assert sorted(facts.class_order) in ([], list(range(facts.num_classes)))
    assert all(len(archive.md5) == 32 for archive in facts.archives)
    assert facts.download is not None and facts.download.bytes > 10**7 and facts.download.source


def test_class_orders_of_class_incremental_work() -> None:
    # First and last indices, of ZSCL's lists (cil/class_orders).
    wanted = {
        "cifar100": ([87, 0, 52, 58, 44], [26, 35, 39]),
        "tinyimagenet": ([131, 181, 22, 172, 144], [107, 194, 98]),
        "imagenet100": ([68, 56, 78, 8, 23], [49, 57, 33]),
        "imagenet1k": ([54, 7, 894, 512, 126], [945, 697, 417]),
    }
    for name, (first, last) in wanted.items():
        order = list(entry(name).class_order)
        assert (order[:5], order[-3:]) == (first, last)


def test_names_that_are_easily_wrong() -> None:
    caltech = entry("caltech101").classes
    assert caltech[:4] == ("off-center face", "centered face", "leopard", "motorbike")
    assert entry("mnist").classes[3] == "3 - three"
    assert "apartment building/outdoor" in entry("sun397").classes
    assert "ball moss" in entry("flowers").classes
    assert entry("oxfordpet").classes[1] == "American Bulldog"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match='^aircrafts: .*"aircraft"'):
        entry("aircrafts")
    with pytest.raises(InputError, match="^--protocol cil: dtd .*zscl, coop"):
        entry("dtd").protocol("cil")
