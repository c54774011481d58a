"""The recipes of CONTRIBUTING.md, followed: each file is written and each command is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from mulki.cli import run_command
from mulki.metrics import read_matrix
from tests import engine_helpers, import_helpers

registries = import_helpers.registries
tiny_models = engine_helpers.tiny_models
start_model = engine_helpers.start_model
ROOT = Path(__file__).parent.parent


def recipe(title: str) -> tuple[str, str, list[list[str]]]:
    """File name, code and commands of a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]
    ((name, code),) = re.findall(
        r"^`(\S+\.py)`:\n\n```python\n(.*?)```", section, re.MULTILINE | re.DOTALL
    )
    commands = re.findall(r"^    mulki (.*)$", section, flags=re.MULTILINE)
    assert commands
    return name, code, [shlex.split(command) for command in commands]


@pytest.mark.parametrize(
    ("title", "option", "value", "tasks"),
    [
        ("Add a method", "method", "keep_zero_shot", 6),
        ("Add a data set", "tasks", ["noise"], 2),
        ("Add a training transform", "augment", "flip", 6),
    ],
)
def test_a_recipe_works_as_written(
    start_model: dict[str, str], title: str, option: str, value: object, tasks: int
) -> None:
    name, code, commands = recipe(title)
    Path(name).write_text(code, encoding="utf-8")
    fixed = ["--model", start_model["model"], "--device", "cpu", "--name", "first"]
    for command in commands:
        assert f"./{name}" in command
        assert run_command([*command, *(fixed if command[0] == "run" else [])]) == 0
    saved = yaml.safe_load(Path("logs/first/args.yaml").read_text())
    assert saved[option] == value and saved["import"] == [f"./{name}"]
    assert len(read_matrix("logs/first/matrix.csv").tasks) == tasks
