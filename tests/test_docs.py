"""What the pages show is run: their Python, their commands, the tutorial and the notebooks.

Commands run on a tiny model and few images. One whose comment begins with one of MARKS in brackets
is not run; of those of `mulki run` and `mulki plan` the options are checked.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import glob
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

import mulki
from mulki import Similarity
from mulki.app.cli import run_command
from mulki.app.commands.grid import OPTIONS as GRID
from mulki.app.commands.run_options import run_options
from mulki.clip.features import Features
from mulki.clip.prototypes import Prototypes
from mulki.losses import ClipLoss, MulKILoss
from mulki.train.config import presets
from mulki.train.config.run_config import resolve
from mulki.train.start.start_model import check_start
from tests import ROOT, import_helpers, project_files, train_helpers

registries = import_helpers.registries
tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model

MARKS = ("network", "GPU", "long", "machines", "sources")
DOCS = (ROOT / "README.md", *project_files("docs/*.md"))
TUTORIAL, PYTHON = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "python.md"
NOTEBOOKS = project_files("docs/notebooks/*.ipynb")
LINKING = (
    *DOCS,
    *project_files("docs/api/*.md", "benchmarks/*.md"),
    *(ROOT / file for file in ("CONTRIBUTING.md", "SECURITY.md", "examples/README.md")),
)
# Of a run: a tiny model, few images and one step.
SMALL = "--device cpu --limit-images 20 --iterations 1 --batch-size-eval 64 --workers 0"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """The code of a page from top to bottom: ("python", a block) or ("command", a line)."""
    for fence, code, line in re.findall(
        r"^```(\w*)\n(.*?)^```$|^ {4}((?:[^\n]*\\\n)*[^\n]*)$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    ):
        if fence == "python":
            yield "python", code
        elif line:
            yield "command", line.replace("\\\n", " ")


def marked(line: str) -> bool:
    return re.search(rf" # \[({'|'.join(MARKS)})\]", line) is not None


def commands(page: Path) -> list[str]:
    return [code for kind, code in steps(page) if kind == "command"]


BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in DOCS
    if page not in (TUTORIAL, PYTHON)  # whose blocks belong together
    for number, code in enumerate(code for kind, code in steps(page) if kind == "python")
]
RUN = [page for page in DOCS if page != TUTORIAL and not all(map(marked, commands(page)))]


def rows(count: int, width: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width), dim=1)


class TwoTowers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(5, 8), torch.nn.Linear(6, 8)

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "image_features": F.normalize(self.image(images), dim=1),
            "text_features": F.normalize(self.text(texts), dim=1),
            "logit_scale": torch.tensor(10.0),
        }


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_of_python_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import open_clip

    # A run folder is made by the tests of tests/train, which load its model by this very call.
    loaded: list[str] = []
    monkeypatch.setattr(open_clip, "create_model", loaded.append)
    model = TwoTowers()
    # What the blocks take from the program around them.
    around = {
        "rank": 0,
        "world_size": 1,
        "run_folder": tmp_path,
        "loss": ClipLoss(),
        "model": model,
        "images": torch.randn(100, 5),
        "texts": torch.randn(100, 6),
        "image_tower": lambda images: F.normalize(model.image(images), dim=1),
        "text_tower": lambda texts: F.normalize(model.text(texts), dim=1),
        "class_texts": torch.randn(6, 6),
        "labels": torch.arange(100) % 6,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "image_features": rows(6, 16).requires_grad_(),
        "text_features": rows(6, 16).requires_grad_(),
        "logit_scale": torch.tensor(20.0),
        "target": torch.arange(6),
        "student": Similarity(rows(6, 16), rows(6, 16), 20.0),
        "zs_images": rows(6, 16),
        "zs_texts": rows(6, 16),
        "zs_scale": torch.tensor(30.0),
        "prev_images": rows(6, 16),
        "prev_texts": rows(6, 16),
        "prev_scale": 10.0,
    }
    exec(code, around)
    assert loaded == (
        [f"local-dir:{tmp_path / 'checkpoints' / 'latest'}"] if "create_model" in code else []
    )


def anchors(page: Path) -> set[str]:
    """What a link into a page may name, as GitHub makes it from the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.exists(), link
            assert not anchor or anchor in anchors(to), link


def words_of(line: str) -> list[str]:
    """The words of a command, as a shell has them."""
    words = shlex.split(line, comments=True)
    return [file for word in words for file in (sorted(glob.glob(word)) if "*" in word else [word])]


