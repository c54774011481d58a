"""Readers of files from elsewhere: damaged files are refused in one line, and nothing else happens.

A case is a good file and edits of its bytes. A reader may take the result or raise an InputError
whose message is one line.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import zeros

from mulki.clip.tensor_files import load_tensors
from mulki.data.captioned_shards import read_captioned_shards
from mulki.data.csv_files import csv_task
from mulki.data.huggingface_tasks import huggingface_task
from mulki.data.vocabulary import read_vocabulary
from mulki.errors import InputError
from mulki.runs.metrics import read_matrix
from mulki.train.config.run_config import read_config, resolve


class Reader(NamedTuple):
    """A reader, and a file that is good."""

    read: Callable[[Path], object]
    good: bytes


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 60)).save(file, "PNG")
    return file.getvalue()


def _shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key in ("a", "b"):
            for ending, content in (("png", _png()), ("txt", b"a red square")):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _rows(count: int) -> Any:
    import datasets

    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "hawk"])}
    cells = {"image": [{"bytes": _png(), "path": None}] * count, "label": [0, 1] * (count // 2)}
    return datasets.Dataset.from_dict(cells, features=datasets.Features(kinds))


@cache
def _saved() -> dict[str, bytes]:
    """The files of a data set of Hugging Face by their paths."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.DatasetDict(train=_rows(4), test=_rows(2)).save_to_disk(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _dataset_around(path: Path) -> object:
    for name, content in _saved().items():
        file = path.parent / "pets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.read_bytes() if name == f"train/{path.name}" else content)
    return huggingface_task(path.parent / "pets")


def _of_datasets() -> dict[str, Reader]:
    if find_spec("datasets") is None:
        return {}
    names = ("data-00000-of-00001.arrow", "state.json", "dataset_info.json")
    return {name: Reader(_dataset_around, _saved()[f"train/{name}"]) for name in names}


def _images_beside(path: Path) -> object:
    for name in ("a.png", "b.png"):
        (path.parent / name).write_bytes(_png())
    return csv_task(path)


READERS = {
    "args.yaml": Reader(
        lambda path: resolve(read_config(path)),
        b"tasks: [embedded:digits, embedded:flags]\nmethod: lwf\nlr: 1.0e-4\ndistill_weight: 0.5\n"
        b"iterations: 5\nlock_text: true\norder: II\n",
    ),
    "matrix.csv": Reader(
        read_matrix,
        b"task,digits,flags\nzero_shot,50.0,20.5\ndigits,90.25,18\nflags,80,70.5\n",
    ),
    "words.txt": Reader(read_vocabulary, "a dog\na cat\n# none\nZürich\n".encode()),
    "birds.csv": Reader(
        _images_beside,
        b"path,label,split\na.png,owl,train\nb.png,hawk,train\na.png,owl,test\nb.png,hawk,test\n",
    ),
    "pairs-0000.tar": Reader(
        lambda path: read_captioned_shards([path], captions=True, skip_bad_images=False), _shard()
    ),
    "weights.safetensors": Reader(load_tensors, save({"a": zeros(2, 3), "b": zeros(4)})),
    **_of_datasets(),
}


class Edit(NamedTuple):
    """Bytes of a file that are replaced; `start` is taken modulo the length."""

    start: int
    length: int
    put: bytes


class Edited(NamedTuple):
    """A file by its name in READERS, and what is changed in it, one edit after the other."""

    name: str
    edits: list[Edit]

    def content(self) -> bytes:
        content = bytearray(READERS[self.name].good)
        for start, length, put in self.edits:
            start %= len(content) + 1
            content[start : start + length] = put
        return bytes(content)


_TOKENS = (
    *(b"\0", b"\n", b",", b'"', b"'", b": ", b"- ", b"{", b"}", b"[", b"&a", b"*a", b"!!python/x"),
    *(b"\xff", b"\xef\xbb\xbf", "٣".encode(), b"nan", b"inf", b"-1", b"1_0", b"1e400", b"9" * 40),
    *(b"../", b"/dev/zero", b"<script>", b" " * 3, b"\r", b"\t", b"a" * 5000),
)


_EDITS = st.builds(
    Edit,
    start=st.integers(0, 20_000),
    length=st.integers(0, 40) | st.just(20_000),
    put=st.just(b"") | st.sampled_from(_TOKENS) | st.binary(max_size=20),
)
CASES = st.builds(Edited, name=st.sampled_from(list(READERS)), edits=st.lists(_EDITS, max_size=6))


def is_read_or_refused(case: Edited) -> None:
    """Whatever the bytes are, there is a result or an InputError of one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case.name
        path.write_bytes(case.content())
        try:
            READERS[case.name].read(path)
        except InputError as error:
            assert str(error) and "\n" not in str(error), f"not one line: {error!s}"


tries = {is_read_or_refused: CASES}
