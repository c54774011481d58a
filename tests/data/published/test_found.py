from __future__ import annotations

from pathlib import Path

import pytest

from mulki.data.published.found import image_files
from mulki.errors import InputError
from tests.data.published.layouts import jpeg, put


def test_names_are_relative_and_sizes_those_of_the_files(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.jpg", jpeg(1))
    put(tmp_path / "b" / "2.jpg", jpeg(2))
    images = image_files(tmp_path, [(tmp_path / "a" / "1.jpg", 1), ("b/2.jpg", 2)])
    assert images.files == ("a/1.jpg", "b/2.jpg")
    assert images.sizes == (len(jpeg(1)), len(jpeg(2)))
    assert images.targets == (1, 2)


def test_a_listed_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jpg: cannot be read .*name it"):
        image_files(tmp_path, [("gone.jpg", 0)])
