from __future__ import annotations

from pathlib import Path

import pytest

from mulki.data.published import Entry, Source, entry, published_task
from mulki.data.published.blank import BlankImages, blank_task
from mulki.data.published.tasks import NotThere
from tests.data.published import layouts


def test_a_blank_task_has_the_published_numbers() -> None:
    facts = entry("caltech101")
    coop = facts.protocol("coop")
    task = blank_task("caltech101", facts.classes, coop.templates, coop)
    assert (len(task.classes), len(task.train), len(task.test)) == (100, coop.train, coop.test)
    assert set(task.train.targets) == set(range(100))
    image = task.train.load(0)
    assert image.mode == "RGB" and image.size == (500, 375)
    zscl = facts.protocol("zscl")
    assert blank_task("a", facts.classes, zscl.templates, zscl).classes == facts.classes


def test_it_stands_in_for_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    told: list[Entry] = []
    source = Source(tmp_path / "none", absent=told.append)
    task = published_task("dtd", source, ["a {}."])
    assert isinstance(task.train, BlankImages) and task.templates == ("a {}.",)
    assert [facts.name for facts in told] == ["dtd"] and not list(tmp_path.iterdir())
    # Nobody says how many training images the first hundred classes have.
    with pytest.raises(NotThere, match="^imagenet100: "):
        published_task("imagenet100", Source(tmp_path, "cil", told.append))
    # A part of a data set is none.
    layouts.aircraft(tmp_path)
    assert isinstance(
        published_task("aircraft", Source(tmp_path, absent=told.append)).train, BlankImages
    )
    assert [facts.name for facts in told] == ["dtd", "aircraft"]


def test_what_is_there_is_read(zscl: Source, data_root: Path) -> None:
    source = Source(data_root, "zscl", lambda facts: pytest.fail(f"{facts.name} is there"))
    assert published_task("dtd", source).fingerprint() == published_task("dtd", zscl).fingerprint()
