"""Image files: which are found unreadable, when, and what is left without them."""

from __future__ import annotations

import builtins
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mulki.data import BadImage, folder_task
from mulki.data.image_files import checks_reported
from tests.data.data_helpers import encoded, picture

Make = Callable[..., Path]


def test_unreadable_image_stops_before_training(make_folder: Make) -> None:
    root = make_folder()
    bad = root / "train" / "crow" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(BadImage, match=r"1\.png.*--skip-bad-images") as caught:
        folder_task(root)
    assert str(bad) in str(caught.value) and "more like it" not in str(caught.value)
    (root / "test" / "crow" / "0.png").write_bytes(b"")
    with pytest.raises(BadImage, match=" 1 more"):
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


def test_many_images_are_listed_once_and_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are counted and not timed: on a slow or busy disk they are what takes the time.

    They are the same for each image, so 10^3 images show what 10^5 need.
    """
    count = 250
    content = encoded(picture(1), "PNG")
    for split in ("train", "test"):
        for name in ("crow", "owl"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(content)
    calls: Counter[tuple[str, str]] = Counter()

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(tmp_path)):
                calls[name, os.fspath(path)] += 1
            return real(path, *args, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "scandir"), (os, "listdir"), (os, "stat"), (builtins, "open")):
        counted(module, name)
    told: list[tuple[int, int]] = []
    called: list[int] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        called.append(len(calls))

    with checks_reported(tell):
        task = folder_task(tmp_path)
    monkeypatch.undo()
    assert len(task.train) == len(task.test) == 2 * count
    assert told == [(done, 4 * count) for done in range(1, 4 * count + 1)]
    # The first is told of when a part of the images is checked, not when most of them are.
    assert called[0] < called[-1] / 4
    # Where the folders of the splits are, and no folder of images.
    assert {path for name, path in calls if name == "listdir"} <= {str(tmp_path)}
    listed = {path for name, path in calls if name == "scandir"}
    assert len(listed) == 6 and all(calls["scandir", path] == 1 for path in listed)
    # The stat of an image shows that it is no pipe before it is opened.
    for name in ("open", "stat"):
        of_images = [n for (what, path), n in calls.items() if what == name and path[-3:] == "png"]
        assert of_images == [1] * 4 * count, name
    monkeypatch.setattr(builtins, "open", lambda *given: pytest.fail("opened again"))
    assert len(task.fingerprint()) == 64
