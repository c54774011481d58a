from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mulki.data.embedded import embedded_root, embedded_sequence
from mulki.data.shards import open_pack, open_shard, read_samples
from mulki.errors import InputError
from tests.data.data_helpers import encoded, picture, write_shard

REAL = pytest.mark.skipif(
    not (embedded_root() / "tasks.json").exists(), reason="the bundled pack is not built"
)


def _from_tarfile(path: Path) -> list[tuple[bytes, int]]:
    """Read a shard from front to back, as the layout is defined."""
    items: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            items.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return [(items[key]["webp"], int(items[key]["cls"])) for key in sorted(items)]


def _load(images: Any, index: int) -> bytes:
    return images.load(index).tobytes()  # type: ignore[no-any-return]


def _refused(root: Path, *words: object, order: str = "I") -> None:
    with pytest.raises(InputError) as caught:
        embedded_sequence(order, root)
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def _edit(root: Path, *keys: str, value: object) -> None:
    content = json.loads((root / "tasks.json").read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (root / "tasks.json").write_text(json.dumps(content))


def test_tasks_in_order(pack: Path) -> None:
    first, second = embedded_sequence("I", pack)
    assert (first.name, second.name) == ("digits", "letters")
    assert [t.name for t in embedded_sequence("II", pack)] == ["letters", "digits"]
    assert first.classes == ("digits a", "digits b")
    assert first.templates == ("a drawing of {}.",)
    assert (len(first.train), len(first.test)) == (5, 3)
    assert list(first.train.targets) == [0, 1, 0, 1, 0]
    assert first.train.name(2) == f"{pack / 'digits-train.tar'}:000002.webp"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["x.tar", "x.tar.gz"]),
    items=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 999)), min_size=1, max_size=5),
    data=st.data(),
)
def test_random_access_equals_reading_through(
    tmp_path: Path, name: str, items: Any, data: Any
) -> None:
    path = tmp_path / name
    path.unlink(missing_ok=True)
    write_shard(path, [(encoded(picture(size, size), "webp"), t) for size, t in items])
    images, wanted = open_shard(path), _from_tarfile(path)
    assert list(images.targets) == [target for _, target in wanted]
    for index in data.draw(st.permutations(range(len(wanted)))):
        assert np.array_equal(images.load(index), Image.open(io.BytesIO(wanted[index][0])))


def test_a_gzipped_shard_is_the_same_split(tmp_path: Path) -> None:
    items = [(encoded(picture(i), "webp"), i % 2) for i in range(4)]
    for name in ("x.tar", "x.tar.gz"):
        write_shard(tmp_path / name, items)
    plain, zipped = open_shard(tmp_path / "x.tar"), open_shard(tmp_path / "x.tar.gz")
    assert zipped.fingerprint() == plain.fingerprint()
    copy = pickle.loads(pickle.dumps(zipped))
    assert [_load(copy, i) for i in range(4)] == [_load(plain, i) for i in range(4)]


