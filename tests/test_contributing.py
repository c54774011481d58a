"""The recipes of CONTRIBUTING.md, followed: each file is written and each command is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from mulki.app.cli import run_command
from mulki.runs.metrics import read_matrix
from tests import ROOT, import_helpers, python, train_helpers

registries = import_helpers.registries
tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model


def recipe(title: str) -> tuple[str, str, list[list[str]]]:
    """File name, code and commands of a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]
    ((name, code),) = re.findall(
        r"^`(\S+\.py)`:\n\n```python\n(.*?)```", section, re.MULTILINE | re.DOTALL
    )
    commands = re.findall(r"^    mulki (.*)$", section, flags=re.MULTILINE)
    return name, code, [shlex.split(command) for command in commands]


@pytest.mark.parametrize(
    ("title", "option", "value", "tasks"),
    [
        ("Add a method", "method", "keep_zero_shot", 6),
        ("Add a gate", "gate", "cautious", 6),
        ("Add a data set", "tasks", ["noise"], 2),
        ("Add a training transform", "augment", "mirror", 6),
    ],
)
def test_a_recipe_works_as_written(
    start_model: dict[str, str], title: str, option: str, value: object, tasks: int
) -> None:
    name, code, commands = recipe(title)
    assert commands
    Path(name).write_text(code, encoding="utf-8")
    # As written, on few images.
    fixed = ["--model", start_model["model"], "--device", "cpu", "--name", "first"]
    fixed += ["--limit-images", "20", "--iterations", "1"]
    for command in commands:
        assert f"./{name}" in command
        with train_helpers.without_figures():
            assert run_command([*command, *(fixed if command[0] == "run" else [])]) == 0
    saved = yaml.safe_load(Path("logs/first/args.yaml").read_text())
    assert saved[option] == value and saved["import"] == [str(Path(name).resolve())]
    assert len(read_matrix("logs/first/matrix.csv").tasks) == tasks


def test_the_smallest_operator_works_as_written(tmp_path: Path) -> None:
    name, code, _ = recipe("Add an operator")
    (tmp_path / name).write_text(code, encoding="utf-8")
    # In a process of its own: a new operator asks for a new build of the C++ kernels.
    tried = """
import energy, torch
from torch.library import opcheck
from mulki.ops.operators import OPERATORS
x, w = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 5))
s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
rows = -(s * x @ w.T).logsumexp(1)
for reduction, want in ("none", rows), ("sum", rows.sum()), ("mean", rows.mean()):
    loss = lambda *leaves: energy.loss(leaves, reduction)
    assert torch.autograd.gradcheck(loss, (x, w, s))
    torch.testing.assert_close(loss(x, w, s), want)
opcheck(torch.ops.mulki.energy.default, (x, w, s, None, "mean", [True] * 3))
try:
    energy.loss((x, w[:, :3], s))
except ValueError as error:
    assert str(error).startswith("prototypes: got shape [5, 3]"), error
else:
    raise AssertionError("taken")
assert "energy" in OPERATORS
"""
    python("-c", tried, cwd=tmp_path, PYTHONPATH=str(ROOT))
