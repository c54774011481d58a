from __future__ import annotations

from pathlib import Path

import pytest

from mulki.data import Source
from mulki.errors import InputError


def test_the_folder_is_checked(tmp_path: Path) -> None:
    assert Source(tmp_path).folder() == tmp_path
    with pytest.raises(InputError, match="--data-root: .*no folder was given"):
        Source().folder()
    with pytest.raises(InputError, match="--data-root: .*gone is not a folder"):
        Source(tmp_path / "gone").folder()