def run(line: str, model: dict[str, str], number: int, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = words_of(line)
    if (program, *words) == ("python", "-m", "mulki.info"):
        assert "operators" in str(mulki.info())
        return
    assert program == "mulki", f"{line}: a test runs mulki alone; mark the command"
    if words[0] in ("run", "plan") and not {"--resume", "--help"} & set(words):
        given = [] if {"--name", "plan"} & set(words) else ["--name", f"run-{number}"]
        words += [*given, "--model", model["model"], *SMALL.split()]
    if words == ["doctor"]:
        words += ["--seconds", "0"]
    runs = words[0] == "run"
    try:
        with train_helpers.without_figures() if runs else contextlib.nullcontext():
            status = run_command(words)
    except SystemExit as ended:  # --help
        status = ended.code
    printed = capsys.readouterr()
    # A machine may have problems that a doctor finds.
    assert status == 0 or words[0] == "doctor", printed.err
    assert printed.out


@pytest.fixture(scope="module")
def workplace(start_model: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take to be there: images, a CSV file, two runs, a configuration."""
    root = tmp_path_factory.mktemp("workplace")
    for task in ("birds", "textures"):
        train_helpers.write_task(root / task, train_helpers.COLOURS)
    rows = [
        f"{p.relative_to(root)},{p.parent.name},{p.parts[-3]}"
        for p in (root / "birds").rglob("*.png")
    ]
    (root / "birds.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    for kind in ("flags", "animals"):
        train_helpers.write_pairs(root, kind, 8)
    measured = (ROOT / "benchmarks" / "ops" / "cpu-zen5.csv").read_text(encoding="utf-8")
    head, *rows = measured.splitlines(keepends=True)
    both = [row for row in rows if ",both," in row]
    (root / "ops.csv").write_text(head + "".join(both[:30]))
    for run_name, method in (("first", "mulki"), ("plain", "finetune")):
        told = ["--tasks", str(root / "birds"), str(root / "textures"), "--method", method]
        told += ["--logs", str(root / "logs"), "--name", run_name, "--model", start_model["model"]]
        with train_helpers.without_figures():
            assert run_command(["run", *told, *SMALL.split()]) == 0
    shutil.copy(root / "logs" / "first" / "matrix.csv", root)
    settings = yaml.safe_load((root / "logs" / "first" / "args.yaml").read_text())
    kept = {key: settings[key] for key in ("tasks", "method", "lr")}
    (root / "args.yaml").write_text(yaml.safe_dump(kept))
    return root


@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_commands_of_a_page_run(
    page: Path,
    start_model: dict[str, str],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    before = set(Path("logs").iterdir())
    for number, line in enumerate(commands(page)):
        if not marked(line):
            run(line, start_model, number, capsys)
    for made in set(Path("logs").iterdir()) - before:
        shutil.rmtree(made)


def test_a_run_that_is_not_run_has_options_that_exist(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    lines = [line for page in DOCS for line in commands(page) if marked(line)]
    checked = 0
    for words in map(words_of, lines):
        if "--" in words:  # of torchrun
            words = ["mulki", *words[words.index("--") + 1 :]]
        # The run that another continues is not here.
        if words[:2] not in (["mulki", "run"], ["mulki", "plan"]) or "--continue" in words:
            continue
        given, _ = run_options(words[2:], words[1])
        of_run = {name: of for name, of in given.items() if name not in (*GRID, "json", "card_gb")}
        check_start(resolve(of_run).run)
        checked += 1
    assert checked


@pytest.mark.slow
def test_the_page_on_python_works_as_written(
    tmp_path: Path,
    start_model: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"iterations": 1, "batch_size": 4, "limit_images": 12, "model": start_model["model"]}
    monkeypatch.setattr("mulki.train.config.presets.QUICK", small)
    Image.new("RGB", (64, 64)).save("cat.png")
    shared: dict[str, Any] = {}
    with train_helpers.without_figures():
        for code in (code for kind, code in steps(PYTHON) if kind == "python"):
            exec(code, shared)
    out = capsys.readouterr().out
    assert out.startswith("cat.png ") and "('animals', 'digits')" in out
    assert shared["later"].path == Path("logs/digits")


def test_the_tutorial_works_as_written(
    start_model: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    for number, (kind, code) in enumerate(steps(TUTORIAL)):
        if kind == "python":
            exec(code, names)
        elif not marked(code):
            run(code, start_model, number, capsys)
    assert names["model"].visual.image_size in (32, (32, 32))  # the tiny model, trained
    assert capsys.readouterr().out.strip() in names["names"]


@pytest.mark.parametrize("documented", [Features, Prototypes, MulKILoss])
def test_the_example_of_a_docstring_runs(documented: type) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(documented)
    assert example.examples
    assert not doctest.DocTestRunner().run(example).failed


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(
    file: Path, start_model: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.QUICK, "model", start_model["model"])
    monkeypatch.chdir(tmp_path)
    # What a cell shows.
    monkeypatch.setattr(sys, "displayhook", repr)
    shared: dict[str, Any] = {}
    with train_helpers.without_figures():
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                statements = ast.parse("".join(cell["source"])).body
                exec(compile(ast.Interactive(statements), file.name, "single"), shared)
