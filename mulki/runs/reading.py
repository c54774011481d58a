"""Reading a run folder, also one that is unfinished or was made by hand."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulki.errors import InputError
from mulki.files import from_json
from mulki.runs.lock import is_locked
from mulki.runs.metrics import AccuracyMatrix, ClassIncremental, read_matrix
from mulki.runs.with_head import WithHead


@dataclass(frozen=True)
class RunData:
    """The content of a run folder; what is missing there is empty here.

    Args:
        name: of the run, else of the folder.
        status: "running", "complete", "interrupted", or "unknown" without a summary. A run whose
            process has ended is interrupted, whatever its summary says.
        matrix: from ``matrix.csv``.
        summary: from ``summary.json``.
        class_incremental: from the summary; without values where it has none.
        with_head: from the summary; None where it has none for the tasks of the matrix.
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
    summary = read_json(folder / "summary.json")
    matrix = read_matrix(folder / "matrix.csv")
    arguments = folder / "args.yaml"
    try:
        config = arguments.read_text(encoding="utf-8") if arguments.is_file() else ""
    except UnicodeDecodeError:
        raise InputError(f"{arguments}: not UTF-8; restore the file") from None
    return RunData(
        name=summary.get("name", folder.resolve().name),
        status=run_status(folder, summary),
        matrix=matrix,
        summary=summary,
        class_incremental=class_incremental_of(folder / "summary.json", summary),
        with_head=with_head_of(folder / "summary.json", summary, matrix.tasks),
        config=config,
        environment=read_json(folder / "env.json"),
    )


def run_status(folder: Path, summary: dict[str, Any]) -> str:
    """The status of `RunData`, given the content of ``summary.json``."""
    status = str(summary.get("status", "unknown"))
    # A process that was killed could not say so.
    return "interrupted" if status == "running" and is_locked(folder) is False else status


def _short(value: Any) -> str:
    # Of a hash, or of one a task in any order.
    if isinstance(value, str):
        return value[:12]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def class_incremental_of(path: Path, summary: dict[str, Any]) -> ClassIncremental:
    """The A_i in the content of ``summary.json``, which lies at `path`.

    Raises:
        InputError: they are not what a run writes.
    """
    try:
        return ClassIncremental(dict(summary.get("class_incremental", {}).get("after", {})))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f'{path}: "class_incremental" is not what a run writes ({error}); restore the file or '
            "remove the entry"
        ) from None


def with_head_of(path: Path, summary: dict[str, Any], tasks: Sequence[str]) -> WithHead | None:
    """The results with a head in the content of ``summary.json``, which lies at `path`.

    Args:
        tasks: those of the matrix; a run that was killed may have other ones in its summary.

    Raises:
        InputError: they are not what a run writes.
    """
    if summary.get("with_head") is None:
        return None
    try:
        return WithHead.of_dict(summary["with_head"], tasks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f'{path}: "with_head" is not what a run writes ({type(error).__name__}: {error}); '
            "restore the file or remove the entry"
        ) from None


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
