"""Tasks from folders of Hugging Face's `datasets`: what is read, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mulki.data import BadImage, huggingface_task, load_sequence
from mulki.data.decoding import limit_pixels, pixel_limit
from mulki.data.huggingface_tasks import ArrowImages, holds_dataset
from mulki.data.loader import batches
from mulki.data.sequences import has_validation
from mulki.data.subset import few_shot
from mulki.errors import InputError
from tests.data.data_helpers import encoded, picture

datasets = pytest.importorskip("datasets")

NAMES = ["tabby_cat", "dog"]
LABELS = {"train": [1, 0, 1, 0, 1], "test": [0, 1]}
Columns = dict[str, list[Any]]


def png(seed: int) -> dict[str, Any]:
    return {"bytes": encoded(picture(seed), "png"), "path": None}


def columns(split: str) -> Columns:
    """The images of the two splits differ; there is a column of no use."""
    first = 10 * sorted(LABELS).index(split)
    labels = LABELS[split]
    images = [png(first + place) for place in range(len(labels))]
    return {"text": ["x"] * len(labels), "image": images, "label": list(labels)}


def kinds(**others: Any) -> dict[str, Any]:
    usual = {
        "text": datasets.Value("string"),
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
    }
    return {name: kind for name, kind in (usual | others).items() if kind is not None}


def table(content: Columns, **others: Any) -> Any:
    features = kinds(**others)
    rows = {name: content[name] for name in features}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def write(root: Path, **splits: Any) -> Path:
    datasets.DatasetDict(splits).save_to_disk(root)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five training images and two test images, `pets`."""
    return write(tmp_path / "pets", **{split: table(columns(split)) for split in LABELS})


def test_a_folder_is_a_task(folder: Path) -> None:
    task = huggingface_task(folder)
    assert (task.name, task.classes) == ("pets", ("tabby cat", "dog"))
    assert task.templates == ("a photo of a {}.",) and task.skipped == ()
    assert task.train.targets == (1, 0, 1, 0, 1) and task.test.targets == (0, 1)
    assert task.train.name(3) == f"{folder}/train[3]"
    first = 10 * sorted(LABELS).index("train")
    assert task.train.load(3).tobytes() == picture(first + 3).tobytes()
    (folder / "prompts.txt").write_text("a drawing of a {}.\n")
    assert huggingface_task(folder).templates == ("a drawing of a {}.",)
    assert huggingface_task(folder, templates=["{}"]).templates == ("{}",)


def test_it_mixes_with_other_tasks(folder: Path, make_folder: Callable[..., Path]) -> None:
    both = load_sequence([str(folder), str(make_folder())])
    assert [task.name for task in both] == ["pets", "birds"]
    assert both[0].fingerprint() == huggingface_task(folder).fingerprint()
    assert holds_dataset(folder) and not holds_dataset(make_folder("fish"))


def test_images_stay_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(columns("train"))
    many = datasets.concatenate_datasets([rows] * 400)
    datasets.DatasetDict(train=many, test=table(columns("test"))).save_to_disk(
        folder.parent / "many", num_shards={"train": 3, "test": 1}
    )

    def decode(*_: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("mulki.data.image_files.verify", lambda source, name: None)
    monkeypatch.setattr("mulki.data.image_files.decode", decode)
    images = huggingface_task(folder.parent / "many").train
    monkeypatch.undo()
    assert isinstance(images, ArrowImages) and len(images) == 2000
    packed = pickle.dumps(images)
    assert len(packed) < sum(images.sizes) / 10
    again = pickle.loads(packed)
    assert again.load(1999).tobytes() == images.load(1999).tobytes() == images.load(4).tobytes()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image).astype(np.float32))


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_loaded_by_workers(folder: Path, workers: int) -> None:
    task = few_shot(huggingface_task(folder), shots=2, seed=0)
    loader = batches(task.train, pixels, 4, shuffle=False, seed=0, workers=workers)
    (batch,) = loader
    assert sorted(batch[1].tolist()) == [0, 0, 1, 1]
    assert np.array_equal(batch[0][0].numpy(), np.asarray(task.train.load(0)))