def test_a_cut_gzipped_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    write_shard(path, [(encoded(picture(1), "webp"), 0)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="x.tar.gz: .*gzip"):
        open_shard(path)


def test_members_pair_by_full_key_and_are_sorted_by_it(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in [
            ("b/0.cls", b"2"),
            ("a/0.cls", b"1\n"),
            ("b/0.webp", encoded(picture(2), "webp")),
            ("a/0.webp", encoded(picture(1), "webp")),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    images = open_shard(path)
    assert images.members == ("a/0.webp", "b/0.webp") and images.targets == (1, 2)


def test_threads_and_processes_read_the_same(pack: Path) -> None:
    images = embedded_sequence("I", pack)[0].train
    wanted = [_load(images, i) for i in range(5)]
    tasks = [(images, i % 5) for i in range(200)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(_load, *zip(*tasks, strict=True))) == wanted * 40
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(_load, tasks) == wanted * 40
    copy = pickle.loads(pickle.dumps(images))  # what spawned workers get
    assert [_load(copy, i) for i in range(5)] == wanted


def test_shard_is_indexed_once_and_again_when_it_changes(pack: Path) -> None:
    path = pack / "digits-test.tar"
    first = open_shard(path)
    assert open_shard(path) is first
    write_shard(path, [(encoded(picture(7, 9), "webp"), 1)])
    assert open_shard(path).targets == (1,)


def test_fingerprint_moves_with_the_pack_and_tells_tasks_apart(pack: Path) -> None:
    digits, letters = embedded_sequence("I", pack)
    moved = pack.rename(pack.parent / "moved")
    assert embedded_sequence("I", moved)[0].fingerprint() == digits.fingerprint()
    assert letters.train.fingerprint() != digits.train.fingerprint()


def test_unknown_order_lists_the_orders(pack: Path) -> None:
    _refused(pack, '"III"', "embedded", "I, II", order="III")


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_flipped_byte_is_found(pack: Path, split: str) -> None:
    path = pack / f"letters-{split}.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    _refused(pack, path, "damaged", "checksum", "reinstall mulki")


def test_missing_files(pack: Path) -> None:
    (pack / "letters-test.tar").unlink()
    _refused(pack, pack / "letters-test.tar", "missing", "reinstall mulki")
    (pack / "tasks.json").unlink()
    _refused(pack, pack / "tasks.json", "missing", "reinstall mulki")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}', '"text"', "\udce9"])
def test_damaged_index(pack: Path, content: str) -> None:
    (pack / "tasks.json").write_text(content, errors="surrogateescape")
    _refused(pack, pack / "tasks.json", "damaged", "reinstall mulki")


def test_index_of_another_format(pack: Path) -> None:
    _edit(pack, "format", value=2)
    _refused(pack, pack / "tasks.json", "format 2, wanted 1", "version of mulki")


@pytest.mark.parametrize(
    "keys, value, word",
    [
        (("tasks", "digits", "train"), {"file": "x"}, "'count' missing"),
        (("orders", "I"), ["digits", "flags"], "'flags' missing"),
        (("tasks", "digits"), None, "not laid out"),
    ],
)
def test_incomplete_index(pack: Path, keys: tuple[str, ...], value: object, word: str) -> None:
    _edit(pack, *keys, value=value)
    _refused(pack, pack / "tasks.json", word, "reinstall mulki")


def test_wrong_count(pack: Path) -> None:
    _edit(pack, "tasks", "digits", "train", "count", value=6)
    _refused(pack, pack / "digits-train.tar", "5 images, wanted 6", "reinstall mulki")


@pytest.mark.parametrize(
    "members, word",
    [
        ({"0.webp": b"x"}, "0 lacks"),
        ({"0.cls": b"1"}, "0 lacks"),
        ({"0.webp": b"x", "0.cls": b"one"}, "invalid literal"),
        ({}, "no images"),
    ],
)
def test_malformed_shard(tmp_path: Path, members: dict[str, bytes], word: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match=f"x.tar.*{word}"):
        open_shard(path)


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"nonsense" * 200)
    with pytest.raises(InputError, match="x.tar: "):
        open_shard(tmp_path / "x.tar")


@REAL
def test_bundled_pack_is_whole() -> None:
    pack = open_pack(embedded_root())
    assert set(pack.orders) == {"I", "II", "III", "IV"}
    assert all(sorted(order) == sorted(pack.tasks) for order in pack.orders.values())
    names = set()
    for task in embedded_sequence("I"):
        names.add(task.fingerprint())
        for images in (task.train, task.test):
            assert set(images.targets) == set(range(len(task.classes)))
            assert images.load(len(images) - 1).mode == "RGB"
    assert len(names) == len(pack.tasks)


@REAL
def test_bundled_pack_random_access_equals_reading_through() -> None:
    images = embedded_sequence("I")[0].test
    wanted = _from_tarfile(Path(images.name(0).rpartition(":")[0]))
    assert list(images.targets) == [target for _, target in wanted]
    for index in np.random.default_rng(0).permutation(len(images))[:50]:
        assert np.array_equal(
            images.load(index), Image.open(io.BytesIO(wanted[index][0])).convert("RGB")
        )


def test_members_take_little_memory() -> None:
    """tarfile keeps 390 bytes for each beside."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(4000):
            for suffix in ("png", "cls"):
                tar.addfile(tarfile.TarInfo(f"{number:07d}.{suffix}"))
    content.seek(0)
    tracemalloc.start()
    try:
        samples = read_samples(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == 4000 and peak < 500 * 8000
