"""Image files: which are found unreadable, when, and what is left without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mulki.data import BadImage, folder_task

Make = Callable[..., Path]


def test_unreadable_image_stops_before_training(make_folder: Make) -> None:
    root = make_folder()
    bad = root / "train" / "crow" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(BadImage, match=r"1\.png.*--skip-bad-images") as caught:
        folder_task(root)
    assert str(bad) in str(caught.value) and "more like it" not in str(caught.value)
    (root / "test" / "crow" / "0.png").write_bytes(b"")
    with pytest.raises(BadImage, match="1 more like it"):
        folder_task(root)


def test_unreadable_images_are_skipped_and_listed(make_folder: Make) -> None:
    root = make_folder()
    bad = [root / "train" / "crow" / "1.png", root / "test" / "blue_jay" / "0.png"]
    bad[0].write_bytes(b"")
    bad[1].unlink()
    bad[1].symlink_to(root / "gone.png")
    task = folder_task(root, skip_bad_images=True)
    assert task.skipped == tuple(map(str, bad))
    assert list(task.train.targets) == [0, 0, 0, 1, 1]
    assert list(task.test.targets) == [0, 0, 1, 1, 1]
    names = [task.train.name(i) for i in range(5)] + [task.test.name(i) for i in range(5)]
    assert not set(names) & set(task.skipped)


def test_content_counts_not_the_suffix(make_folder: Make) -> None:
    root = make_folder(count=1)
    for i in range(40):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / "train" / "crow" / f"w{i}.jpg", "webp")
    task = folder_task(root)
    assert len(task.train) == 42
    assert task.train.load(41).getpixel((0, 0))[0] in range(7, 13)  # type: ignore[index]


def test_damage_that_appears_later_is_named_on_loading(make_folder: Make) -> None:
    root = make_folder()
    task = folder_task(root)
    (root / "train" / "crow" / "0.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"crow.0\.png"):
        task.train.load(3)
