"""Each module of `mulki/` has its tests in the file of its name, and other files are listed."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from tests import ROOT, project_files

PACKAGE, TESTS = ROOT / "mulki", ROOT / "tests"

# Folders that mirror something else than `mulki/`.
OTHER = ("benchmarks", "kernels")

CROSS_CUTTING = {
    "train/test_captions.py": "runs of tasks of captions, from their files to the report",
    "train/test_full_disk.py": "a whole run on a small file system",
    "train/test_killed.py": "whole runs in processes that are killed",
    "train/test_load.py": "runs of many tasks, and of a task with many classes",
    "train/test_reference.py": "runs with a reference set, from its folder to the losses",
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
    "ops/test_reference.py": "the table of operators",
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
