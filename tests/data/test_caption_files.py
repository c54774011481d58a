"""Tasks of images with captions: what is read, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mulki.data import BadImage, caption_task, load_sequence
from mulki.data.caption_task import CaptionTask
from mulki.errors import InputError
from tests.data.data_helpers import encoded, picture, write_tar

ROWS = [
    ("0.png", "a red flag", "train"),
    ("1.png", "a cat, sitting", "train"),
    ("0.png", "a flag", "train"),
    ("2.png", "a dog", "train"),
    ("3.png", "a cow", "test"),
    ("4.png", "a hen", "test"),
    ("3.png", "a brown cow", "test"),
    ("5.png", "a hen", "test"),
]


def write_csv(path: Path, rows: list[tuple[str, str, str]], split: bool = True) -> Path:
    lines = ["caption,path,split,more" if split else "caption,path"]
    lines += [f'"{c}",{p},{s},x' if split else f'"{c}",{p}' for p, c, s in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures with captions."""
    root = tmp_path / "pets"
    root.mkdir()
    for i in range(6):
        picture(i).save(root / f"{i}.png")
    write_csv(root / "captions.csv", ROWS)
    return root


def content(task: CaptionTask) -> list[object]:
    return [
        (Path(split.name(i)).name, split.captions[i])
        for split in (task.train, task.test)
        for i in range(len(split))
    ]


CONTENT = [
    ("0.png", ("a red flag",)),
    ("0.png", ("a flag",)),
    ("1.png", ("a cat, sitting",)),
    ("2.png", ("a dog",)),
    ("3.png", ("a cow", "a brown cow")),
    ("4.png", ("a hen",)),
    ("5.png", ("a hen",)),
]


def test_pairs_to_learn_and_images_to_test(folder: Path) -> None:
    task = caption_task(folder)
    assert task.name == "pets" and content(task) == CONTENT
    assert task.train.load(3).tobytes() == picture(2).tobytes()
    moved = caption_task(folder.rename(folder.with_name("moved")))
    assert moved.fingerprint() == task.fingerprint()


def test_one_file_or_one_for_each_split(folder: Path) -> None:
    whole = caption_task((folder / "captions.csv").rename(folder / "zoo.csv"))
    assert whole.name == "zoo" and content(whole) == CONTENT
    for split in ("train", "test"):
        rows = [row for row in ROWS if row[2] == split]
        write_csv(folder / f"zoo_{split}.csv", rows, split=False)
    pair = caption_task(folder / "zoo_train.csv")
    assert pair.name == "zoo" and content(pair) == CONTENT


def test_a_word_of_a_sequence(folder: Path) -> None:
    (task,) = load_sequence([f"captions:{folder}"])
    assert isinstance(task, CaptionTask) and content(task) == CONTENT
    with pytest.raises(InputError, match='"pets"'):
        load_sequence([f"captions:{folder}", f"captions:{folder}/../pets"])


def test_test_images_alone(folder: Path, tmp_path: Path) -> None:
    whole = caption_task(folder)
    write_csv(folder / "captions.csv", [row for row in ROWS if row[2] == "test"])
    for i in range(3):
        (folder / f"{i}.png").unlink()
    with pytest.raises(InputError, match="its train split is empty"):
        caption_task(folder)
    (task,) = load_sequence([f"captions:{folder}"], test_only=True)
    assert isinstance(task, CaptionTask) and len(task.train) == 0 and task.test_only
    assert task.test.fingerprint() == whole.test.fingerprint()
    shards = tmp_path / "shards"
    (shards / "test").mkdir(parents=True)
    files = {}
    for n in range(2):
        files |= {f"{n}.png": encoded(picture(n), "png"), f"{n}.txt": f"number {n}".encode()}
    write_tar(shards / "test" / "0.tar", files)
    with pytest.raises(InputError, match="nor tar shards in train/"):
        caption_task(shards)
    task = caption_task(shards, test_only=True)
    assert len(task.train) == 0 and [*task.test.captions] == [("number 0",), ("number 1",)]


