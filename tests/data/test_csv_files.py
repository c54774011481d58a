from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mulki.data import BadImage, csv_task, load_sequence
from mulki.data.csv_files import CsvForm
from mulki.data.sequences import has_validation
from mulki.errors import InputError
from tests.data.data_helpers import picture

HEADER = "path,label,split\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images, a.png to h.png, in a folder `images`."""
    root = tmp_path / "birds"
    (root / "images").mkdir(parents=True)
    for seed, name in enumerate("abcdefgh"):
        picture(seed).save(root / "images" / f"{name}.png")
    return root


ROWS = [
    "images/a.png,crow,train",
    "images/b.png,blue jay,train",
    "images/c.png,crow,test",
    "images/d.png,blue jay,test",
]


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    def go(
        rows: Sequence[str] = ROWS, header: str = HEADER, name: str = "small.csv", **how: str
    ) -> Path:
        path = folder / name
        path.write_text(header + "\n".join(rows) + "\n", **({"encoding": "utf-8"} | how))  # type: ignore[arg-type]
        return path

    return go


def refused(path: Path, *words: object, **options: object) -> None:
    with pytest.raises(InputError) as caught:
        csv_task(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert message.startswith(str(path.parent)) and "\n" not in message


def test_a_file_becomes_a_task(write: Callable[..., Path], folder: Path) -> None:
    task = csv_task(write())
    assert task.name == "small" and task.classes == ("blue jay", "crow")
    assert task.templates == ("a photo of a {}.",)
    assert task.train.targets == (1, 0) and task.test.targets == (1, 0)
    assert task.train.name(0) == str(folder / "images" / "a.png")
    assert task.test.load(1).tobytes() == picture(3).tobytes()


def test_what_spreadsheets_write(write: Callable[..., Path], folder: Path) -> None:
    plain = csv_task(write())
    shutil.copy(folder / "images" / "a.png", folder / "images" / 'a, "big".png')
    rows = ['train,7,"images/a, ""big"".png",crow', 'test,,images/c.png,"crow"', ""]
    rows += ["test, x ,./images//d.png, blue jay ", "train,,images/b.png,blue jay"]
    path = write(rows, "split,note,path,label\n", encoding="utf-8-sig", newline="\r\n")
    task = csv_task(path)
    assert task.classes == plain.classes and task.train.targets == plain.train.targets
    assert task.train.name(0).endswith('a, "big".png')
    assert task.test.fingerprint() == plain.test.fingerprint()


def test_empty_columns_of_a_spreadsheet_are_ignored(write: Callable[..., Path]) -> None:
    path = write([f"{row},," for row in ROWS], "path,label,split,,\n")
    assert csv_task(path).fingerprint() == csv_task(write(name="plain.csv")).fingerprint()


def test_two_files(write: Callable[..., Path], folder: Path) -> None:
    one = csv_task(write())
    for train, test, name in (
        ("small_train.csv", "small_test.csv", "small"),
        ("small-Train.csv", "small-Test.csv", "small"),
        ("TRAIN.CSV", "TEST.CSV", "birds"),
    ):
        for file, split in ((train, "train"), (test, "test")):
            rows = [row.rpartition(",")[0] for row in ROWS if row.endswith(split)]
            write(rows, "path,label\n", file)
        task = csv_task(folder / train)
        assert task.name == name and task.fingerprint() == one.fingerprint()


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_validation_images(write: Callable[..., Path], folder: Path, word: str) -> None:
    without = csv_task(write())
    assert without.val is None
    rows = [*ROWS, f"images/e.png,crow,{word}", f"images/f.png,crow,{word}"]
    task = csv_task(write(rows))
    assert task.val is not None and list(task.val.targets) == [1, 1]
    assert task.val.name(0) == str(folder / "images" / "e.png")
    assert task.test.fingerprint() == without.test.fingerprint()
    assert task.fingerprint() != without.fingerprint()
    assert csv_task(write(rows), test_only=True).val is None
    assert has_validation(str(write(rows))) and not has_validation(str(write(name="none.csv")))
    # The same from three files.
    for split in ("train", "test", word):
        of = [row.rpartition(",")[0] for row in rows if row.endswith(f",{split}")]
        write(of, "path,label\n", f"small_{split}.csv")
    assert csv_task(folder / "small_train.csv").fingerprint() == task.fingerprint()
    # Where none are for tests, they are.
    rows = [*rows, f"images/g.png,blue jay,{word}"]
    (folder / "small_test.csv").unlink()
    write([*of, "images/g.png,blue jay"], "path,label\n", f"small_{word}.csv")
    for path in (folder / "small_train.csv", write([row for row in rows if "test" not in row])):
        tested = csv_task(path)
        assert tested.val is None and list(tested.test.targets) == [1, 1, 0]
        assert not has_validation(str(path))


def test_validation_images_that_cannot_be(write: Callable[..., Path], folder: Path) -> None:
    path = write([*ROWS, "images/e.png,owl,val"])
    refused(path, "line 6: label owl of a validation image", "correct the label")
    refused(write([*ROWS, "images/a.png,crow,val"]), "images/a.png is listed already")
    refused(write([*ROWS, "images/e.png,crow,vla"]), 'split "vla"', "val", "train, test or val")
    for split in ("train", "test"):
        rows = [row.rpartition(",")[0] for row in ROWS if row.endswith(split)]
        write(rows, "path,label\n", f"two_{split}.csv")
    (folder / "two_val.csv").write_text("path,label\n")
    refused(folder / "two_train.csv", "two_val.csv: has a header and no rows")
    (folder / "images" / "e.png").write_bytes(b"")
    task = csv_task(write([*ROWS, "images/e.png,crow,val"]), skip_bad_images=True)
    assert task.val is None and len(task.skipped) == 1


def test_absolute_paths(write: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    rows = [row.replace("images", str(folder / "images")) for row in ROWS]
    path = write(rows)
    moved = shutil.move(path, tmp_path / "small.csv")
    assert csv_task(moved).test.load(0).tobytes() == picture(2).tobytes()


def test_prompts_beside_the_file(write: Callable[..., Path], folder: Path) -> None:
    path = write()
    (folder / "prompts.txt").write_text("a bird, {}.\n")
    assert csv_task(path).templates == ("a bird, {}.",)
    assert csv_task(path, templates=["{}"]).templates == ("{}",)


def test_words_of_a_sequence(write: Callable[..., Path], folder: Path) -> None:
    one, two = write(), write(name="more.CSV")
    assert [task.name for task in load_sequence([str(one), str(two)])] == ["small", "more"]
    with pytest.raises(InputError, match='"small"'):
        load_sequence([str(one), str(write(name="small.CSV"))])
    with pytest.raises(InputError, match="gone.csv"):
        load_sequence(["gone.csv"])


def test_the_fingerprint_is_the_same_elsewhere(
    write: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    path = write()
    shutil.copytree(folder, tmp_path / "copy")
    copied = csv_task(tmp_path / "copy" / path.name)
    assert copied.fingerprint() == csv_task(path).fingerprint()
    other = [*ROWS[:2], *(row.replace("crow", "x") for row in ROWS[2:])]
    other = [row.replace("x", "blue jay") if "c.png" in row else row for row in other]
    other += ["images/e.png,crow,test"]
    assert csv_task(write(other)).fingerprint() != copied.fingerprint()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("file,label,split\n", ["line 1", "no column path", "found: file, label, split"]),
        ("path,class,split\n", ["line 1", "no column label", "found: path, class, split"]),
        ("path;label;split\n", ["no column path", "found: path;label;split", "commas"]),
        ("", ["line 1", "no column path", "begin the file with a line such as path,label,split"]),
        ("path,label,label,split\n", ["line 1", '"label" occurs twice']),
        ("path,label,split,note\n", ["line 2", "got 3 cells, wanted 4", "quotes"]),
        (
            "path,label,group\n",
            ["no column split", "small_train.csv and small_test.csv", "--test-fraction 0.2"],
        ),
    ],
)
def test_bad_headers(write: Callable[..., Path], header: str, words: list[str]) -> None:
    refused(write(header=header), *words)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("images/e.png,,train", ["line 6", "the label is empty"]),
        ("images/e.png,  ,train", ["line 6", "the label is empty"]),
        (",crow,train", ["line 6", "the path is empty"]),
        ("images/e.png,crow,", ["line 6", 'got the split "", wanted train, test or val']),
        ("images/e.png,crow,tset", ["line 6", 'split "tset" (did you mean "test"?)']),
        ("images/e.png,crow,eval", ["line 6", 'split "eval"', "remove the row"]),
        ("images/e.png,crow", ["line 6", "got 2 cells, wanted 3"]),
        ("images/x.png,crow,train", ["line 6", "no file", "x.png", "relative"]),
        ("images,crow,train", ["line 6", "no file"]),
        ("images/" + "x" * 300 + ",crow,train", ["line 6", "no file"]),
        ("images/a.png,crow,train", ["line 6", "images/a.png is listed already", "line 2"]),
        (
            "./images//a.png,crow,test",
            ["line 6", "line 2", "one split", "multi-label"],
        ),
        ("images/e.png,owl,train", ["same labels", "only in train: owl"]),
        ("images/e.png,owl,test", ["same labels", "only in test: owl"]),
        ('images/e.png,"crow,train', ["line 6", "not comma-separated"]),
    ],
)
def test_bad_rows(write: Callable[..., Path], row: str, words: list[str]) -> None:
    refused(write([*ROWS, row]), *words)


