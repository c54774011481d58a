"""Files from elsewhere whose bytes are damaged: read, or refused in one line; nothing else happens.

`make nightly` draws more and other damages.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import zeros

from mulki.clip.tensor_files import load_tensors
from mulki.data.captioned_shards import read_captioned_shards
from mulki.data.csv_files import csv_task
from mulki.data.decoding import decode, verify
from mulki.data.vocabulary import read_vocabulary
from mulki.errors import InputError
from mulki.report import write_report
from mulki.report.comparison.compare import compare
from mulki.train.config.run_config import read_config, resolve
from tests.report.report_helpers import write_whole_run
from tests.train_helpers import without_figures


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 60)).save(file, kind)
    return file.getvalue()


def shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key in ("a", "b"):
            for ending, content in (("png", picture("PNG")), ("txt", b"a red square")):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read_image(path: Path) -> None:
    verify(path, path.name)
    decode(path, path.name)


def read_images_of(path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (path.parent / name).write_bytes(picture("PNG"))
    csv_task(path)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_run(tmp_path_factory.mktemp("logs"), images=4, steps=2)


# By the name of the file: its reader, and a file that is good.
READERS: dict[str, tuple[Callable[[Path], object], bytes]] = {
    "image.png": (read_image, picture("PNG")),
    "image.jpg": (read_image, picture("JPEG")),
    "birds.csv": (
        read_images_of,
        b"path,label,split\na.png,owl,train\nb.png,hawk,train\nc.png,owl,test\nd.png,hawk,test\n",
    ),
    "pairs-0000.tar": (
        lambda path: read_captioned_shards([path], captions=True, skip_bad_images=False),
        shard(),
    ),
    "words.txt": (read_vocabulary, "a dog\na cat\n# none\nZürich\n".encode()),
    "weights.safetensors": (load_tensors, save({"a": zeros(2, 3), "b": zeros(4)})),
    "options.yaml": (
        lambda path: resolve(read_config(path)),
        b"tasks: [embedded:digits, embedded:flags]\nmethod: lwf\nlr: 1.0e-4\ndistill_weight: 0.5\n"
        b"iterations: 5\nlock_text: true\norder: II\n",
    ),
}
OF_A_RUN = (
    *("args.yaml", "summary.json", "matrix.csv", "results.jsonl", "history.jsonl"),
    *("tasks.json", "examples.json", "answers/01_digits.npz"),
)
TOKENS = (
    *(b"\0", b"\n", b",", b'"', b"'", b": ", b"- ", b"{", b"}", b"[", b"&a", b"*a", b"!!python/x"),
    *(b"\xff", b"\xef\xbb\xbf", "٣".encode(), b"nan", b"inf", b"-1", b"1_0", b"1e400", b"9" * 40),
    *(b"../", b"/dev/zero", b"<script>", b" " * 3, b"\r", b"\t", b"a" * 5000),
)
# Where bytes are replaced, modulo the length; how many; and by what.
EDITS = st.tuples(
    st.integers(0, 20_000),
    st.integers(0, 40) | st.just(20_000),
    st.just(b"") | st.sampled_from(TOKENS) | st.binary(max_size=20),
)


damages = given(edits=st.lists(EDITS, max_size=6))
unhurried = settings(
    deadline=timedelta(seconds=60), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Edits = list[tuple[int, int, bytes]]


def check(read: Callable[[Path], object], path: Path, good: bytes, edits: Edits) -> None:
    content = bytearray(good)
    for start, length, put in edits:
        start %= len(content) + 1
        content[start : start + length] = put
    path.write_bytes(content)
    try:
        read(path)
    except InputError as error:
        assert edits, f"a good file is refused: {error}"
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", READERS)
@unhurried
@damages
def test_a_damaged_file_is_read_or_refused_in_one_line(
    name: str, tmp_path: Path, edits: Edits
) -> None:
    read, good = READERS[name]
    check(read, tmp_path / name, good, edits)


@pytest.mark.parametrize("name", OF_A_RUN)
@unhurried
@damages
def test_a_run_folder_with_a_damaged_file_is_read_or_refused_in_one_line(
    name: str, whole_run: Path, tmp_path_factory: pytest.TempPathFactory, edits: Edits
) -> None:
    run = Path(shutil.copytree(whole_run, tmp_path_factory.mktemp("copy") / "run"))

    def read(path: Path) -> None:
        compare([run])
        with without_figures():
            write_report(run)

    check(read, run / name, (run / name).read_bytes(), edits)
