"""The folder of a new run: its name, and that nothing of anyone's is in it."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from mulki.errors import InputError
from mulki.files import is_temporary, sweep
from mulki.runs.catalog import TASKS
from mulki.runs.lock import FolderLock

#: The folder in a run folder that a run goes on from.
RECOVERY = "recovery"

# What a run writes before its first evaluation, and what a report adds to it.
_BEFORE_ROWS = frozenset(
    {"env.json", "args.yaml", "summary.json", "out.log", TASKS, "tensorboard", "wandb"}
    | {"summary.md", "report.html", "plots"}
)


def default_name(
    method: str,
    order: str,
    seed: int,
    config: Mapping[str, object],
    now: datetime | None = None,
) -> str:
    """The name of a run that was given none: start time, tasks, model, method, order, seed."""
    now = now or datetime.now()
    tasks = config.get("tasks")
    words = [tasks] if isinstance(tasks, str) else tasks if isinstance(tasks, (list, tuple)) else []
    # Of folders their own names, and of many tasks the first ones.
    named = slug(" ".join(Path(str(word)).name for word in words))[:30].strip("_")
    model = slug(str(config.get("model", "")))[-30:].strip("_")
    about = [named] * bool(words) + [model] * ("model" in config) + [slug(method)]
    return f"{now:%Y_%m_%d-%H_%M_%S}-{'-'.join(about)}-order_{slug(order)}-seed_{seed}"


def slug(name: str) -> str:
    """A name with nothing but a-z, 0-9 and underscores in it."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "_", plain.lower()).strip("_") or "unnamed"


def check_free(logs: str | os.PathLike[str], name: str | None) -> None:
    """Check a name as :func:`make_folder` does, and raise the same errors; make nothing."""
    check_name(name)
    if any("\ud800" <= letter <= "\udfff" for letter in os.fspath(logs)):
        # safetensors opens no such path.
        raise InputError(f"--logs: got {os.fspath(logs)!a}, not UTF-8; choose another")
    path = Path(logs) / (name or "")
    if name is not None:
        _check_unused(path)
        if path.is_dir():
            FolderLock(path).release()


def check_name(name: str | None) -> None:
    """Raise an InputError for a name that is not one folder's."""
    if name is not None and (not name.strip() or name in (".", "..") or re.search(r"[/\\]", name)):
        raise InputError(
            f'--name: got "{name}", wanted the name of one folder; '
            "put the folders above it into --logs"
        )
    if name is not None and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise InputError(
            f"--name: got {name!a}, which holds a line break or what is no text; choose another"
        )


def _check_unused(path: Path) -> None:
    try:
        names = {each.name for each in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise InputError(
            f"{path}: the run folder cannot be made ({error.strerror}); choose another --logs"
        ) from None
    names = {name for name in names if not is_temporary(name)}
    if names and not ("env.json" in names and names <= _BEFORE_ROWS):
        going_on = f", or go on with --resume {path}" if RECOVERY in names else ""
        raise InputError(
            f"{path}: the run folder exists and is not empty; give another --name, or remove it"
            f"{going_on}"
        )


def make_folder(logs: Path, name: str | None, default: str) -> tuple[Path, FolderLock]:
    """Make ``<logs>/<name>/``, or with `default` where no name is given, and lock it.

    A folder whose run ended before its first evaluation is emptied and taken again.

    Raises:
        InputError: as :meth:`mulki.runs.folder.RunFolder.create` does.
    """
    check_name(name)
    attempt = 1
    while True:
        # Two runs that start without a name in the same second get different folders.
        path = logs / (name or (default if attempt == 1 else f"{default}-{attempt}"))
        try:
            path.mkdir(parents=True, exist_ok=name is not None)
            break
        except OSError as error:
            if name is None and path.is_dir():
                attempt += 1
                continue
            raise InputError(
                f"{path}: the run folder cannot be made ({error.strerror}); choose another --logs"
            ) from None
    _check_unused(path)
    lock = FolderLock(path)
    # Again, now that no other process can be filling it.
    _check_unused(path)
    sweep(path)
    # Not env.json, by which the folder is known as ours until it is replaced.
    for old in (path / name for name in _BEFORE_ROWS - {"env.json"}):
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    return path, lock
