"""``--import``: a user's own methods, task sequences, training transforms and gates.

Importing a module is enough: what it registers is then found by name. A file is imported as a
module named after it, from its own folder, which is appended to `sys.path`. DataLoader workers that
start a new interpreter get the same path, so they can unpickle the classes of that file.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mulki import methods
from mulki.data import sequence_names, transform_names
from mulki.errors import InputError
from mulki.ops.gates import gate_names

_log = logging.getLogger(__name__)

# What a module may register: the word for it, and how to list the names there are.
_REGISTERED: tuple[tuple[str, Callable[[], Iterable[str]]], ...] = (
    ("method", methods.available),
    ("task sequence", sequence_names),
    ("training transform", transform_names),
    ("gate", gate_names),
)


# What was raised by modules that failed: a second import would register the same names again.
_failures: dict[str, str] = {}


def import_modules(modules: Sequence[str]) -> tuple[str, ...]:
    """Import modules in their order; one that is imported already costs nothing.

    Args:
        modules: import paths such as ``my_package.my_method`` (the current folder is searched
            last), or Python files such as ``./my_method.py``.

    Returns:
        The modules without repeats, files by their absolute paths.

    Raises:
        InputError: a file or module that does not exist or fails, a file whose name belongs to
            another module, or a name that is registered twice. A module that has failed is not
            tried again in this process.
    """
    found: dict[str, None] = {}
    for module in modules:
        is_file = module.endswith(".py") or "/" in module or os.sep in module
        source = str(_file(module)) if is_file else module
        if source in _failures:
            raise InputError(f"{_failures[source]}, then start Python again")
        try:
            _import(module, _name_of_file(module) if is_file else _name_of_path(module))
        except _Failed as error:
            _failures[source] = str(error)
            raise
        found[source] = None
    return tuple(found)


class _Failed(InputError):
    """A module that has been executed, in part or as a whole, and cannot be used."""


def _import(module: str, name: str) -> None:
    if name in sys.modules:
        return
    before = _names(module)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(module, error) from error
        raise InputError(
            f"--import: there is no module {error.name!r}; correct the name, install its package, "
            f"or give the file, as ./{name.replace('.', '/')}.py"
        ) from error
    # SystemExit too: a script that parses a command line of its own raises it.
    except (Exception, SystemExit) as error:
        raise _failed(module, error) from error
    if _names(module) == before:
        kinds = ", ".join(kind for kind, _ in _REGISTERED)
        _log.warning(
            "--import: %s registers nothing that can be chosen by name (%s)", module, kinds
        )


def _name_of_path(module: str) -> str:
    if "" in module.split("."):
        raise InputError(
            f"--import: got {module!r}, wanted a Python file, as ./my_method.py, or an import path "
            "with the name of its package, as pkg.module"
        )
    _search_also(Path.cwd())
    return module


def _file(module: str) -> Path:
    path = Path(module)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"--import: {module}: {what}; give a Python file or an import path")
    return path.resolve()


def _name_of_file(module: str) -> str:
    path = _file(module)
    name = path.stem
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(
            f"--import: {module}: a file is imported under its name, so that has to be letters, "
            "digits and underscores before .py; rename it"
        )
    _search_also(path.parent)
    loaded = sys.modules.get(name)
    if loaded is not None:
        found = getattr(loaded, "__file__", None)
    else:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
        found = spec.origin if spec is not None else None
    if found is None or not Path(found).exists() or not path.samefile(found):
        raise InputError(
            f"--import: {module}: the name {name} belongs to another module "
            f"({found or 'built in'}); rename the file"
        )
    return name


def _search_also(folder: Path) -> None:
    # Last, so that no file beside the user's hides an installed package.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _names(module: str) -> frozenset[tuple[str, str]]:
    try:
        return frozenset((kind, name) for kind, names in _REGISTERED for name in names())
    except InputError as error:
        raise _Failed(f"--import: {module}: {error}") from error


def _failed(module: str, error: BaseException) -> _Failed:
    said = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        file, line, said = error.filename or module, error.lineno, error.msg
    else:
        # The frames of the import system stand between ours and the module's.
        own = {__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>"}
        frames = traceback.extract_tb(error.__traceback__)
        users = [f for f in frames if f.filename not in own and f.filename != importlib.__file__]
        file, line = (users[0].filename, users[0].lineno) if users else (module, None)
    where = os.path.relpath(file) + (f", line {line}" if line is not None else "")
    if not isinstance(error, InputError):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    remedy = "correct it"
    if isinstance(error, ImportError) and "attempted relative import" in said:
        remedy = "give its import path, as pkg.module"
    return _Failed(f"--import: {module} fails at {where} ({said}); {remedy}")
