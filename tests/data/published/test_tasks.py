from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mulki.data.published import Source, published_task
from mulki.data.published.tasks import NotThere
from mulki.errors import InputError
from tests.data.published import layouts


def test_templates_are_those_of_the_protocol(zscl: Source) -> None:
    task = published_task("aircraft", zscl)
    assert task.templates == (
        "a photo of a {}, a type of aircraft.",
        "a photo of the {}, a type of aircraft.",
    )
    own = published_task("aircraft", zscl, ["an {}."])
    assert own.templates == ("an {}.",)


def test_fewer_images_than_published_are_refused(tmp_path: Path) -> None:
    layouts.aircraft(tmp_path)
    with pytest.raises(NotThere, match="100 .*3334"):
        published_task("aircraft", Source(tmp_path))


def test_missing_files_tell_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotThere) as caught:
        published_task("aircraft", Source(tmp_path))
    assert str(caught.value) == (
        f"aircraft: cannot be read from {tmp_path} (Dataset not found); mulki tasks mtil:aircraft "
        f"--prepare --data-root {tmp_path} downloads it"
    )
    with pytest.raises(NotThere, match="vision/issues/7545"):
        published_task("stanfordcars", Source(tmp_path))
    with pytest.raises(NotThere, match=r"mulki tasks cil:cub --prepare"):
        published_task("cub", Source(tmp_path, "cil"))


def test_an_image_that_is_listed_but_missing_is_named(data_root: Path, tmp_path: Path) -> None:
    shutil.copytree(data_root / "oxford-iiit-pet", tmp_path / "oxford-iiit-pet")
    (tmp_path / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg").unlink()
    with pytest.raises(NotThere, match=r"Abyssinian_1\.jpg"):
        published_task("oxfordpet", Source(tmp_path))


def test_classes_of_another_version_are_refused(data_root: Path, tmp_path: Path) -> None:
    shutil.copytree(data_root / "fgvc-aircraft-2013b", tmp_path / "fgvc-aircraft-2013b")
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    for file in data.glob("*.txt"):
        file.write_text(file.read_text().replace("A380", "A390"))
    with pytest.raises(NotThere, match='"A390"'):
        published_task("aircraft", Source(tmp_path))
    lines = (data / "variants.txt").read_text().splitlines()
    (data / "variants.txt").write_text("\n".join([*lines, "Concorde"]))
    with pytest.raises(NotThere, match="101 classes, 100 "):
        published_task("aircraft", Source(tmp_path))


def test_classes_follow_the_order_of_the_files(data_root: Path, tmp_path: Path) -> None:
    shutil.copytree(data_root / "fgvc-aircraft-2013b", tmp_path / "fgvc-aircraft-2013b")
    variants = tmp_path / "fgvc-aircraft-2013b" / "data" / "variants.txt"
    names = variants.read_text().splitlines()
    variants.write_text("\n".join(reversed(names)))
    task = published_task("aircraft", Source(tmp_path))
    assert task.classes == tuple(reversed(names))
    first = task.train.targets[0]
    assert task.classes[first] == names[0]


def test_a_module_that_is_missing_is_named(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match="^flowers: .*scipy"):
        published_task("flowers", Source(data_root))


def test_fingerprints_tell_splits_and_prompts_apart(zscl: Source) -> None:
    whole = published_task("eurosat", zscl)
    assert whole.fingerprint() == published_task("eurosat", zscl).fingerprint()
    other = published_task("eurosat", zscl, ["{} from above"])
    assert other.fingerprint() != whole.fingerprint()
    assert other.train.fingerprint() == whole.train.fingerprint() != whole.test.fingerprint()