def test_shards_of_each_split(tmp_path: Path) -> None:
    root = tmp_path / "cc"
    for split, numbers in (("train", (0, 1, 2, 3)), ("test", (4, 5))):
        (root / split).mkdir(parents=True)
        for shard in (0, 1):
            files = {}
            for n in numbers[shard::2]:
                files[f"{n}.webp"] = encoded(picture(n), "webp")
                files[f"{n}.txt"] = f"picture {n}\n".encode()
            write_tar(root / split / f"{shard}.tar", files)
    task = caption_task(root)
    assert task.name == "cc"
    assert [c for (c,) in task.train.captions] == [f"picture {n}" for n in (0, 2, 1, 3)]
    assert [c for (c,) in task.test.captions] == ["picture 4", "picture 5"]
    assert task.train.name(1) == f"{root}/train/0.tar:2.webp"
    shard = root / "train" / "1.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700])
    with pytest.raises(InputError, match=r"^\S+train/1\.tar: damaged"):
        caption_task(root)
    write_tar(shard, {"7.webp": encoded(picture(7), "webp"), "7.txt": b" \n"})
    with pytest.raises(InputError, match=r"1\.tar: .*7\.txt"):
        caption_task(root)
    shutil.copy(root / "train" / "0.tar", root / "test" / "9.tar")
    write_tar(shard, {"7.webp": encoded(picture(7), "webp"), "7.txt": b"seven"})
    with pytest.raises(InputError, match=r"test/9\.tar: .*train/0\.tar"):
        caption_task(root)
    shutil.rmtree(root / "test")
    with pytest.raises(InputError, match=r"captions\.csv .*test/"):
        caption_task(root)


def test_images_of_shards_with_the_same_bytes_are_one(tmp_path: Path) -> None:
    root = tmp_path / "cc"
    of_train = [(0, "zero"), (1, "one"), (0, "naught"), (2, "two"), (0, "zero")]
    of_test = [(3, "three"), (4, "four"), (3, "3"), (3, "Three"), (4, "four")]
    for split, pairs in (("train", of_train), ("test", of_test)):
        (root / split).mkdir(parents=True)
        for shard in (0, 1):
            files = {}
            for n, (number, text) in list(enumerate(pairs))[shard * 3 : shard * 3 + 3]:
                files[f"{n}.png"] = encoded(picture(number), "png")
                files[f"{n}.txt"] = text.encode()
            write_tar(root / split / f"{shard}.tar", files)
    task = caption_task(root)
    assert [c for (c,) in task.train.captions] == ["zero", "naught", "one", "two"]
    assert [task.train.name(i)[-11:] for i in range(4)] == [
        "0.tar:0.png", "0.tar:0.png", "0.tar:1.png", "1.tar:3.png"
    ]  # fmt: skip
    assert task.train.captions_of(task.train.name(0)) == {"zero", "naught"}
    # Each image is tested once, with the captions of all its copies.
    assert task.test.captions == (("three", "3", "Three"), ("four",))
    assert task.test.texts() == ("three", "3", "four")
    assert task.test.load(1).tobytes() == picture(4).tobytes()


