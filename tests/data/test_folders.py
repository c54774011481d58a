from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mulki.data import ImageSet, Task, folder_task
from mulki.data.image_files import ImageFiles, holds_split
from mulki.data.sequences import load_sequence
from mulki.errors import InputError

Make = Callable[..., Path]


def _refused(path: Path, *words: object, **options: object) -> None:
    with pytest.raises(InputError) as caught:
        folder_task(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message


def test_a_folder_becomes_a_task(make_folder: Make) -> None:
    root = make_folder("birds", train=("crow", "blue_jay"), count=2)
    task = folder_task(root)
    assert task.name == "birds"
    assert task.classes == ("blue jay", "crow")
    assert task.templates == ("a photo of a {}.",)
    assert task.skipped == ()
    assert list(task.train.targets) == [0, 0, 1, 1]
    assert task.train.name(1) == str(root / "train" / "blue_jay" / "1.png")
    with Image.open(task.test.name(3)) as image:
        assert np.array_equal(task.test.load(3), image)


def test_hidden_entries_and_other_files_are_passed_over(make_folder: Make) -> None:
    root = make_folder()
    clean = folder_task(root)
    (root / "train" / ".cache").mkdir()
    (root / "train" / "labels.csv").write_text("x")
    (root / "train" / "crow" / ".hidden.png").write_bytes(b"x")
    (root / "train" / "crow" / "notes.txt").write_text("x")
    assert folder_task(root).fingerprint() == clean.fingerprint()


def test_suffixes_count_whatever_their_case(make_folder: Make) -> None:
    root = make_folder()
    (root / "train" / "crow" / "0.png").rename(root / "train" / "crow" / "0.PNG")
    assert len(folder_task(root).train) == 6


def test_linked_folders_are_followed(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder()
    (root / "train" / "crow").rename(tmp_path / "elsewhere")
    (root / "train" / "crow").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    task = folder_task(tmp_path / "link")
    assert task.name == "link" and len(task.train) == 6


def test_relative_paths_give_the_folder_its_name(
    make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_folder("birds"))
    assert folder_task(".").name == "birds"


def test_prompts_file_is_read_and_an_argument_wins(make_folder: Make) -> None:
    root = make_folder()
    (root / "prompts.txt").write_text("# birds\na {} in flight.\n")
    assert folder_task(root).templates == ("a {} in flight.",)
    assert folder_task(root, templates=["{}"]).templates == ("{}",)
    (root / "prompts.txt").write_text("fine {}\nbird\n")
    _refused(root, root / "prompts.txt", "line 2", "exactly one {}")


def test_fingerprint_is_the_same_elsewhere_and_changes_with_the_files(
    make_folder: Make, tmp_path: Path
) -> None:
    root = make_folder()
    first = folder_task(root).fingerprint()
    copy = tmp_path / "deep" / "copy"
    shutil.copytree(root, copy)
    assert folder_task(copy).fingerprint() == first
    (copy / "test" / "crow" / "2.png").rename(copy / "test" / "blue_jay" / "9.png")
    assert folder_task(copy).fingerprint() != first


def test_missing_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", tmp_path / "nothing", "no such folder", "train/ and test/")


def test_file_instead_of_a_folder(make_folder: Make, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    _refused(tmp_path / "x", tmp_path / "x", "a file", "train/ and test/")
    root = make_folder()
    shutil.rmtree(root / "test")
    (root / "test").write_text("")
    _refused(root, root / "test", "a file", "a folder for each class")


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_split_tells_what_is_there(make_folder: Make, split: str) -> None:
    root = make_folder()
    (root / split).rename(root / "more")
    _refused(root, root, f"no {split}/", "more/", f"{split}/<class>/*")
    (root / "more").rename(root / split.upper())
    (root / split.title()).mkdir(exist_ok=True)
    if len(list(root.iterdir())) == 3:  # capitals make two names on this file system
        _refused(root, root, f"no {split}/", f"{split.upper()}/", f"{split.title()}/")


def test_other_names_of_the_splits(make_folder: Make) -> None:
    root = make_folder()
    clean = folder_task(root).fingerprint()
    (root / "train").rename(root / "Train")
    for name in ("val", "Valid", "validation", "TEST"):
        (root / "test").rename(root / name)
        task = folder_task(root)
        assert task.fingerprint() == clean and f"{name}/" in task.test.name(0)
        (root / name).rename(root / "test")
    # What is called test goes before what is called val, which has validation images then.
    (root / "val").mkdir()
    assert folder_task(root).fingerprint() == clean and folder_task(root).val is None
    shutil.copytree(root / "test" / "crow", root / "val" / "owl")
    _refused(root, root / "val" / "owl", "without training images")
    (root / "val" / "owl").rename(root / "val" / "crow")
    task = folder_task(root)
    assert task.val is not None and "val/crow/" in task.val.name(0)
    assert list(task.val.targets) == [1] * 3
    assert task.fingerprint() != clean and folder_task(root, test_only=True).val is None
    shutil.rmtree(root / "val" / "crow")
    (root / "test").rename(root / "val" / "test")
    _refused(root, root, "same classes")


def test_validation_images_that_are_all_unreadable(make_folder: Make) -> None:
    root = make_folder()
    (root / "val" / "crow").mkdir(parents=True)
    (root / "val" / "crow" / "0.png").write_bytes(b"")
    task = folder_task(root, skip_bad_images=True)
    assert task.val is None and task.skipped == (str(root / "val" / "crow" / "0.png"),)


def test_a_hidden_folder_is_no_class(make_folder: Make) -> None:
    root = make_folder()
    (root / "val" / ".ipynb_checkpoints").mkdir(parents=True)
    assert folder_task(root).val is None
    # Nor does it make a split of the folder of a class.
    shutil.rmtree(root / "val")
    (root / "train" / "crow").rename(root / "train" / "val")
    (root / "train" / "val" / ".ipynb_checkpoints").mkdir()
    assert not holds_split(root / "train")


def test_images_without_class_folders(make_folder: Make) -> None:
    root = make_folder()
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    Image.new("RGB", (4, 4)).save(root / "train" / "x.png")
    _refused(root, root / "train", "no class folders", "train/<class>/*")


@pytest.mark.parametrize("leftover", [None, "photo.heic"])
def test_empty_class(make_folder: Make, leftover: str | None) -> None:
    root = make_folder()
    shutil.rmtree(root / "test" / "crow")
    (root / "test" / "crow").mkdir()
    if leftover:
        (root / "test" / "crow" / leftover).write_bytes(b"x")
    words = ["among 1 files"] if leftover else []
    _refused(root, root / "test" / "crow", "class crow", "no image", ".jpg", *words)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (("crow", "jay", "owl"), ("crow", "gull"), ("in train: jay, owl", "in test: gull")),
        (("crow",), None, ("only one class", "crow")),
        (("blue jay", "blue_jay"), None, ('"blue jay" occurs twice',)),
    ],
)
def test_classes_that_make_no_task(make_folder: Make, train: Any, test: Any, words: Any) -> None:
    _refused(make_folder(train=train, test=test), *words)


def test_folder_inside_a_class(make_folder: Make) -> None:
    root = make_folder()
    (root / "train" / "crow" / "young").mkdir()
    _refused(root, root / "train" / "crow" / "young", "inside a class", "move them up")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_folder_without_permission(make_folder: Make) -> None:
    root = make_folder()
    (root / "train" / "crow").chmod(0)
    try:
        _refused(root, root / "train" / "crow", "permissions")
    finally:
        (root / "train" / "crow").chmod(0o755)


def test_skipping_must_leave_every_class_an_image(make_folder: Make) -> None:
    root = make_folder()
    for path in (root / "test" / "crow").iterdir():
        path.write_bytes(b"")
    _refused(root, root / "test" / "crow", "class crow is unreadable", skip_bad_images=True)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("kind", ["pipe", "loop"])
def test_what_is_no_file_is_a_bad_image(make_folder: Make, kind: str) -> None:
    root = make_folder()
    odd = root / "train" / "crow" / "odd.png"
    os.mkfifo(odd) if kind == "pipe" else odd.symlink_to(odd)
    _refused(root, odd, "--skip-bad-images")
    assert folder_task(root, skip_bad_images=True).skipped == (str(odd),)


def test_a_link_to_itself_among_the_classes_is_passed_over(make_folder: Make) -> None:
    root = make_folder()
    clean = folder_task(root)
    (root / "train" / "self").symlink_to(root / "train" / "self")
    assert folder_task(root).classes == clean.classes


@pytest.fixture
def whole(make_folder: Make) -> Path:
    """Class folders without a split, with ten images each, two of them of other suffixes."""
    root = make_folder("birds", count=10)
    for folder in (root / "train").iterdir():
        folder.rename(root / folder.name)
        (root / folder.name / "3.png").rename(root / folder.name / "3.PNG")
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "test")
    return root