def test_bad_files(write: Callable[..., Path], folder: Path) -> None:
    refused(folder / "gone.csv", "no such file", "path, label and split")
    refused(write([], ""), "is empty")
    refused(write([]), "a header and no rows")
    refused(write([*ROWS, "images/e.png,köhler,train"], encoding="latin-1"), "UTF-8")
    refused(write(encoding="utf-16"), "UTF-8")
    refused(write([row.replace("blue jay", "crow") for row in ROWS]), "only one label, crow")
    refused(write([row for row in ROWS if "test" not in row]), "only in train: blue jay, crow")
    (folder / "d.csv").mkdir()
    refused(folder / "d.csv", "is a folder")


def test_bad_pairs(write: Callable[..., Path]) -> None:
    rows = [row.rpartition(",")[0] for row in ROWS]
    train = write(rows, "path,label\n", "small_train.csv")
    refused(train, "no column split", "no small_test.csv beside it", "pass --test-fraction 0.2")
    write(name="small_test.csv")
    refused(train, "small_test.csv: has a column split, and small_train.csv has none")
    write(rows, "path,label\n", "small_test.csv")
    refused(train, "small_test.csv, line 2", "listed already", "small_train.csv, line 2")


def test_unreadable_images(write: Callable[..., Path], folder: Path) -> None:
    path = write([*ROWS, "images/e.png,crow,train"])
    bad = folder / "images" / "e.png"
    bad.write_bytes(b"x")
    with pytest.raises(BadImage, match=r"e\.png"):
        csv_task(path)
    (task,) = load_sequence([str(path)], skip_bad_images=True)
    assert task.skipped == (str(bad),) and task.train.targets == (1, 0)
    (folder / "images" / "c.png").write_bytes(b"x")
    refused(path, "every test image of crow is unreadable", skip_bad_images=True)


