"""Rooms depend downwards only, and each module of `mulki/` has a test file of its name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT, project_files

PACKAGE, TESTS = ROOT / "mulki", ROOT / "tests"

# Folders that mirror something else than `mulki/`.
OTHER = ("benchmarks", "kernels")

CROSS_CUTTING = {
    "app/test_hostile_names.py": "all commands",
    "app/test_two_months.py": "runs, a copied checkpoint, and all that is done with it",
    "train/test_captions.py": "runs of tasks of captions, from their files to the report",
    "train/test_faults.py": "whole runs in which a system call fails",
    "train/test_full_disk.py": "a whole run on a small file system",
    "train/test_killed.py": "whole runs in processes that are killed",
    "train/test_load.py": "runs of many tasks, and of a task with many classes",
    "train/test_reference.py": "runs with a reference set, from its folder to the losses",
    "train/saving/test_changed_folders.py": "whole runs that go on, after changes from outside",
    "train/saving/test_resuming.py": "whole runs that are stopped, and go on",
    "fuzz/test_fuzz.py": "python -m tests.fuzz",
    "losses/test_losses_memory.py": "the table of losses",
    "losses/test_losses_on_ranks.py": "the table of losses",
    "losses/test_open_clip_gradients.py": "the table of docs/open-clip.md",
    "losses/test_open_clip_interface.py": "the table of losses",
    "methods/test_registry.py": "the table of methods",
    "ops/test_compile.py": "all public functions",
    "ops/test_corners.py": "the table of operators",
    "ops/test_precision.py": "the table of operators",
    "ops/test_products.py": "the C++ kernels of csrc/",
    "test_build.py": "setup.py",
    "test_contributing.py": "CONTRIBUTING.md",
    "test_docs.py": "README.md and docs/",
    "test_environment_variables.py": "docs/environment-variables.md",
    "test_examples.py": "examples/",
    "test_import.py": "the whole package",
    "test_layout.py": "the tests themselves",
    "test_packaging.py": "setup.py and pyproject.toml",
    "test_program.py": "mulki as a process",
    "test_readme.py": "README.md and docs/",
    "test_repository.py": "CITATION.cff and .github/",
}


def has_logic(module: Path) -> bool:
    body = ast.parse(module.read_text(encoding="utf-8")).body
    return any(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for n in body)


def untested(package: Path, tests: Path, files: Iterable[Path]) -> list[str]:
    """Modules with functions or classes that have neither a test file nor a folder of tests."""
    files = set(files)
    missing = []
    for module in sorted(files):
        if not module.is_relative_to(package) or module.suffix != ".py":
            continue
        if module.name.startswith("__") or not has_logic(module):
            continue
        folder = tests / module.relative_to(package).parent
        file, many = folder / f"test_{module.name}", folder / module.stem
        in_folder = any(each.parent == many and each.match("test_*.py") for each in files)
        if file not in files and not in_folder:
            missing.append(module.relative_to(package).as_posix())
    return missing


def named_after_no_module(package: Path, tests: Path, files: Iterable[Path]) -> set[str]:
    """Test files that no module or package of their name stands behind."""
    files = set(files)
    found = set()
    for file in files:
        if not file.is_relative_to(tests) or not file.match("test_*.py"):
            continue
        path = file.relative_to(tests)
        module = package / path.parent / path.name.removeprefix("test_")
        # A module may have a folder of tests, as functional.py has.
        behind = {module, module.with_suffix("") / "__init__.py", module.parent.with_suffix(".py")}
        if path.parts[0] not in OTHER and not behind & files:
            found.add(path.as_posix())
    return found


def modules(package: Path, *others: Path) -> dict[str, Path]:
    """The modules of a package by name; `others` are packages that it has in folders beside it."""
    found = {}
    for folder in (package, *others):
        name = package.name if folder == package else f"{package.name}.{folder.name}"
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = file
    return found


def imports(module: str, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a module imports, on every level and for type checkers alone too."""
    package = module.partition(".")[0]
    inside = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside.split(".")[: inside.count(".") + 2 - node.level] if node.level else []
            origin = ".".join((*above, node.module) if node.module else above)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            # The version is all that modules take of the package that they are in.
            if name.partition(".")[0] != package or name == f"{package}.__version__":
                continue
            while name not in known:
                name = name.rpartition(".")[0]
            while name and name != module:
                # A folder without `__init__.py` has no code of its own.
                if name in known:
                    yield name
                # Packages on the way are imported too; those around the module have been.
                name = name.rpartition(".")[0]
                if f"{module}.".startswith(f"{name}."):
                    break


