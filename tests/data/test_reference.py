"""Reference sets: what is read from a folder or a CSV file, and what is refused."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mulki.data import BadImage, Task, folder_task
from mulki.data.reference import ReferenceSet, images_below, read_reference
from mulki.data.vocabulary import Vocabulary
from mulki.errors import InputError
from tests.train_helpers import COLOURS, write_reference, write_task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return folder_task(write_task(tmp_path / "colours", COLOURS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "reference")


def test_a_folder_and_its_csv_are_the_same_set(folder: Path, tmp_path: Path) -> None:
    ours, same = read_reference(folder), read_reference(folder / "captions.csv")
    assert len(ours) == 12 and ours.fingerprint() == same.fingerprint()
    assert ours.captions[:2] == ("picture 0 of something red", "picture 1 of something red")
    assert ours.images.name(1) == str(folder / "red" / "1.png")
    moved = folder.rename(tmp_path / "elsewhere")
    assert read_reference(moved).fingerprint() == ours.fingerprint()
    (moved / "captions.csv").write_text(
        (moved / "captions.csv").read_text().replace("picture 0", "picture 9")
    )
    assert read_reference(moved).fingerprint() != ours.fingerprint()


def test_columns_in_any_order_and_captions_with_commas(folder: Path) -> None:
    with (folder / "few.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream)
        writer.writerow(["caption", "source", "path"])
        writer.writerow(['grün, "sehr" grün', "x", "./green/1.png"])
    few = read_reference(folder / "few.csv")
    assert few.captions == ('grün, "sehr" grün',)
    assert few.images.load(0).size == (32, 32)


def test_an_image_is_known_however_its_path_is_written(folder: Path) -> None:
    ours = read_reference(folder)
    file = folder / "captions.csv"
    text = file.read_text().replace("red/0", f"{folder}/red/0").replace("red/1", "x/../red/1")
    file.write_text(text)
    assert read_reference(folder).fingerprint() == ours.fingerprint()
    file.write_text(text + "./red/0.png,again\n")
    with pytest.raises(InputError, match=r"line 14: red/0\.png "):
        read_reference(folder)


def test_other_columns_and_hidden_folders_are_passed_over(folder: Path) -> None:
    ours = read_reference(folder)
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "red" / "0.png", folder / ".thumbnails")
    lines = (folder / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").write_text("".join(f"{line},,\n" for line in lines))
    assert read_reference(folder).fingerprint() == ours.fingerprint()


def test_unreadable_images_are_refused_or_left_out(folder: Path) -> None:
    bad = folder / "red" / "0.png"
    bad.write_bytes(b"x")
    with pytest.raises(BadImage, match=r"0\.png: "):
        read_reference(folder)
    reference = read_reference(folder, skip_bad_images=True)
    assert reference.skipped == (str(bad),) and len(reference) == 11
    assert reference.captions[0] == "picture 1 of something red"
    assert reference.images.name(0) == str(folder / "red" / "1.png")


def test_the_images_of_a_task_with_words(task: Task) -> None:
    words = tuple(f"word {i}" for i in range(7))
    reference = ReferenceSet.with_words(task.train, Vocabulary(words))
    assert reference.images is task.train and len(reference) == 18
    given = Counter(reference.captions)
    assert given.keys() == {f"a picture of a {word}" for word in words}
    assert set(given.values()) == {2, 3}, "each word about equally often"
    assert reference.captions[:7] == reference.captions[7:14]
    assert list(reference.captions[:7]) != [f"a picture of a {word}" for word in words]
    assert ReferenceSet.with_words(task.train, Vocabulary(words)).captions == reference.captions


def test_words_have_nothing_to_do_with_the_class(task: Task) -> None:
    words = Vocabulary(tuple(f"word {i}" for i in range(9)))
    other = replace(task, classes=("x", "y", "z"))
    captions = ReferenceSet.with_words(task.train, words).captions
    assert captions == ReferenceSet.with_words(other.train, words).captions
    places = [int(caption.rpartition(" ")[2]) for caption in captions[:9]]
    # Images come class by class, so words in their own order would.
    assert places != sorted(places) and sorted(places) == list(range(9))


def test_the_images_of_a_task_alone(task: Task) -> None:
    reference = ReferenceSet.with_words(task.train, None)
    assert reference.captions is None and len(reference) == 18


def test_images_alone_need_no_captions(folder: Path) -> None:
    with_captions = read_reference(folder)
    images = read_reference(folder, captions=False)
    assert images.captions is None and sorted(images.images.files) == sorted(
        with_captions.images.files
    )
    assert read_reference(folder / "captions.csv", captions=False).captions is None
    assert images.fingerprint() != with_captions.fingerprint()
    (folder / "captions.csv").unlink()
    assert read_reference(folder, captions=False).fingerprint() == images.fingerprint()


def test_linked_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    names = images_below(folder)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    (folder / "all").symlink_to(folder / "red")
    assert images_below(folder) == names
    assert images_below(tmp_path / "links") == {f"a/{name}" for name in names}


def damage(folder: Path, text: str | None) -> Path:
    file = folder / "captions.csv"
    if text is None:
        file.unlink()
    else:
        file.write_text(text, encoding="latin-1")
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has 12 images and no captions; add captions.csv"),
        ("path,caption\n", "has no caption for blue/0.png and 11 more images; add a line"),
        ("path,caption\nred/9.png,nine\n", "captions.csv, line 2: no image 'red/9.png'"),
        ("path,caption\n,nine\n", "line 2: the path is empty; fill it in"),
        ("path,caption\nred/0.png, \n", "captions.csv, line 2: the caption is empty"),
        ("path,caption\nred/0.png\n", "captions.csv, line 2: got 1 cells, wanted 2"),
        ("path,caption\nred/0.png,a, b\n", "line 2: got 3 cells, wanted 2; .* quotes"),
        ("path,caption,caption\nred/0.png,a,b\n", 'line 1: column "caption" occurs twice'),
        ("path,caption\nred/0.png,a\nred/0.png,b\n", "line 3: red/0.png has a caption already"),
        ("image,text\nred/0.png,a\n", "line 1: no column path .found: image, text.; begin"),
        ("", "is empty; pass a CSV with the columns path and caption"),
        (
            "path,caption\nred/0.png,gr\xfcn\n",
            "captions.csv: not a text file; save it as comma-separated UTF-8 text",
        ),
    ],
)
def test_a_damaged_folder_has_one_line(folder: Path, text: str | None, said: str) -> None:
    with pytest.raises(InputError, match=f"^--reference: .*{said}") as info:
        read_reference(damage(folder, text))
    assert "\n" not in str(info.value)


def test_an_empty_set_has_one_line(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("path,caption\n")
    for path in (tmp_path, tmp_path / "captions.csv"):
        with pytest.raises(InputError, match="^--reference: the set is empty; add images"):
            read_reference(path)
    with pytest.raises(InputError, match="^--reference: got "):
        read_reference("")
    with pytest.raises(InputError, match="^--reference: .*nowhere"):
        read_reference(tmp_path / "nowhere")
