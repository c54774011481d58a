"""Downloads, with torchvision's downloaders replaced by the writers of tiny data sets."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mulki.data import Source
from mulki.data.published import entry, torchvision_sets
from mulki.data.published.collections import COLLECTIONS
from mulki.data.published.prepare import PARTIAL, State, prepare
from mulki.errors import InputError
from tests.data.published import layouts
from tests.data.published.conftest import any_number

WRITERS = {"OxfordIIITPet": layouts.oxfordpet, "DTD": layouts.dtd, "MNIST": layouts.mnist}


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the data sets that were downloaded, in their order."""
    any_number(monkeypatch)
    real = torchvision_sets.dataset
    asked: list[str] = []

    def fake(name: str, root: Path, **options: Any) -> Any:
        if options.get("download"):
            asked.append(name)
            WRITERS[name](Path(root))
            layouts.put(Path(root) / "archive.tar.gz", "packed")
            return None
        return real(name, root, **options)

    monkeypatch.setattr(torchvision_sets, "dataset", fake)
    return asked


def states(root: Path, *names: str, says: Callable[[str], None] = print) -> dict[str, State]:
    found = prepare(COLLECTIONS["mtil"], names, Source(root), says)
    return {state.name: state for state in found}


def test_what_is_missing_is_downloaded_and_the_rest_kept(
    tmp_path: Path, downloads: list[str]
) -> None:
    layouts.mnist(tmp_path)
    found = states(tmp_path, "mnist", "dtd", "oxfordpet")
    assert downloads == ["DTD", "OxfordIIITPet"]
    assert [state.problem for state in found.values()] == ["", "", ""]
    assert found["dtd"].task is not None and len(found["dtd"].task.train) == 47
    # Neither archives nor half a data set are left.
    assert sorted(os.listdir(tmp_path)) == ["MNIST", "dtd", "manifests", "oxford-iiit-pet"]
    # MNIST has no image files; its archives have checksums.
    assert sorted(os.listdir(tmp_path / "manifests")) == ["dtd.zscl.tsv", "oxfordpet.zscl.tsv"]
    states(tmp_path, "mnist", "dtd", "oxfordpet")
    assert downloads == ["DTD", "OxfordIIITPet"]


def test_the_data_root_is_made(tmp_path: Path, downloads: list[str]) -> None:
    assert states(tmp_path / "new" / "root", "dtd")["dtd"].task is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="^--data-root: .*file"):
        states(tmp_path / "file", "dtd")
    with pytest.raises(InputError, match="^--data-root: "):
        list(prepare(COLLECTIONS["mtil"], ("dtd",), Source()))


def test_a_data_root_relative_to_the_current_folder(
    tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert states(Path("data"), "dtd")["dtd"].problem == ""
    assert downloads == ["DTD"]


@pytest.mark.parametrize("there", [False, True])
def test_a_package_that_is_missing_keeps_no_other_data_set_away(
    tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    real = torchvision_sets.dataset

    def without_scipy(name: str, root: Path, **options: Any) -> Any:
        if name != "Flowers102":
            return real(name, root, **options)
        if there or options.get("download"):
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        raise RuntimeError("Dataset not found")

    monkeypatch.setattr(torchvision_sets, "dataset", without_scipy)
    found = states(tmp_path, "flowers", "dtd")
    assert "pip install scipy" in found["flowers"].problem and found["dtd"].problem == ""


def test_a_person_is_told_about_dead_links(tmp_path: Path, downloads: list[str]) -> None:
    found = states(tmp_path, "stanfordcars", "sun397")
    assert "car_devkit.tgz" in found["stanfordcars"].problem
    assert "SUN397.tar.gz (37 GB" in found["sun397"].problem
    assert downloads == []


def test_a_failed_download_is_told_and_leaves_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: list[str]
) -> None:
    def fail(root: Path) -> None:
        layouts.put(root / "dtd" / "dtd-r1.0.1.tar.gz", "whole")
        layouts.put(root / "dtd" / "dtd" / "labels" / "half.txt", "half unpacked")
        raise OSError("network is unreachable")

    monkeypatch.setitem(WRITERS, "DTD", fail)
    problem = states(tmp_path, "dtd")["dtd"].problem
    assert "the download failed (network is unreachable)" in problem
    assert "start the command again" in problem
    assert os.listdir(tmp_path) == [PARTIAL]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WRITERS, "MNIST", lambda root: (_ for _ in ()).throw(OSError("no network")))
        (tmp_path / "other").mkdir()
        assert "no network" in states(tmp_path / "other", "mnist")["mnist"].problem
        assert os.listdir(tmp_path / "other") == []
        (tmp_path / "other").rmdir()

    kept: list[str] = []

    def look(root: Path) -> None:
        kept.extend(path.name for path in root.rglob("*") if path.is_file())
        layouts.dtd(root)

    monkeypatch.setitem(WRITERS, "DTD", look)
    assert states(tmp_path, "dtd")["dtd"].problem == ""
    assert kept == ["dtd-r1.0.1.tar.gz"]  # torchvision compares its checksum
    assert sorted(os.listdir(tmp_path)) == ["dtd", "manifests"]