def test_the_fingerprint_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    one = huggingface_task(folder)
    other = write(tmp_path / "b" / "cats", **{s: table(columns(s)) for s in LABELS})
    assert huggingface_task(other).fingerprint() == one.fingerprint()
    changed = columns("test") | {"label": [1, 0]}
    write(tmp_path / "c", train=table(columns("train")), test=table(changed))
    assert huggingface_task(tmp_path / "c").fingerprint() != one.fingerprint()


def test_validation_stands_in_for_test(tmp_path: Path) -> None:
    parts = {name: table(columns("test")) for name in ("validation", "extra")}
    root = write(tmp_path / "pets", train=table(columns("train")), **parts)
    task = huggingface_task(root)
    assert task.test.name(0) == f"{root}/validation[0]"
    write(tmp_path / "all", train=table(columns("train")), test=parts["extra"], **parts)
    assert huggingface_task(tmp_path / "all").test.name(0) == f"{tmp_path}/all/test[0]"


def test_validation_images_beside_the_others(folder: Path, tmp_path: Path) -> None:
    both = {split: table(columns(split)) for split in LABELS}
    content = {"text": ["x"], "image": [png(30)], "label": [1]}
    root = write(tmp_path / "a" / "pets", **both, validation=table(content))
    without, task = huggingface_task(folder), huggingface_task(root)
    assert without.val is None and task.val is not None
    assert list(task.val.targets) == [1] and task.val.name(0) == f"{root}/validation[0]"
    assert task.test.fingerprint() == without.test.fingerprint()
    assert task.fingerprint() != without.fingerprint()
    assert huggingface_task(root, test_only=True).val is None
    assert has_validation(str(root)) and not has_validation(str(folder))
    content["image"] = [{"bytes": b"x", "path": None}]
    root = write(tmp_path / "b" / "pets", **both, valid=table(content))
    with pytest.raises(BadImage, match=r"valid\[0\]"):
        huggingface_task(root)
    assert huggingface_task(root, skip_bad_images=True).val is None


def test_validation_images_that_cannot_be(tmp_path: Path) -> None:
    both = {split: table(columns(split)) for split in LABELS}
    owls = table(columns("test"), label=datasets.ClassLabel(names=["owl", "dog"]))
    root = write(tmp_path / "owls", **both, val=owls)
    with pytest.raises(InputError, match=r"train and val have different classes.*only in val: owl"):
        huggingface_task(root)
    none = table({"text": [], "image": [], "label": []})
    root = write(tmp_path / "none", **both, val=none)
    with pytest.raises(InputError, match=r"none/val: the split has no rows; .*save"):
        huggingface_task(root)


def test_test_images_alone(tmp_path: Path) -> None:
    for name in ("test", "validation"):
        root = write(tmp_path / name, **{name: table(columns("test"))})
        with pytest.raises(InputError, match="wanted the splits train and test"):
            load_sequence([str(root)])
        (task,) = load_sequence([str(root)], test_only=True)
        assert len(task.train) == 0 and list(task.test.targets) == LABELS["test"]
        assert task.test_only and task.test.name(0) == f"{root}/{name}[0]"


def test_of_several_columns_those_with_the_usual_names(tmp_path: Path) -> None:
    def save(name: str, **renamed: str) -> Path:
        both = {}
        for split in LABELS:
            content = columns(split)
            content["mask"], content["coarse"] = content["image"], [0] * len(LABELS[split])
            coarse = datasets.ClassLabel(names=["animal", "plant"])
            rows = table(content, mask=datasets.Image(), coarse=coarse)
            both[split] = rows.rename_columns(renamed)
        return write(tmp_path / name, **both)

    plain = huggingface_task(save("plain"))
    cifar = huggingface_task(save("cifar", image="img", label="fine_label"))
    assert plain.classes == cifar.classes == ("tabby cat", "dog")
    assert plain.fingerprint() == cifar.fingerprint()
    odd = save("odd", image="photo", label="kind")
    with pytest.raises(InputError, match=r"\(photo, mask\)"):
        huggingface_task(odd)
    with pytest.raises(InputError, match=r"\(kind, coarse\).*label=NAME"):
        huggingface_task(odd, image="photo")
    assert huggingface_task(odd, image="mask", label="kind").fingerprint() == plain.fingerprint()
    with pytest.raises(InputError, match="text .*ClassLabel"):
        huggingface_task(odd, image="mask", label="text")