def _names(images: ImageSet) -> list[str]:
    return [os.sep.join(Path(images.name(i)).parts[-2:]) for i in range(len(images))]


def test_a_part_of_each_class_is_held_out(whole: Path, tmp_path: Path) -> None:
    (whole / "crow" / "notes.txt").write_text("x")
    (whole / ".cache").mkdir()
    task = folder_task(whole, test_fraction=0.3)
    assert (task.name, task.classes) == ("birds", ("blue jay", "crow"))
    assert task.test_fraction == 0.3
    assert list(task.train.targets) == [0] * 7 + [1] * 7
    assert list(task.test.targets) == [0] * 3 + [1] * 3
    assert {*_names(task.train)}.isdisjoint(_names(task.test))
    assert len({*_names(task.train), *_names(task.test)}) == 20
    # By the names below the folder, wherever that is and whatever the images.
    shutil.copytree(whole, tmp_path / "deep" / "copy")
    copied = folder_task(tmp_path / "deep" / "copy", test_fraction=0.3)
    assert copied.fingerprint() == task.fingerprint()
    assert folder_task(whole, test_fraction=0.5).fingerprint() != task.fingerprint()


def test_the_held_out_images_are_those_of_the_same_split_by_hand(whole: Path) -> None:
    task = folder_task(whole, test_fraction=0.3)
    for split in ("train", "test"):
        for name in _names(getattr(task, split)):
            (whole.parent / "hand" / split / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / name, whole.parent / "hand" / split / name)
    assert folder_task(whole.parent / "hand").fingerprint() == task.fingerprint()


