"""docs/environment-variables.md lists every variable that the sources read, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT, project_files

PAGE = ROOT / "docs" / "environment-variables.md"
FOLDERS = ("mulki", "kernels", "csrc", "benchmarks", "examples", ".ci")
FILES = ("setup.py", "tests/kernels/gpu/conftest.py", "tests/ops/conftest.py")
METHODS = ("get", "setdefault", "pop")


def sources(*suffixes: str) -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (p for p in project_files(f"{folder}/**") if p.suffix in suffixes)
    yield from (ROOT / f for f in FILES if Path(f).suffix in suffixes)


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, (ast.Attribute, ast.Name)) and ast.unparse(node) in (
        "os.environ",
        "environ",
    )


def read_by_python(code: str) -> set[str]:
    """Names of variables that Python code reads: each is a string literal at the access itself."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            of = node.func.value
            if (is_environ(of) and node.func.attr in METHODS) or node.func.attr == "getenv":
                found.append(node.args[0])
        elif isinstance(node, ast.Subscript) and is_environ(node.value):
            found.append(node.slice)
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            found.append(node.left)
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp)) and any(
            map(is_environ, ast.walk(node))
        ):
            found += [e for g in node.generators for e in ast.walk(g.iter)]
    return {e.value for e in found if isinstance(e, ast.Constant) and isinstance(e.value, str)}


def read_by_sources() -> set[str]:
    found: set[str] = set()
    for path in sources(".py"):
        found |= read_by_python(path.read_text(encoding="utf-8"))
    for path in sources(".h", ".cpp"):
        found |= set(re.findall(r'getenv\(\s*"(\w+)"', path.read_text(encoding="utf-8")))
    # In shell scripts, a name with a default is one that the caller may set.
    for path in sources(".sh", ""):
        if path.is_file():
            found |= set(re.findall(r"\$\{(\w+):?-", path.read_text(encoding="utf-8")))
    return found


def table() -> dict[str, str]:
    """Who reads it, by variable."""
    rows = re.findall(r"^\| (`.+?`) \|.*?\|.*?\| (.*?) \|", PAGE.read_text(), flags=re.MULTILINE)
    return {name: by for names, by in rows for name in re.findall(r"`(\w+)`", names)}


def test_the_table_has_every_variable_that_the_sources_read_and_no_other() -> None:
    ours = {name for name, by in table().items() if "mulki" in by.split(", ")}
    assert ours == read_by_sources()


def test_variables_of_other_software_are_named_somewhere_in_the_project() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in sources(".py", ".h"))
    text += "\n".join(p.read_text(encoding="utf-8") for p in project_files("tests/**/*.py"))
    assert [name for name in table() if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(
    "code",
    [
        'os.environ.get("ONE", "0")',
        'os.environ["ONE"]',
        'os.getenv("ONE")',
        'os.environ.setdefault("ONE", "1")',
        'if "ONE" not in os.environ: pass',
        'missing = [n for n in ("ONE",) if n not in os.environ]',
    ],
)
def test_every_way_to_read_a_variable_is_seen(code: str) -> None:
    assert read_by_python(code) == {"ONE"}