def test_images_may_be_paths_of_files(folder: Path, tmp_path: Path) -> None:
    embedded = huggingface_task(folder)
    for split in LABELS:
        for place, cell in enumerate(columns(split)["image"]):
            (tmp_path / f"{split}-{place}.png").write_bytes(cell["bytes"])

    def to_path(old: object, split: str, row: int) -> dict[str, Any]:
        return {"bytes": None, "path": str(tmp_path / f"{split}-{row}.png")}

    rewrite(folder, to_path)
    task = huggingface_task(folder)
    assert task.train.load(2).tobytes() == embedded.train.load(2).tobytes()
    assert task.train.sizes == embedded.train.sizes  # type: ignore[attr-defined]
    os.remove(tmp_path / "train-2.png")
    os.mkfifo(tmp_path / "train-2.png")
    with pytest.raises(BadImage, match=r"train\[2\]: "):
        huggingface_task(folder)
    for gone in ("https://example.org/cat.png", "x\0y", str(tmp_path)):
        cell = {"bytes": None, "path": gone}
        rewrite(folder, lambda old, split, row, cell=cell: cell)  # type: ignore[misc]
        with pytest.raises(BadImage, match=r"train\[0\]: "):
            huggingface_task(folder)


def rewrite(folder: Path, change: Callable[..., Any]) -> None:
    """Write cells of the column `image` into the Arrow files, as `datasets` itself may not."""
    import pyarrow

    for split in LABELS:
        (file,) = (folder / split).glob("*.arrow")
        with pyarrow.memory_map(str(file)) as mapped:
            whole = pyarrow.ipc.open_stream(mapped).read_all()
        cells = [change(c, split, i) for i, c in enumerate(whole.column("image").to_pylist())]
        kind = whole.schema.field("image")
        changed = whole.set_column(
            whole.schema.get_field_index("image"), kind, pyarrow.array(cells, kind.type)
        )
        changed = changed.replace_schema_metadata(whole.schema.metadata)
        # A file that is mapped is not written over.
        file.unlink()
        with (
            pyarrow.OSFile(str(file), "wb") as out,
            pyarrow.ipc.new_stream(out, changed.schema) as to,
        ):
            to.write_table(changed)


@pytest.mark.parametrize(
    "cell", [None, {"bytes": None, "path": None}, {"bytes": b"x", "path": None}]
)
def test_unreadable_images(folder: Path, cell: Any) -> None:
    rewrite(folder, lambda old, split, row: cell if (split, row) == ("train", 2) else old)
    with pytest.raises(BadImage, match=r"train\[2\]: "):
        huggingface_task(folder)
    (task,) = load_sequence([str(folder)], skip_bad_images=True)
    assert task.skipped == (f"{folder}/train[2]",)
    assert task.train.targets == (1, 0, 0, 1) and task.train.name(2) == f"{folder}/train[3]"
    both = ((0, "train"), (2, "train"), (4, "train"))
    rewrite(folder, lambda old, split, row: None if (row, split) in both else old)
    with pytest.raises(InputError, match="class dog"):
        huggingface_task(folder, skip_bad_images=True)


def test_images_are_decoded_by_our_rules(folder: Path) -> None:
    before = pixel_limit()
    limit_pixels(100)
    try:
        with pytest.raises(BadImage, match="16 x 16 .*--max-pixels"):
            huggingface_task(folder)
    finally:
        limit_pixels(before)
    eps = encoded(Image.new("RGB", (8, 8)), "eps")
    rewrite(folder, lambda old, split, row: {"bytes": eps, "path": None})
    with pytest.raises(BadImage, match=r"train\[0\]: "):
        huggingface_task(folder)


