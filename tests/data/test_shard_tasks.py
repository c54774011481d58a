"""Tasks from tar shards with classes: what is read, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mulki.data import BadImage, load_sequence, shard_task
from mulki.data.sequences import has_validation
from mulki.errors import InputError
from tests.data.data_helpers import encoded, picture, write_tar

CLASSES = {0: 1, 1: 0, 2: 1, 3: 0, 4: 0, 5: 1}


def files(*numbers: int) -> dict[str, bytes]:
    found = {}
    for n in numbers:
        found |= {f"{n}.png": encoded(picture(n), "png"), f"{n}.cls": f"{CLASSES[n]}\n".encode()}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four training images in two shards, and two test images."""
    root = tmp_path / "pets"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
    write_tar(root / "train" / "0.tar", files(0, 1))
    write_tar(root / "train" / "1.tar.gz", files(2, 3))
    write_tar(root / "test" / "0.tar", files(4, 5))
    (root / "classes.txt").write_text("cat\nbig dog\n")
    return root


def test_a_folder_of_shards_is_a_task(folder: Path) -> None:
    task = shard_task(folder)
    assert (task.name, task.classes) == ("pets", ("cat", "big dog"))
    assert task.templates == ("a photo of a {}.",) and task.skipped == ()
    assert list(task.train.targets) == [1, 0, 1, 0] and list(task.test.targets) == [0, 1]
    assert task.test.name(1) == f"{folder}/test/0.tar:5.png"
    assert task.train.load(2).tobytes() == picture(2).convert("RGB").tobytes()
    (same,) = load_sequence([str(folder)])
    assert same.fingerprint() == task.fingerprint()
    (folder / "test").rename(folder / "val")
    assert load_sequence([str(folder)])[0].fingerprint() == task.fingerprint()
    (folder / "val").rename(folder / "test")
    # Another class is another task.
    write_tar(folder / "test" / "0.tar", files(4, 5) | {"5.cls": b"0"})
    assert shard_task(folder).fingerprint() != task.fingerprint()


def test_validation_images(folder: Path) -> None:
    without = shard_task(folder)
    (folder / "val").mkdir()
    assert without.val is None and shard_task(folder).fingerprint() == without.fingerprint()
    write_tar(folder / "val" / "0.tar", {"6.png": encoded(picture(6), "png"), "6.cls": b"1"})
    task = shard_task(folder)
    assert task.val is not None and list(task.val.targets) == [1]
    assert task.val.name(0) == f"{folder}/val/0.tar:6.png"
    assert task.test.fingerprint() == without.test.fingerprint()
    assert task.fingerprint() != without.fingerprint()
    assert shard_task(folder, test_only=True).val is None
    assert has_validation(str(folder)) and not has_validation(str(folder / "none"))
    write_tar(folder / "val" / "0.tar", {"6.png": b"x", "6.cls": b"1"})
    with pytest.raises(BadImage, match=r"0\.tar:6\.png"):
        shard_task(folder)
    task = shard_task(folder, skip_bad_images=True)
    assert task.val is None and len(task.skipped) == 1


def test_validation_images_that_cannot_be(folder: Path) -> None:
    (folder / "val").mkdir()
    shutil.copy(folder / "train" / "0.tar", folder / "val" / "1.tar")
    with pytest.raises(InputError, match=r"val/1\.tar: has the content of .*train/0\.tar"):
        shard_task(folder)
    (folder / "val" / "1.tar").unlink()
    write_tar(folder / "val" / "1.tar", {"6.png": encoded(picture(6), "png"), "6.cls": b"2"})
    with pytest.raises(InputError, match=r"6\.png: class '2', wanted a number from 0 to 1"):
        shard_task(folder)
    (folder / "val" / "1.tar").unlink()
    (folder / "val" / "cat").mkdir()
    with pytest.raises(InputError, match="no tar shards of validation images"):
        shard_task(folder)


def test_test_images_alone(folder: Path) -> None:
    whole = shard_task(folder, test_only=True)
    assert len(whole.train) == 4 and whole.test_only
    shutil.rmtree(folder / "train")
    with pytest.raises(InputError, match="no tar shards in train/"):
        load_sequence([str(folder)])
    (task,) = load_sequence([str(folder)], test_only=True)
    assert len(task.train) == 0 and task.test.fingerprint() == whole.test.fingerprint()
    # A class of which nothing is left.
    write_tar(folder / "test" / "0.tar", files(5))
    (task,) = load_sequence([str(folder)], test_only=True)
    assert task.classes == ("cat", "big dog") and list(task.test.targets) == [1]