def test_nothing_is_downloaded_for_a_split_that_a_person_has_to_bring(
    tmp_path: Path, downloads: list[str]
) -> None:
    layouts.dtd(tmp_path)
    source = Source(tmp_path, "coop")
    (state,) = prepare(COLLECTIONS["mtil"], ("dtd",), source)
    assert "no file" in state.problem and "split_zhou_DescribableTextures.json" in state.problem
    assert downloads == [] and os.listdir(tmp_path) == ["dtd"]
    (tmp_path / "dtd").rename(tmp_path / "away")
    rows = [[f"{name}/{name}_0001.jpg", i, name] for i, name in enumerate(entry("dtd").classes)]
    split = json.dumps({"train": rows, "val": [], "test": rows})
    layouts.put(tmp_path / "split_zhou_DescribableTextures.json", split)
    (state,) = prepare(COLLECTIONS["mtil"], ("dtd",), source)
    assert state.problem == "" and downloads == ["DTD"]


def test_an_incomplete_folder_is_put_aside(tmp_path: Path, downloads: list[str]) -> None:
    for _ in range(2):
        layouts.put(tmp_path / "dtd" / "mine.txt", "mine")
        assert states(tmp_path, "dtd")["dtd"].problem == ""
        (tmp_path / "dtd" / "dtd" / "labels" / "train1.txt").unlink()
    names = sorted(os.listdir(tmp_path))
    assert names == ["dtd", "dtd.incomplete", "dtd.incomplete-2", "manifests"]
    assert (tmp_path / "dtd.incomplete" / "mine.txt").read_text() == "mine"


def test_damaged_images_are_named(tmp_path: Path, downloads: list[str]) -> None:
    layouts.dtd(tmp_path)
    image = tmp_path / "dtd" / "dtd" / "images" / "banded" / "banded_0003.jpg"
    image.write_bytes(image.read_bytes()[:-40])
    state = states(tmp_path, "dtd")["dtd"]
    assert state.task is not None
    assert f"dtd: unreadable: {image}" in state.problem
    assert not (tmp_path / "manifests").exists()


def test_files_that_changed_since_are_told_and_not_downloaded(
    tmp_path: Path, downloads: list[str]
) -> None:
    layouts.dtd(tmp_path)
    assert states(tmp_path, "dtd")["dtd"].problem == ""
    image = tmp_path / "dtd" / "dtd" / "images" / "banded" / "banded_0003.jpg"
    image.write_bytes(image.read_bytes() + b"more")
    found = states(tmp_path, "dtd")["dtd"]
    assert found.task is None and "dtd: its images differ from" in found.problem
    (tmp_path / "manifests" / "dtd.zscl.tsv").unlink()
    assert states(tmp_path, "dtd")["dtd"].problem == "" and downloads == []


MD5 = {
    "aircraft": "d4acdd33327262359767eeaa97a4f732",
    "cub": "97eceeb196236b17998738112f37df78",
    "tinyimagenet": "90528d7ca1a48142e341f4ef8d21d0de",
}


@pytest.mark.parametrize(("name", "md5"), MD5.items())
def test_archives_are_downloaded_with_a_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, md5: str
) -> None:
    from torchvision.datasets import utils

    any_number(monkeypatch)
    asked = []

    def fake(url: str, root: str, md5: str) -> None:
        asked.append((url, md5))
        Path(root, url.rpartition("/")[2]).write_bytes(b"changed on the way, with the same MD5")

    def unpack(path: str, root: str) -> None:
        getattr(layouts, name)(Path(root))

    monkeypatch.setattr(utils, "download_url", fake)
    monkeypatch.setattr(utils, "extract_archive", unpack)
    collection = COLLECTIONS["mtil" if name == "aircraft" else "cil"]
    (state,) = prepare(collection, (name,), Source(tmp_path))
    assert [known for _, known in asked] == [md5]
    assert asked[0][0].startswith("https://")
    if entry(name).archives[0].sha256 is None:
        assert state.problem == "" and state.task is not None
    else:
        assert state.task is None and "tiny-imagenet-200.zip has the SHA-256" in state.problem
        assert not list(tmp_path.rglob("*.zip"))


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="an old Python")
def test_an_archive_writes_nothing_outside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import utils

    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("../../../outside")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))

    def fake(url: str, root: str, md5: str) -> None:
        shutil.copy(tmp_path / "evil.tgz", Path(root, url.rpartition("/")[2]))

    monkeypatch.setattr(utils, "download_url", fake)
    before = tarfile.TarFile.extraction_filter
    (state,) = prepare(COLLECTIONS["cil"], ("cub",), Source(tmp_path / "root"))
    assert "the download failed" in state.problem and "outside" in state.problem
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"evil.tgz", "CUB_200_2011.tgz"}
    assert tarfile.TarFile.extraction_filter is before