def changed(change: Callable[[list[tuple[str, str, str]]], object]) -> Callable[[Path], object]:
    def go(folder: Path) -> None:
        rows = list(ROWS)
        change(rows)
        write_csv(folder / "captions.csv", rows)

    return go


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (
        changed(lambda rows: rows.append(("2.png", " ", "train"))),
        r"captions\.csv, line 10: the caption is empty",
    ),
    "column": (
        lambda folder: (folder / "captions.csv").write_text("path,label\n0.png,x\n"),
        r"captions\.csv, line 1: no column caption \(found: path, label\)",
    ),
    "no split": (
        lambda folder: write_csv(folder / "captions.csv", ROWS, split=False),
        r"captions\.csv: has no column split",
    ),
    "split": (
        changed(lambda rows: rows.append(("2.png", "x", "val"))),
        r'line 10: got the split "val", wanted train or test',
    ),
    "no image": (
        changed(lambda rows: rows.append(("9.png", "nine", "train"))),
        r"line 10: no file \S+9\.png; correct the path",
    ),
    "no caption": (
        lambda folder: (picture(9).save(folder / "9.png"), picture(8).save(folder / "8.png")),
        r"no row for 8\.png and 1 more images; add a row",
    ),
    "twice": (
        changed(lambda rows: rows.append(("2.png", "a dog", "train"))),
        r"line 10: 2\.png is listed with this caption already \(\S+ line 5\)",
    ),
    "both splits": (
        changed(lambda rows: rows.append(("2.png", "a dog", "test"))),
        r"line 10: 2\.png is in the train split already \(\S+ line 5\)",
    ),
    "both splits, written otherwise": (
        lambda folder: write_csv(
            folder / "captions.csv", [*ROWS, (str(folder / "2.png"), "a dog", "test")]
        ),
        r"line 10: 2\.png is in the train split already",
    ),
    "one image": (
        changed(
            lambda rows: rows.__setitem__(
                slice(None),
                [
                    *(("0.png", text, "train") for text in ("one", "two")),
                    *((f"{i}.png", str(i), "test") for i in range(1, 6)),
                ],
            )
        ),
        "its train split has one image",
    ),
    "one split": (changed(lambda rows: rows.__delitem__(slice(0, 4))), "no row for 0.png and 2"),
    "unreadable": (lambda folder: (folder / "1.png").write_text("no"), r"1\.png: .*--skip-bad"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(folder: Path, case: str) -> None:
    spoil, said = BAD[case]
    spoil(folder)
    with pytest.raises(InputError, match=said) as info:
        caption_task(folder)
    assert "\n" not in str(info.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: "):
        caption_task(tmp_path / "none")
    with pytest.raises(InputError, match="^captions: "):
        load_sequence(["captions:"])
    with pytest.raises(InputError, match="train/"):
        caption_task(tmp_path)


def test_unreadable_images_are_left_out_with_their_captions(folder: Path) -> None:
    for name in ("0.png", "4.png"):
        (folder / name).write_text("no image")
    with pytest.raises(BadImage, match="1 more like it"):
        caption_task(folder)
    task = caption_task(folder, skip_bad_images=True)
    assert task.skipped == (str(folder / "0.png"), str(folder / "4.png"))
    assert content(task) == [CONTENT[place] for place in (2, 3, 4, 6)]


def test_a_part_of_the_images_is_held_out_with_all_their_captions(folder: Path) -> None:
    write_csv(folder / "captions.csv", ROWS, split=False)
    task = caption_task(folder, test_fraction=0.4)
    assert task.name == "pets" and task.test_fraction == 0.4 and len(task.test) == 2
    train, test = ({split.name(i) for i in range(len(split))} for split in (task.train, task.test))
    assert train | test == {str(folder / f"{i}.png") for i in range(6)} and not train & test
    pairs = {
        (split.name(i), text)
        for split in (task.train, task.test)
        for i in range(len(split))
        for text in split.captions[i]
    }
    assert pairs == {(str(folder / path), text) for path, text, _ in ROWS}
    # In another order, and as a file of its own.
    write_csv(folder / "zoo.csv", ROWS[::-1], split=False)
    zoo = caption_task(folder / "zoo.csv", test_fraction=0.4)
    assert zoo.name == "zoo" and {zoo.test.name(i) for i in range(2)} == test


def test_a_share_changes_nothing_where_rows_say_the_split(folder: Path) -> None:
    task = caption_task(folder, test_fraction=0.4)
    assert task.test_fraction is None and content(task) == CONTENT


def test_images_that_cannot_be_divided(folder: Path) -> None:
    write_csv(folder / "zoo.csv", ROWS[:3:2], split=False)
    with pytest.raises(InputError, match=r"zoo\.csv: .*0\.png"):
        caption_task(folder / "zoo.csv", test_fraction=0.4)
    write_csv(folder / "zoo.csv", ROWS[:2], split=False)
    with pytest.raises(InputError, match="its train split has one image"):
        caption_task(folder / "zoo.csv", test_fraction=0.4)


def test_an_image_of_both_splits_of_shards_is_refused(tmp_path: Path) -> None:
    for split, numbers in (("train", (0, 1, 2)), ("test", (3, 1))):
        (tmp_path / split).mkdir()
        files = {f"{n}.png": encoded(picture(n), "png") for n in numbers}
        files |= {f"{n}.txt": f"{n} in {split}".encode() for n in numbers}
        write_tar(tmp_path / split / f"{split}.tar", files)
    with pytest.raises(InputError, match=r"test\.tar:1\.png .*train\.tar:1"):
        caption_task(tmp_path)


def test_shards_without_a_split_are_divided_image_by_image(tmp_path: Path) -> None:
    root = tmp_path / "cc"
    root.mkdir()
    # Each of six pictures comes twice, with two captions.
    for shard in (0, 1):
        files = {}
        for n in range(6):
            files[f"{n}.png"] = encoded(picture(n), "png")
            files[f"{n}.txt"] = f"{n}, said {'once' if shard else 'again'}".encode()
        write_tar(root / f"{shard}.tar", files)
    with pytest.raises(InputError, match="train/"):
        caption_task(root)
    task = caption_task(root, test_fraction=0.4)
    assert task.test_fraction == 0.4 and (len(task.train), len(task.test)) == (8, 2)
    train, test = (
        {text[0] for each in split.captions for text in each} for split in (task.train, task.test)
    )
    assert train | test == set("012345") and not train & test
    assert all(len(each) == 2 for each in task.test.captions)
    assert task.test.load(1).tobytes() == picture(int(task.test.captions[1][0][0])).tobytes()
