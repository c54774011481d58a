from __future__ import annotations

from pathlib import Path

import pytest

from mulki.data import Source
from mulki.errors import InputError


def test_the_folder_is_checked(tmp_path: Path) -> None:
    assert Source(tmp_path).folder() == tmp_path
    with pytest.raises(InputError, match="--data-root: .*no folder was given"):
        Source().folder()
    with pytest.raises(InputError, match="^--data-root: .*gone"):
        Source(tmp_path / "gone").folder()


def test_for_a_plan_there_may_be_no_folder_yet(tmp_path: Path) -> None:
    def told(facts: object) -> None: ...

    assert Source(tmp_path / "gone", absent=told).folder() == tmp_path / "gone"
    (tmp_path / "file").touch()
    for root in (None, tmp_path / "file"):
        with pytest.raises(InputError, match="--data-root: "):
            Source(root, absent=told).folder()
