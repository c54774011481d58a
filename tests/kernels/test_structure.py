"""What the kernels' source is held to."""

from __future__ import annotations

import ast

import pytest

from tests import project_files

KERNELS = [
    (path.stem, function)
    for path in project_files("kernels/*.py")
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(function, ast.FunctionDef)
    and any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
]


@pytest.mark.parametrize(
    "function", [pytest.param(function, id=f"{file} {function.name}") for file, function in KERNELS]
)
def test_a_kernel_has_few_parameters(function):
    """Pointers and floats lie in tuples, and what is compiled in lies in frozen dataclasses."""
    assert len(function.args.args) <= 20 and not function.args.kwonlyargs


def test_every_kernel_is_looked_at():
    assert {"whole_rows", "stored_rows", "scaled_product", "row_loss"} <= {
        function.name for _, function in KERNELS
    }