def test_prompts_and_unreadable_images(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a drawing of a {}.\n")
    write_tar(folder / "train" / "2.tar", {"9.png": b"no", "9.cls": b"1"})
    with pytest.raises(BadImage, match=r"2\.tar:9\.png: "):
        shard_task(folder)
    task = shard_task(folder, skip_bad_images=True)
    assert task.templates == ("a drawing of a {}.",)
    assert task.skipped == (f"{folder}/train/2.tar:9.png",) and len(task.train) == 4


def spoiled(content: dict[str, bytes]) -> Callable[[Path], object]:
    return lambda folder: write_tar(folder / "test" / "0.tar", files(4) | content)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no names": (lambda f: (f / "classes.txt").unlink(), r"classes\.txt: no such file; name the"),
    "no text": (lambda f: (f / "classes.txt").write_bytes(b"\xff"), r"classes\.txt: cannot be r"),
    "one name": (lambda f: (f / "classes.txt").write_text("cat"), "class '1'"),
    "several": (spoiled({"4.cls": b"[0, 1]"}), r"0\.tar:4\.png: classes '\[0, 1\]', .*multi-label"),
    "number": (spoiled({"4.cls": b"2"}), r"0\.tar:4\.png: class '2', wanted a number from 0 to 1"),
    "below zero": (spoiled({"4.cls": b"-1"}), "class '-1'"),
    "another script": (spoiled({"4.cls": "\u0661".encode()}), "class '\u0661', wanted a number"),
    "many digits": (spoiled({"4.cls": b"0" * 6000}), "class '0{20}', wanted a number"),
    "a word": (spoiled({"4.cls": b"cat"}), "class 'cat'"),
    "no class": (spoiled({"5.png": b"x"}), r"5 has an image and no class \(\.cls\)"),
    "no image": (spoiled({"5.cls": b"1"}), "5 has a class and no image"),
    "empty": (spoiled({"4.cls": b""}), r"the class 4\.cls is empty"),
    "no training image": (
        lambda f: (f / "classes.txt").write_text("cat\nbig dog\nowl\n"),
        "no readable train image of class owl; add some",
    ),
    "no test": (lambda f: shutil.rmtree(f / "test"), r"no tar shards in test/"),
    "in both": (
        lambda f: shutil.copy(f / "train" / "0.tar", f / "test" / "1.tar"),
        r"test/1\.tar: has the content of \S+train/0\.tar",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(folder: Path, case: str) -> None:
    spoil, said = BAD[case]
    spoil(folder)
    with pytest.raises(InputError, match=said) as info:
        load_sequence([str(folder)])
    assert "\n" not in str(info.value)


def test_a_part_of_shards_without_a_split_is_held_out(folder: Path) -> None:
    (folder / "test" / "0.tar").rename(folder / "2.tar")
    for shard in ("0.tar", "1.tar.gz"):
        (folder / "train" / shard).rename(folder / shard)
    for split in ("train", "test"):
        (folder / split).rmdir()
    with pytest.raises(InputError, match="train/.*--test-fraction"):
        load_sequence([str(folder)])
    (task,) = load_sequence([str(folder)], test_fraction=0.3)
    assert task.test_fraction == 0.3
    assert sorted(task.train.targets) == [0, 0, 1, 1] and sorted(task.test.targets) == [0, 1]
    names = [images.name(i) for images in (task.train, task.test) for i in range(len(images))]
    assert sorted(names) == [
        f"{folder}/{name}"
        for name in ("0.tar:0.png", "0.tar:1.png", "1.tar.gz:2.png", "1.tar.gz:3.png",
                     "2.tar:4.png", "2.tar:5.png")
    ]  # fmt: skip
    number = int(task.test.name(1)[-5])
    assert task.test.load(1).tobytes() == picture(number).convert("RGB").tobytes()
    assert task.test.targets[1] == CLASSES[number]
    moved = shard_task(folder.rename(folder.with_name("moved")), test_fraction=0.3)
    assert moved.fingerprint() == task.fingerprint()
    write_tar(folder.with_name("moved") / "3.tar", {"9.png": b"no", "9.cls": b"1"})
    left = shard_task(folder.with_name("moved"), test_fraction=0.3, skip_bad_images=True)
    assert len(left.skipped) == 1 and len(left.train) + len(left.test) == 6


def test_shards_without_names_of_classes_are_shards_too(folder: Path) -> None:
    for shard in ("0.tar", "1.tar.gz"):
        (folder / "train" / shard).rename(folder / shard)
    for split in ("train", "test"):
        shutil.rmtree(folder / split)
    (folder / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"classes\.txt: "):
        load_sequence([str(folder)], test_fraction=0.3)


def test_a_share_changes_nothing_where_shards_have_a_split(folder: Path) -> None:
    task = shard_task(folder, test_fraction=0.3)
    assert task.test_fraction is None and task.fingerprint() == shard_task(folder).fingerprint()


def test_tar_files_beside_class_folders_are_no_shards(folder: Path) -> None:
    (folder / "classes.txt").unlink()
    for place in (folder / "train", folder / "test", folder):
        if place != folder:
            shutil.rmtree(place)
            place.mkdir()
        write_tar(place / "all.tar", files(0, 1))
        for number, target in CLASSES.items():
            (place / "ab"[target]).mkdir(exist_ok=True)
            picture(number).save(place / "ab"[target] / f"{number}.png")
    (task,) = load_sequence([str(folder)])
    assert task.classes == ("a", "b") and len(task.train) == len(CLASSES)
    for split in ("train", "test"):
        shutil.rmtree(folder / split)
    (task,) = load_sequence([str(folder)], test_fraction=0.3)
    assert task.classes == ("a", "b") and len(task.train) == 4