def listed(folder: Path, *splits: str) -> None:
    """Let the data set say that these are its splits."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))


def test_a_split_that_the_data_set_no_longer_has_is_not_read(folder: Path) -> None:
    listed(folder, "train")
    (folder / ".cache").mkdir()
    with pytest.raises(InputError, match=r"\(found: train\); .*--test-fraction"):
        huggingface_task(folder)
    task = huggingface_task(folder, test_fraction=0.4)
    names = {images.name(i) for images in (task.train, task.test) for i in range(len(images))}
    assert names == {f"{folder}/train[{row}]" for row in range(len(LABELS["train"]))}


def test_rows_that_change_places_are_other_images(folder: Path) -> None:
    before = huggingface_task(folder).fingerprint()
    cells = columns("train")["image"]
    turned = [cells[2], cells[1], cells[0], *cells[3:]]
    rewrite(folder, lambda old, split, row: turned[row] if split == "train" else old)
    assert huggingface_task(folder).fingerprint() != before


def relabel(labels: list[Any]) -> Callable[[Path], object]:
    def go(folder: Path) -> None:
        content = columns("test") | {"label": labels}
        write_again(folder, content)

    return go


def write_again(folder: Path, content: Columns | None = None, **others: Any) -> None:
    """The data set with another test split."""
    test = table(content or columns("test"), **others)
    write(folder, train=table(columns("train")), test=test)


def cut(folder: Path, keep: Callable[[bytes], bytes]) -> None:
    (file,) = (folder / "test").glob("*.arrow")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(keep(content))


def garbled(content: bytes) -> bytes:
    """With offsets of the texts that point outside the file."""
    place = content.index(b"\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00")
    return content[: place + 4] + b"\xff\xff\xff\x7f" + content[place + 8 :]


def state(folder: Path, **changes: Any) -> None:
    path = folder / "test" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown label": (
        relabel([0, -1]),
        r"test\[1\]: label -1, which stands for one that is not kn",
    ),
    "no label": (relabel([None, 1]), r"test\[0\]: no label; wanted an index from 0 to 1"),
    "texts": (
        lambda f: write_again(
            f, columns("test") | {"label": ["cat", "dog"]}, label=datasets.Value("string")
        ),
        r"no column of type ClassLabel \(found: text: string, image: Image, label: string\); make "
        r"one with dataset\.class_encode_column",
    ),
    "several labels": (
        lambda f: write_again(
            f,
            columns("test") | {"label": [[0, 1], [1]]},
            label=datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
        ),
        r"the column label holds several labels an image \(multi-label\)",
    ),
    "no image": (
        lambda f: write_again(f, image=None),
        r"no column of type Image \(found: .*cast_column\(NAME, datasets\.Image\(\)\)",
    ),
    "other classes": (
        lambda f: write_again(f, label=datasets.ClassLabel(names=["tabby_cat", "wolf"])),
        r"different classes \(only in train: dog; only in test: wolf\)",
    ),
    "another order": (
        lambda f: write_again(f, label=datasets.ClassLabel(names=NAMES[::-1])),
        "the same ones in another order",
    ),
    "one class": (
        lambda f: write(
            f,
            **{
                split: table(
                    columns(split) | {"label": [0] * len(LABELS[split])},
                    label=datasets.ClassLabel(names=["cat"]),
                )
                for split in LABELS
            },
        ),
        "at least two are needed",
    ),
    "unused class": (
        lambda f: write(
            f,
            **{
                split: table(columns(split), label=datasets.ClassLabel(names=[*NAMES, "owl"]))
                for split in LABELS
            },
        ),
        "train: no readable train image of class owl",
    ),
    "cut": (lambda f: cut(f, lambda c: c[: len(c) // 2]), r"arrow: cannot be read \(it is cut sh"),
    "cut at its end": (lambda f: cut(f, lambda c: c[:-8]), r"arrow: cannot be read \(it is cut sh"),
    "empty file": (lambda f: cut(f, lambda c: b""), r"arrow: cannot be read"),
    "damaged": (lambda f: cut(f, lambda c: b"x" * 64 + c[64:]), r"arrow: cannot be read"),
    "offsets": (lambda f: cut(f, garbled), r"arrow: cannot be read"),
    "no file": (lambda f: next((f / "test").glob("*.arrow")).unlink(), r"arrow: cannot be read"),
    "outside": (
        lambda f: state(f, _data_files=[{"filename": "../train/data-00000-of-00001.arrow"}]),
        r"state\.json: cannot be read \(.*outside",
    ),
    "no list": (lambda f: state(f, _data_files=3), r"state\.json: cannot be read"),
    "no state": (
        lambda f: (f / "test" / "state.json").unlink(),
        r"test/state\.json: cannot be read \(No such file",
    ),
    "no json": (
        lambda f: (f / "test" / "dataset_info.json").write_text("{"),
        r"test: cannot be read \(.*save the data set again",
    ),
    "one split": (
        lambda f: table(columns("train")).save_to_disk(f),
        r"pets: one split, wanted train and test",
    ),
    "no test": (
        lambda f: listed(f, "train", "unseen"),
        r"pets: wanted the splits train and test \(found: train, unseen\)",
    ),
    "no splits": (lambda f: listed(f), r"\(found: none\); rename"),
    "a split that is gone": (lambda f: shutil.rmtree(f / "test"), r"test/state\.json: cannot be r"),
    "a split outside": (
        lambda f: listed(f, "train", "../test"),
        r"dict\.json: cannot .*no list of",
    ),
    "two data sets": (
        lambda f: shutil.copy(f / "train" / "state.json", f),
        "dataset_dict.json and state.json, of two data sets .* save .* to a new folder",
    ),
    "no rows": (
        lambda f: state(f, _data_files=[]),
        r"test: the split has no rows; add some and save it again",
    ),
    "a format that is not here": (
        lambda f: state(f, _format_type="jax"),
        r"test: saved with the format jax, which cannot be loaded here .*reset_format\(\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path: Path, case: str) -> None:
    spoil, said = BAD[case]
    folder = tmp_path / "pets"
    if case not in ("one split", "one class", "unused class"):
        write_again(folder)
    spoil(folder)
    with pytest.raises(InputError, match=said) as info:
        load_sequence([str(folder)])
    assert "\n" not in str(info.value) and str(info.value).startswith((str(folder), 'task "pets"'))


def test_a_pipe_is_not_opened(folder: Path) -> None:
    for name in ("dataset_info.json", "state.json"):
        path = folder / "test" / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(InputError, match=name):
            huggingface_task(folder)
        path.unlink()
        path.write_bytes(content)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match=r"no dataset_dict\.json"):
            huggingface_task(folder)


def test_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"mulki\[datasets\]"):
        load_sequence([str(folder)])


def test_a_part_of_one_split_is_held_out(tmp_path: Path) -> None:
    rows = table({name: cells * 2 for name, cells in columns("train").items()})
    rows.save_to_disk(tmp_path / "pets")
    write(tmp_path / "dict" / "pets", train=rows)
    (task,) = load_sequence([str(tmp_path / "pets")], test_fraction=0.3)
    assert (task.name, task.test_fraction) == ("pets", 0.3)
    # Of four cats and six dogs.
    assert (
        sorted(task.test.targets) == [0, 1, 1] and sorted(task.train.targets) == [0] * 3 + [1] * 4
    )
    names = [images.name(i) for images in (task.train, task.test) for i in range(len(images))]
    assert sorted(names) == [f"{tmp_path}/pets[{row}]" for row in range(10)]
    place = int(task.test.name(2).partition("[")[2][:-1])
    assert task.test.load(2).tobytes() == rows[place]["image"].tobytes()
    same = huggingface_task(tmp_path / "dict" / "pets", test_fraction=0.3)
    assert same.fingerprint() == task.fingerprint()
    for path in (tmp_path / "pets", tmp_path / "dict" / "pets"):
        with pytest.raises(InputError, match="--test-fraction"):
            huggingface_task(path)
    # What else there is might be there to test on.
    more = write(tmp_path / "more", train=rows, unseen=table(columns("test")))
    with pytest.raises(InputError, match=r"\(found: train, unseen\)"):
        huggingface_task(more, test_fraction=0.3)
    rows.select([0, 1, 2, 4]).save_to_disk(tmp_path / "few")
    with pytest.raises(InputError, match="few: class tabby_cat "):
        huggingface_task(tmp_path / "few", test_fraction=0.3)


def test_a_share_changes_nothing_where_there_are_two_splits(folder: Path) -> None:
    task = huggingface_task(folder, test_fraction=0.3)
    assert task.test_fraction is None
    assert task.fingerprint() == huggingface_task(folder).fingerprint()
