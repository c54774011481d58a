"""Reading a run folder, also one that is unfinished or was made by hand."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mulki.errors import InputError
from mulki.files import from_json
from mulki.runs.lock import is_locked
from mulki.runs.metrics import AccuracyMatrix, ClassIncremental, read_matrix
from mulki.runs.results import class_incremental, read_evaluations
from mulki.runs.with_head import WithHead

T = TypeVar("T")


@dataclass(frozen=True)
class RunData:
    """The content of a run folder; what is missing there is empty here.

    Args:
        name: of the run, else of the folder.
        status: "running", "complete", "interrupted", or "unknown" without a summary. A run whose
            process has ended is interrupted, whatever its summary says.
        matrix: from ``matrix.csv``.
        summary: from ``summary.json``.
        class_incremental: from ``results.jsonl``; without values where it has none.
        with_head: from ``results.jsonl``; None where a learned task has none.
        config: the text of ``args.yaml``.
        environment: from ``env.json``.
    """

    name: str
    status: str
    matrix: AccuracyMatrix
    summary: dict[str, Any]
    class_incremental: ClassIncremental
    with_head: WithHead | None
    config: str
    environment: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Start weights, prompts and splits in a line, 12 digits each; empty if unknown.

        Two results with the same line were measured on the same images with the same prompts, from
        the same start.
        """
        hashes = self.environment.get("hashes")
        return fingerprint(hashes if isinstance(hashes, dict) else {})


def fingerprint(hashes: Mapping[str, Any]) -> str:
    """The line of `RunData.fingerprint`, of hashes as `env.json` has them."""
    known = {name: hashes.get(name) for name in ("weights", "prompts", "splits")}
    return ", ".join(f"{name} {_short(value)}" for name, value in known.items() if value)


def read_folder(folder: str | os.PathLike[str]) -> RunData:
    """Read a run folder.

    Only ``matrix.csv`` must be there, so a run that was killed, or a matrix from elsewhere, can be
    read too.

    Raises:
        InputError: a matrix that is missing or wrong, or JSON or options that cannot be read.
    """
    folder = Path(folder)
    if not (folder / "matrix.csv").is_file():
        raise InputError(
            f"{folder}: no matrix.csv in it; pass the folder of a run that was evaluated once"
        )

    def read(name: str, reader: Callable[[Path], T], instead: T) -> T:
        return reader(folder / name) if (folder / name).is_file() else instead

    return read_with(read, folder)


class Read(Protocol):
    """Reads a file of a run folder."""

    def __call__(self, name: str, reader: Callable[[Path], T], instead: T) -> T:
        """What `reader` makes of the file, or `instead` where there is nothing to read."""


def read_with(read: Read, folder: Path) -> RunData:
    """What a run folder holds, read file by file with `read`."""
    nothing: dict[str, Any] = {}
    summary = read("summary.json", read_json, nothing)
    matrix = read("matrix.csv", read_matrix, AccuracyMatrix(()))
    status = str(summary.get("status", "unknown"))
    if status == "running" and is_locked(folder) is False:
        status = "interrupted"  # a process that was killed could not say so
    nowhere: tuple[ClassIncremental, WithHead | None] = ClassIncremental({}), None
    seen, with_head = read("results.jsonl", lambda path: _among_all_classes(path, matrix), nowhere)
    return RunData(
        name=str(summary.get("name", folder.resolve().name)),
        status=status,
        matrix=matrix,
        summary=summary,
        class_incremental=seen,
        with_head=with_head,
        config=read("args.yaml", _read_text, ""),
        environment=read("env.json", read_json, nothing),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; restore the file") from None


def _short(value: Any) -> str:
    # Of a hash, or of one a task in any order.
    if isinstance(value, str):
        return value[:12]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _among_all_classes(
    path: Path, matrix: AccuracyMatrix
) -> tuple[ClassIncremental, WithHead | None]:
    # Not from the summary: it may be a row behind the matrix where a run was killed.
    lines = read_evaluations(path)
    try:
        with_head = WithHead.of_lines(lines, matrix.columns, matrix.tasks)
        return class_incremental(lines, matrix.tasks), with_head
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object; empty where it is missing.

    Raises:
        InputError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore or remove the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: wanted a JSON object; restore or remove the file")
    return value