def test_a_share_changes_nothing_where_there_is_a_split(make_folder: Make) -> None:
    root = make_folder()
    task = folder_task(root, test_fraction=0.5)
    assert task.test_fraction is None
    assert task.fingerprint() == folder_task(root).fingerprint()
    # A split that is half there is no split to make.
    (root / "train").rename(root / "more")
    _refused(root, "no train/ (found: more/, test/)", test_fraction=0.5)
    (root / "more").rename(root / "Train")
    shutil.rmtree(root / "test")
    remedy = f"or move what is in train/ up to {root} and pass --test-fraction 0.2"
    _refused(root, "no test/ (found: Train/)", remedy, test_fraction=0.5)


def test_class_folders_without_a_split_are_refused_without_a_share(whole: Path) -> None:
    _refused(
        whole,
        "no train/ (found: blue_jay/, crow/)",
        "train/<class>/* and test/<class>/*, or pass --test-fraction 0.2 if these are classes",
    )
    _refused(whole / "crow", "no train/ (found: no folders); lay the images out as train/<class>/*")


def test_class_folders_that_cannot_be_divided(whole: Path, make_folder: Make) -> None:
    _refused(whole / "crow", "no class folders", "crow/<class>/*", test_fraction=0.2)
    (whole / "crow" / "young").mkdir()
    _refused(whole, "inside a class; images lie directly in birds/<class>/", test_fraction=0.2)
    (whole / "crow" / "young").rmdir()
    _refused(whole, "test_fraction: got 1.0", test_fraction=1.0)
    bad = sorted((whole / "crow").iterdir())[1:]
    for path in bad:
        path.write_bytes(b"")
    _refused(whole, "crow/", "--skip-bad-images", "8 more like it", test_fraction=0.2)
    of_class = f"{whole / 'crow'}: every ", " image of class crow is unreadable"
    _refused(whole, *of_class, test_fraction=0.2, skip_bad_images=True)
    # What needs no reading of images is told first.
    for path in bad:
        path.unlink()
    _refused(whole, "class crow has one image, crow", test_fraction=0.2)
    shutil.rmtree(whole / "crow")
    _refused(whole, "only one class, blue_jay", test_fraction=0.2)


def test_a_class_may_be_called_as_a_split_is(whole: Path) -> None:
    (whole / "crow").rename(whole / "train")
    task = folder_task(whole, test_fraction=0.2)
    assert task.classes == ("blue jay", "train") and task.test_fraction == 0.2
    _refused(whole, "no test/ (found: blue_jay/, train/)", "pass --test-fraction 0.2 if these are")


def test_an_unreadable_image_changes_the_side_of_no_other(whole: Path) -> None:
    sides = [{*images.files} for images in _sides(folder_task(whole, test_fraction=0.5))]
    for name in ("0.png", "5.png"):
        bad = whole / "crow" / name
        bad.write_bytes(b"")
        task = folder_task(whole, test_fraction=0.5, skip_bad_images=True)
        assert str(bad) in task.skipped
        for images, before in zip(_sides(task), sides, strict=True):
            assert {*images.files} <= before


def _sides(task: Task) -> list[ImageFiles]:
    return [images for images in (task.train, task.test) if isinstance(images, ImageFiles)]


def test_what_is_only_tested_needs_no_training_images(make_folder: Make) -> None:
    root = make_folder()
    learned = folder_task(root)
    shutil.rmtree(root / "test" / "crow")
    tested = folder_task(root, test_only=True)
    assert tested.classes == learned.classes and set(tested.test.targets) == {0}
    assert len(tested.train) == 6 and tested.test_only
    shutil.rmtree(root / "train")
    alone = folder_task(root, test_only=True)
    assert (alone.classes, len(alone.train), len(alone.test)) == (("blue jay",), 0, 3)
    (root / "train" / "owl").mkdir(parents=True)
    with pytest.raises(InputError, match="only in test: blue_jay"):
        folder_task(root, test_only=True)
    with pytest.raises(InputError, match=r"no test/ .*test/<class>/\*"):
        folder_task(root / "test", test_only=True)


def test_a_folder_that_cannot_be_listed_is_named(
    make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the way of the command, which looks for shards first."""
    root = make_folder()
    real = os.scandir

    def scandir(folder: Any) -> Any:
        if Path(folder) == root / "train":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"train: cannot be listed \(Permission denied\)"):
        load_sequence([str(root)], "I")
