from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mulki.data import BadImage
from mulki.data.captioned_shards import Joined, Loadable
from mulki.data.unlabelled import Pictures, find_images
from mulki.errors import InputError
from tests.data.data_helpers import encoded, picture, write_shard


def names(found: Joined[Loadable]) -> list[str]:
    return [found.name(index) for index in range(len(found))]


def test_what_paths_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos/more").mkdir(parents=True)
    Path("shards").mkdir()
    for seed, file in enumerate(("photos/b.png", "photos/a.jpg", "photos/more/c.png", "d.png")):
        picture(seed).save(file)
    Path("photos/notes.txt").write_text("no image")
    write_shard(Path("shards/s.tar"), [(encoded(picture(9), "webp"), 0)])
    found = find_images(["d.png", "photos", "-", "shards"], ["photos/b.png\n", "\n", "gone.png"])
    assert names(found) == [
        "d.png",
        *("photos/a.jpg", "photos/b.png", "photos/more/c.png"),
        *("photos/b.png", "gone.png"),
        "shards/s.tar:000000.webp",
    ]
    again = pickle.loads(pickle.dumps(found))
    assert again.load(0).tobytes() == again.load(0).tobytes() == picture(3).tobytes()
    assert again.load(4).tobytes() == picture(0).tobytes()
    assert again.load(6).size == (16, 16)
    with pytest.raises(BadImage, match="gone.png"):
        found.load(5)
    assert names(find_images([Path("shards/s.tar")])) == ["shards/s.tar:000000.webp"]


def test_no_images_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: no such file or folder"):
        find_images([tmp_path / "gone"])
    with pytest.raises(InputError, match=f"^{tmp_path}, -: no images"):
        find_images([tmp_path, "-"])


def test_images_beside_shards_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [(encoded(picture(9), "webp"), 0)])
    assert len(find_images([tmp_path])) == 1
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=f"^{tmp_path}: has shards \\(s.tar\\) and images"):
        find_images([tmp_path])


def test_pictures_in_memory() -> None:
    grey = Pictures([picture(0).convert("L"), picture(1)], first=3)
    assert grey.load(0).mode == "RGB" and grey.name(1) == "image 4" and len(grey) == 2
    with pytest.raises(BadImage, match="^image 0: .*32-bit"):
        Pictures([picture(0).convert("F")]).load(0)