WHOLE = [f"images/{name}.png,{'crow' if name < 'e' else 'blue jay'}" for name in "abcdefgh"]


def test_a_part_of_each_label_is_held_out(
    write: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    path = write(WHOLE, "path,label\n")
    task = csv_task(path, test_fraction=0.25)
    assert (task.name, task.classes, task.test_fraction) == ("small", ("blue jay", "crow"), 0.25)
    assert sorted(task.train.targets) == [0] * 3 + [1] * 3 and sorted(task.test.targets) == [0, 1]
    names = [images.name(i) for images in (task.train, task.test) for i in range(len(images))]
    assert sorted(names) == [str(folder / "images" / f"{name}.png") for name in "abcdefgh"]
    # However paths are written, in whatever order, and wherever the folder lies.
    other = [row.replace("images/", f"{folder}/./images//") for row in reversed(WHOLE)]
    same = csv_task(write(other, "path,label\n", "other.csv"), test_fraction=0.25)
    assert {same.test.name(i) for i in range(2)} == {task.test.name(i) for i in range(2)}
    shutil.copytree(folder, tmp_path / "copy")
    copied = csv_task(tmp_path / "copy" / path.name, test_fraction=0.25)
    assert copied.fingerprint() == task.fingerprint()


def test_names_of_files_without_a_split(write: Callable[..., Path]) -> None:
    for file, name in (("small_train.csv", "small"), ("Train.csv", "birds")):
        task = csv_task(write(WHOLE, "path,label\n", file), test_fraction=0.25)
        assert task.name == name and task.test_fraction == 0.25


def test_a_share_changes_nothing_where_files_say_the_split(
    write: Callable[..., Path], folder: Path
) -> None:
    one = csv_task(write(), test_fraction=0.5)
    for split in ("train", "test"):
        rows = [row.rpartition(",")[0] for row in ROWS if row.endswith(split)]
        write(rows, "path,label\n", f"small_{split}.csv")
    two = csv_task(folder / "small_train.csv", test_fraction=0.5)
    assert one.test_fraction is two.test_fraction is None
    assert one.fingerprint() == two.fingerprint() == csv_task(write()).fingerprint()
    # An empty cell is a mistake, and no file without splits.
    refused(write([*ROWS, "images/e.png,crow,"]), 'got the split ""', test_fraction=0.5)


def test_rows_that_cannot_be_divided(write: Callable[..., Path], folder: Path) -> None:
    header = "path,label\n"
    refused(write([], header), "a header and no rows", test_fraction=0.2)
    refused(write([*WHOLE, "images/a.png,crow"], header), "listed already", test_fraction=0.2)
    refused(write(WHOLE[:5], header), "class blue jay has one image, images/e.png",
            test_fraction=0.2)  # fmt: skip
    refused(write(WHOLE[:4], header), "only one label, crow", test_fraction=0.2)
    path = write(WHOLE, header)
    for name in "bcd":
        (folder / "images" / f"{name}.png").write_bytes(b"x")
    refused(path, " image of crow is unreadable", test_fraction=0.2, skip_bad_images=True)


def test_what_is_only_tested_needs_no_rows_to_train_on(write: Callable[..., Path]) -> None:
    task = csv_task(write(ROWS[2:]), test_only=True)
    assert task.classes == ("blue jay", "crow") and (len(task.train), len(task.test)) == (0, 2)
    task = csv_task(write(ROWS[2:3]), test_only=True)
    assert task.classes == ("crow",) and task.test_only
    task = csv_task(write(ROWS[:3]), test_only=True)
    assert task.classes == ("blue jay", "crow") and task.test.targets == (1,)
    for rows in (ROWS[2:], ROWS[:3]):
        refused(write(rows), "the same labels")
    with pytest.raises(InputError, match="only in test: blue jay, crow"):
        csv_task(write(["images/e.png,owl,train", *ROWS[2:]]), test_only=True)


def test_other_columns_and_separators(write: Callable[..., Path], folder: Path) -> None:
    """As open_clip's training script has them, and its options."""
    clean = csv_task(write()).fingerprint()
    rows = [row.replace(",", "\t") for row in ROWS]
    path = write(rows, header="filepath\ttitle\tsplit\n", name="small.tsv")
    form = CsvForm("filepath", "title", "\t")
    assert csv_task(path, form=form).fingerprint() == clean
    (task,) = load_sequence([str(path)], form=form)
    assert task.fingerprint() == clean
    (captions,) = load_sequence([f"captions:{path}"], form=form)
    assert captions.test.texts() == ("crow", "blue jay")  # type: ignore[attr-defined]
    refused(path, "no column path", "separated by commas")
    refused(
        path, "no column label", r"filepath\tlabel", "tabs", form=CsvForm("filepath", None, "\t")
    )
