"""Reading files with clear errors, and writing them in one step."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulki.errors import InputError

MAX_MEMBER_MB = 2048
# What unpacks to less is let pass; more may be so many times what it is packed.
_ALWAYS, _RATIO = 64 * 10**6, 100

_max_member_mb = MAX_MEMBER_MB
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Check that opening a file cannot wait for another process: it is no pipe, socket or device.

    Raises:
        InputError: it is one of these, or a link that leads nowhere.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return  # whoever opens it says what was wanted
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); check the path and its links"
        ) from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: a pipe, socket or device, wanted a file; replace or remove it")


def limit_members(megabytes: int) -> None:
    """Refuse what unpacks to more megabytes, in this process from now on.

    A small file can unpack to more than the memory holds.
    """
    global _max_member_mb
    _max_member_mb = megabytes


def check_unpacked(path: str | os.PathLike[str], packed: int, unpacked: int) -> None:
    """Check that what unpacks to so many bytes may do so.

    Args:
        path: where it is from.
        packed: bytes in the file.
        unpacked: bytes in memory, or as many of them as are known.

    Raises:
        InputError: they are more than `limit_members` allows, or a hundred times those packed.
    """
    if unpacked > _max_member_mb * 10**6:
        raise InputError(
            f"{path}: unpacks to more than {_max_member_mb} MB, see --max-member-mb; raise it if "
            "the file is meant to be so large, or pack it as several"
        )
    if unpacked > max(_ALWAYS, _RATIO * packed):
        raise InputError(
            f"{path}: unpacks to more than {_RATIO} times its {packed} bytes, as files do that are "
            "to fill the memory; pass it unpacked if it is meant to be so"
        )


def gunzip(path: str | os.PathLike[str], packed: bytes) -> bytes:
    """The content of a gzipped file, given its bytes.

    Raises:
        InputError: it is too large, see `check_unpacked`.
        ValueError: it is damaged.
    """
    content = io.BytesIO()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            while part := file.read(2**20):
                content.write(part)
                check_unpacked(path, len(packed), content.tell())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"not a gzip file to its end: {error}") from error
    return content.getvalue()


def check_zip(path: str | os.PathLike[str]) -> None:
    """Check that no member of a zip file unpacks to too much, see `check_unpacked`.

    Raises:
        InputError: one does.
        OSError, zipfile.BadZipFile: it is no whole zip file.
    """
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                check_unpacked(path, member.compress_size, member.file_size)


def from_json(text: str) -> Any:
    """What JSON text stands for. Raises ValueError where it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_csv(path: Path, wanted: str, separator: str = ",") -> list[tuple[int, list[str]]]:
    """Number and cells of each line that is not blank; there is at least one.

    A byte-order mark is accepted, so spreadsheets can write the file. Spaces around cells go.

    Args:
        path: UTF-8 text.
        wanted: the file that an error asks for, such as "the matrix.csv of a run".
        separator: between two cells.

    Raises:
        InputError: a file that is missing, unreadable, empty or not such text.
    """
    check_regular(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; pass {wanted}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; pass {wanted}") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: not a text file; save it as comma-separated UTF-8 text"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: not comma-separated text ({error}); "
            "save it as CSV with commas"
        ) from None
    lines = [(number, line) for number, line in lines if any(line)]
    if not lines:
        raise InputError(f"{path}: is empty; pass {wanted}, which begins with a header")
    return lines


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        where: file and line, for messages.
        cells: the text of each column that was asked for and is there.
    """

    where: str
    cells: dict[str, str]


def read_table(
    path: Path,
    wanted: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    separator: str = ",",
) -> tuple[list[str], list[Row]]:
    """The header of a CSV file and its rows, which may be none. Other columns are ignored.

    Args:
        path, wanted, separator: see `read_csv`.
        required: columns that must be there, with a text in every row.
        optional: columns that may be missing, and whose cells may be empty.

    Raises:
        InputError: see `read_csv`; a required column that is missing; a required or optional one
            that occurs twice; a row with more or fewer cells than the header; an empty cell.
    """
    (line, header), *body = read_csv(path, wanted, separator)
    for column in required:
        if column not in header:
            example = separator.join([*required, *optional])
            by = {",": "commas", "\t": "tabs"}.get(separator, repr(separator))
            raise InputError(
                f"{path}, line {line}: no column {column} (found: {', '.join(header)}); begin the "
                f"file with a line such as {example}, separated by {by}"
            )
    columns = [column for column in (*required, *optional) if column in header]
    for column in columns:
        if header.count(column) > 1:
            raise InputError(f'{path}, line {line}: column "{column}" occurs twice; remove one')
    rows = []
    for line, cells in body:
        where = f"{path}, line {line}"
        if len(cells) != len(header):
            raise InputError(
                f"{where}: got {len(cells)} cells, wanted {len(header)}; put a cell that "
                "holds a comma into double quotes"
            )
        row = Row(where, {column: cells[header.index(column)] for column in columns})
        for column in required:
            if not row.cells[column]:
                raise InputError(f"{where}: the {column} is empty; fill it in or remove the row")
        rows.append(row)
    return header, rows


def temporary_for(path: Path) -> Path:
    """A hidden name beside `path` for what this process will rename to it; see `sweep`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sweep(folder: Path) -> None:
    """Remove the temporaries of ended processes below a folder that no other process writes to."""
    for root, folders, files in os.walk(folder):
        for name in files:
            if _TEMPORARY.fullmatch(name):
                Path(root, name).unlink(missing_ok=True)
        for name in [name for name in folders if _TEMPORARY.fullmatch(name)]:
            folders.remove(name)
            shutil.rmtree(Path(root, name))


def is_temporary(name: str) -> bool:
    """Whether a file name is one of `temporary_for`."""
    return _TEMPORARY.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder, through a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of networks and of virtual machines sync files alone.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write, which replaces ``path`` when the block ends.

    An error or an interrupt in the block leaves the old file as it was and removes the temporary
    one.
    """
    path = Path(path)
    # Not tempfile: it makes files that only their owner can read, and a renamed file keeps that.
    temporary = temporary_for(path)
    try:
        yield temporary
        # Without it, a power cut can leave an empty file under the new name.
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which replaces the folder `path` when the block ends.

    An error or an interrupt in the block leaves the old one as it was and removes the temporary
    one. Sub-folders are not synced.
    """
    path = path.resolve()  # of ".", and of a link that stays where it is
    new = temporary_for(path)
    new.mkdir(parents=True)
    try:
        yield new
        for each in [*new.iterdir(), new]:
            sync(each)
        if path.exists():
            shutil.rmtree(path)
        os.replace(new, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def append_lines(path: Path, lines: str) -> None:
    """Write lines behind those of a text file, and not behind one that was cut off there."""
    with path.open("ab") as stream:
        if path.is_file() and stream.tell():
            with path.open("rb") as written:
                written.seek(-1, os.SEEK_END)
                lines = lines if written.read() == b"\n" else "\n" + lines
        stream.write(lines.encode())


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8), see `replacing`.

    Bytes of a file's name that are no UTF-8 are written as ``\\udce9``.

    Raises:
        OSError: as ``open`` does.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
