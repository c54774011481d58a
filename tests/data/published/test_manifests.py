"""Manifests are written once, and data sets that differ from them are refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from mulki.data.image_files import ImageFiles
from mulki.data.published import Source, manifests, published_task
from mulki.data.published.tasks import NotThere
from mulki.errors import InputError

# Sets with lists of files, with a random split over sorted files, and with reordered classes.
FILES = [("oxfordpet", "zscl"), ("caltech101", "zscl"), ("tinyimagenet", "cil")]


@pytest.mark.parametrize(("name", "protocol"), FILES)
def test_a_manifest_names_every_image_with_its_class(
    data_root: Path, name: str, protocol: str
) -> None:
    task = published_task(name, Source(data_root, protocol))
    lines = manifests._lines(task)
    assert len(lines) == len(set(lines)) == len(task.train) + len(task.test)
    split, label, size, file = lines[0].split("\t")
    assert split == "train" and label == task.classes[task.train.targets[0]]
    assert data_root / file == Path(task.train.name(0))
    assert int(size) == (data_root / file).stat().st_size
    assert lines[-1].startswith(f"test\t{task.classes[task.test.targets[-1]]}\t")


def test_arrays_have_no_manifest(data_root: Path, tmp_path: Path) -> None:
    for name, protocol in (("mnist", "zscl"), ("cifar100", "cil")):
        task = published_task(name, Source(data_root, protocol))
        assert manifests.write(task, protocol, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def pets(data_root: Path, tmp_path: Path) -> Source:
    """Oxford Pets in a data root of its own, with its manifest."""
    shutil.copytree(data_root / "oxford-iiit-pet", tmp_path / "oxford-iiit-pet")
    source = Source(tmp_path, "zscl")
    path = manifests.write(published_task("oxfordpet", source), "zscl", tmp_path)
    assert path == tmp_path / "manifests" / "oxfordpet.zscl.tsv"
    return source


def test_a_changed_image_is_named(pets: Source) -> None:
    task = published_task("oxfordpet", pets)
    image = Path(task.test.name(0))
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(NotThere, match=r"oxfordpet: .*oxfordpet\.zscl\.tsv") as e:
        published_task("oxfordpet", pets)
    assert "1 of it are not there like that, 1 others are" in str(e.value)
    assert image.name in str(e.value) and "remove the manifest" in str(e.value)
    assert not e.value.helped_by_download


def test_another_label_is_seen(pets: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = pets.folder() / "oxford-iiit-pet" / "annotations" / "trainval.txt"
    rows = [line.split(" ") for line in listed.read_text().splitlines()]
    rows[0][1], rows[-1][1] = rows[-1][1], rows[0][1]
    listed.write_text("".join(" ".join(row) + "\n" for row in rows))
    with pytest.raises(NotThere, match=r"\b2 of .* 2 others"):
        published_task("oxfordpet", pets)


def test_it_is_written_once(pets: Source) -> None:
    path = pets.folder() / "manifests" / "oxfordpet.zscl.tsv"
    before = path.read_text()
    task = published_task("oxfordpet", pets)
    path.write_text("kept")
    manifests.write(task, "zscl", pets.folder())
    assert path.read_text() == "kept" != before


@pytest.mark.parametrize("content", [b"", b"train\tcat\n", b"\xff\xfe"])
def test_a_damaged_manifest_is_told(pets: Source, content: bytes) -> None:
    path = pets.folder() / "manifests" / "oxfordpet.zscl.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"oxfordpet\.zscl\.tsv: "):
        published_task("oxfordpet", pets)


def test_one_beside_the_code_holds_everywhere(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(data_root, "zscl")
    lines = manifests._lines(published_task("dtd", source))
    (tmp_path / "dtd.zscl.tsv").write_text("\n".join(lines[1:]))
    monkeypatch.setattr(manifests, "COMMITTED", tmp_path)
    with pytest.raises(NotThere, match=r"\b0 of .* 1 others"):
        published_task("dtd", source)


def test_a_data_root_that_cannot_be_written(pets: Source) -> None:
    task = published_task("oxfordpet", pets)
    shutil.rmtree(pets.folder() / "manifests")
    (pets.folder() / "manifests").write_text("in the way")
    with pytest.raises(InputError, match="manifests"):
        manifests.write(task, "zscl", pets.folder())


@pytest.mark.parametrize("odd", ["a\tb.jpg", "a\nb.jpg"])
def test_names_that_do_not_go_into_a_line_are_refused(pets: Source, odd: str) -> None:
    task = published_task("oxfordpet", pets)
    assert isinstance(task.train, ImageFiles)
    train = dataclasses.replace(task.train, files=(odd, *task.train.files[1:]))
    shutil.rmtree(pets.folder() / "manifests")
    with pytest.raises(InputError, match="a tab or a line break in a name"):
        manifests.write(dataclasses.replace(task, train=train), "zscl", pets.folder())
    assert not (pets.folder() / "manifests").exists()