def circle(known: Mapping[str, Path]) -> list[str]:
    """Modules that import each other in this order; empty if there are none."""
    try:
        TopologicalSorter({name: set(imports(name, known)) for name in known}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def rooms(page: str) -> list[tuple[str, ...]]:
    """What each row of the table of rooms names, from the top."""
    table = page.partition("\n| room |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    return [tuple(re.findall(r"`([^`]+)`", row)) for row in rows]


def row_of(file: str, rows: Sequence[Sequence[str]]) -> int:
    """The row of a file, which is that of the longest name that fits."""
    fits = {
        len(name): number
        for number, names in enumerate(rows)
        for name in names
        if file == name or (name.endswith("/") and file.startswith(name))
    }
    assert fits, f"{file} is in no room of CONTRIBUTING.md"
    return fits[max(fits)]


def upwards(
    known: Mapping[str, Path], roots: Sequence[Path], rows: Sequence[Sequence[str]]
) -> list[str]:
    """The imports that lead to a room above, as "file -> file"."""

    def inside(path: Path) -> str:
        root = next(root for root in roots if path.is_relative_to(root))
        return path.relative_to(root).as_posix()

    found = []
    for name, path in known.items():
        for other in dict.fromkeys(imports(name, known)):
            pair = inside(path), inside(known[other])
            if row_of(pair[1], rows) < row_of(pair[0], rows):
                found.append(" -> ".join(pair))
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(modules(PACKAGE, ROOT / "kernels")) == []


def test_rooms_depend_downwards_only() -> None:
    rows = rooms((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    known = modules(PACKAGE, ROOT / "kernels")
    assert upwards(known, (PACKAGE, ROOT), rows) == []
    files = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    named = [name for names in rows for name in names if name != "kernels/"]
    assert [name for name in named if not any(file.startswith(name) for file in files)] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from p.high import top", True),
        ("def f():\n    import p.high.top", True),
        ("if TYPE_CHECKING:\n    from p.high.top import f", True),
        ("from ..high import top", True),
        ("from p.low import other", False),
        ("from . import other", False),
        ("from p import __version__", False),
        ("from p import name", True),
        ("import json", False),
    ],
)
def test_a_wrong_import_is_seen(tmp_path: Path, code: str, found: bool) -> None:
    package = tmp_path / "p"
    for name, text in {
        "__init__.py": "from p.high import top",
        "high/__init__.py": "",
        "high/top.py": "from p.low import leaf",
        "low/__init__.py": "",
        "low/leaf.py": code,
        "low/other.py": "",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    known = modules(package)
    rows = rooms("\n| room | what |\n|---|---|\n| `high/`, `__init__.py` | |\n| `low/` | |\n\n")
    assert bool(circle(known)) == found
    assert bool(upwards(known, [package], rows)) == found


def test_packages_on_the_way_are_imported_too(tmp_path: Path) -> None:
    package = tmp_path / "p"
    for name, text in {
        "__init__.py": "",
        "models/__init__.py": "from p.models import load",
        "models/load.py": "from p.reading import read",
        "models/base.py": "",
        "reading/__init__.py": "",
        "reading/read.py": "from p.models import base",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert set(circle(modules(package))) == {"p.models", "p.models.load", "p.reading.read"}


def test_every_module_has_its_tests() -> None:
    assert untested(PACKAGE, TESTS, project_files()) == []


def test_other_files_are_the_cross_cutting_ones() -> None:
    assert named_after_no_module(PACKAGE, TESTS, project_files()) == set(CROSS_CUTTING)


def test_what_is_missing_is_seen(tmp_path: Path) -> None:
    package, tests = tmp_path / "package", tmp_path / "tests"
    for name, code in {
        "__init__.py": "def f(): ...",
        "constants.py": "x = 1",
        "one.py": "def f(): ...",
        "two.py": "class C: ...",
        "deep/one.py": "def f(): ...",
        "deep/two.py": "def f(): ...",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(code)
    for name in ("test_one.py", "two/test_c.py", "deep/test_two.py", "deep/test_all.py"):
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        (tests / name).touch()
    files = list(tmp_path.rglob("*.py"))
    assert untested(package, tests, files) == ["deep/one.py"]
    assert named_after_no_module(package, tests, files) == {"deep/test_all.py"}


def test_kernels_have_at_most_3000_lines() -> None:
    """A new one has to earn its lines: what loses to PyTorch goes."""
    lines = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "kernels").glob("*.py")}
    assert len(lines) > 10 and sum(lines.values()) <= 3000
