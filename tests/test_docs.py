"""The commands and notebooks of README.md and docs/ do what the pages say.

Blocks of Python are run by `test_readme.py`; here the tutorial is followed, and commands are run on
a tiny model and few images. A command whose comment begins with one of MARKS in brackets is only
checked.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import glob
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import mulki
from mulki import methods
from mulki.app.cli import run_command
from mulki.app.commands.grid import OPTIONS as GRID
from mulki.app.commands.run_options import run_options
from mulki.clip.features import Features
from mulki.clip.prototypes import Prototypes
from mulki.losses import MulKILoss
from mulki.train.config import presets
from mulki.train.config.run_config import resolve
from mulki.train.start.start_model import check_start
from tests import ROOT, import_helpers, project_files, train_helpers
from tests.test_readme import DOCS, name

registries = import_helpers.registries
tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model

MARKS = ("network", "GPU", "long", "machines", "sources")
TUTORIAL = ROOT / "docs" / "tutorial.md"
NOTEBOOKS = project_files("docs/notebooks/*.ipynb")
PROGRAMS = ("mulki", "make", "python", "pip", "pytest", "torchrun", "benchmarks/gpu.sh")
# Of a run: a tiny model, few images and one step.
SMALL = "--device cpu --limit-images 20 --iterations 1 --batch-size-eval 64 --workers 0"


def steps(text: str) -> Iterator[tuple[str, str]]:
    """The code of a page from top to bottom: ("python", a block) or ("command", a line)."""
    for fence, code, line in re.findall(
        r"^```(\w*)\n(.*?)^```$|^ {4}((?:[^\n]*\\\n)*[^\n]*)$", text, re.MULTILINE | re.DOTALL
    ):
        if fence == "python":
            yield "python", code
        elif line:
            yield "command", line.replace("\\\n", " ")


def mark(line: str) -> str | None:
    """Why a command is not run, None if it is."""
    found = re.search(rf" # \[({'|'.join(MARKS)})\]", line)
    return found[1] if found else None


def words_of(line: str) -> list[str]:
    """The words of a command, without variables before it, as a shell has them."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words = words[1:]
    return [file for word in words for file in (sorted(glob.glob(word)) if "*" in word else [word])]


def commands(page: Path) -> list[str]:
    return [code for kind, code in steps(page.read_text(encoding="utf-8")) if kind == "command"]


RUN = [p for p in DOCS if p != TUTORIAL and not all(map(mark, commands(p)))]
CHECKED = [p for p in DOCS if any(map(mark, commands(p)))]


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
    measured = (ROOT / "benchmarks" / "ops" / "cpu.csv").read_text(encoding="utf-8")
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
        if not mark(line):
            run(line, start_model, number, capsys)
    for made in set(Path("logs").iterdir()) - before:
        shutil.rmtree(made)


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
    blocks = [
        code for kind, code in steps((ROOT / "docs" / "python.md").read_text()) if kind == "python"
    ]
    shared: dict[str, Any] = {}
    with train_helpers.without_figures():
        for code in blocks:
            exec(code, shared)
    out = capsys.readouterr().out
    assert out.startswith("cat.png ") and "('animals', 'digits')" in out
    assert shared["later"].path == Path("logs/digits")


def test_the_tutorial_works_as_written(
    start_model: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    for number, (kind, code) in enumerate(steps(TUTORIAL.read_text(encoding="utf-8"))):
        if kind == "python":
            exec(code, names)
        elif not mark(code):
            run(code, start_model, number, capsys)
    assert names["model"].visual.image_size in (32, (32, 32))  # the tiny model, trained
    assert capsys.readouterr().out.strip() in names["names"]


def test_the_tutorial_reads_the_run_that_it_tells_to_make() -> None:
    made: dict[str, bool] = {}
    for kind, code in steps(TUTORIAL.read_text(encoding="utf-8")):
        words = words_of(code) if kind == "command" else []
        if words[:2] == ["mulki", "run"] and "--name" in words:
            made[words[words.index("--name") + 1]] = "--preset" not in words
        for run_name in re.findall(r"logs/(\w+)", code):
            assert made[run_name], f"{code}: of a run whose figures mean nothing, or of none"
    assert sum(made.values()) == 2


def test_every_indented_line_is_a_command() -> None:
    found = [line for page in DOCS for line in commands(page)]
    assert [line for line in found if words_of(line)[0] not in PROGRAMS] == []


@pytest.mark.parametrize("page", CHECKED, ids=name)
def test_a_command_that_is_not_run_has_options_that_exist(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    for line in filter(mark, commands(page)):
        words = words_of(line)
        if "--" in words:
            words = ["mulki", *words[words.index("--") + 1 :]]
        if "--continue" in words:
            # Its run is not here, so the options are checked without it and what goes with it.
            words = [*words[: words.index("--continue")], *words[words.index("--continue") + 2 :]]
            words = words[: words.index("--test-tasks")] if "--test-tasks" in words else words
        if words[:2] in (["mulki", "run"], ["mulki", "plan"]):
            given, _ = run_options(words[2:], words[1])
            for of_a_plan in ("json", "card_gb"):
                given.pop(of_a_plan, None)
            of_run = {option: value for option, value in given.items() if option not in GRID}
            check_start(resolve(of_run).run)
        elif words[1:2] == ["-m"] and words[2].startswith("benchmarks."):
            # That of the operators has its code inside the package.
            inside = words[2].replace("benchmarks.ops", "mulki.bench").replace(".", "/")
            files = [*ROOT.glob(f"{inside}/*.py"), *ROOT.glob(f"{inside}.py")]
            sources = "".join(file.read_text(encoding="utf-8") for file in files)
            for word in words[3:]:
                option = word.removeprefix("--").replace("-", "_")
                assert not word.startswith("--") or re.search(rf"\b{option}\b", sources), line
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line


def test_the_marks_are_those_that_the_overview_explains() -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `\[(\w+)\]` \|", page, re.MULTILINE)) == MARKS


def test_the_first_run_is_exported_to_what_has_its_model() -> None:
    # The bundled model, with which `logs/first` of the tutorial begins, is none of transformers'.
    lines = [line for page in DOCS for line in commands(page) if line.startswith("mulki export")]
    formats = {words[words.index("--to") + 1] for words in map(words_of, lines)}
    assert formats == {"onnx", "huggingface"}
    assert not [line for line in lines if "logs/first " in line and "huggingface" in line]


def test_marks_and_blocks_are_found() -> None:
    page = (
        "    mulki run x  # [long] minutes\n\n```python\nif x:\n    y\n```\n\n    a \\\n        b\n"
    )
    assert list(steps(page)) == [
        ("command", "mulki run x  # [long] minutes"),
        ("python", "if x:\n    y\n"),
        ("command", "a          b"),
    ]
    assert mark("mulki run x  # [long] minutes") == "long"
    assert mark("mulki run long:x  # a long run") is None


def test_the_needs_of_the_methods_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "choosing-a-method.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    teachers = {"zero_shot": "the original model", "previous": "the previous one"}
    assert sorted(row[0] for row in said) == list(methods.available())
    for method, by, beside in said:
        cls = methods.get(method)
        needs = cls(cls.Options()).needs
        if len(needs.teachers) == 2:
            assert by == " and ".join(teachers[each] for each in needs.teachers)
        else:
            alone = {(): "none", ("zero_shot",): "the original model"}
            assert by == alone.get(needs.teachers, "the previous model")
        wanted = " and ".join(needs.uses) or "nothing"
        assert beside.split(";")[0] == wanted, method
    without = methods.get("mulki")
    assert without(without.Options(anchors="none", hold_on="task")).needs.uses == ()


def literals() -> Iterator[str]:
    """Every text of the package, with … for what is computed."""
    for file in project_files("mulki/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_of_the_troubleshooting_page_are_ours() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE)
    texts = set(literals())
    assert len(messages) > 30
    for message in messages:
        fixed = [re.escape(part.strip()) for part in message.split("…") if part.strip(" .;:()")]
        assert any(re.search(".*".join(fixed), text, re.DOTALL) for text in texts), message


@pytest.mark.parametrize("documented", [Features, Prototypes, MulKILoss])
def test_the_example_of_a_docstring_runs(documented: type) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(documented)
    assert example.examples
    assert not doctest.DocTestRunner().run(example).failed


def test_the_notebooks_have_no_results_in_them() -> None:
    assert NOTEBOOKS
    for file in NOTEBOOKS:
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, file.name


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(
    file: Path, start_model: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.QUICK, "model", start_model["model"])
    monkeypatch.chdir(tmp_path)
    # What a cell shows.
    monkeypatch.setattr(sys, "displayhook", repr)
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    shared: dict[str, Any] = {}
    with train_helpers.without_figures():
        for cell in cells:
            if cell["cell_type"] == "code":
                statements = ast.parse("".join(cell["source"])).body
                exec(compile(ast.Interactive(statements), file.name, "single"), shared)


def pages_in(nav: Any) -> Sequence[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages_in(entry)]


def test_the_site_has_every_page() -> None:
    class Loader(yaml.SafeLoader):
        """Passes over the tags of Python objects."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    found = pages_in(site["nav"])
    docs = [*project_files("docs/**/*.md"), *(book.with_suffix(".md") for book in NOTEBOOKS)]
    assert sorted(found) == sorted({"README.md", "CONTRIBUTING.md", *(map(name, docs))})


def test_ci_builds_the_site_and_takes_no_warning() -> None:
    recipe = "NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict"
    assert recipe in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make docs" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_options_are_not_broken_at_their_hyphens() -> None:
    pytest.importorskip("mkdocs")
    unbroken = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["unbroken"]
    assert unbroken("<code>--name</code>, <code>a b</code>") == (
        '<code class="whole">--name</code>, <code>a b</code>'
    )
    assert "code.whole" in (ROOT / "docs" / "extra.css").read_text(encoding="utf-8")
    long = f"<code>{'x' * 40}</code>"
    assert unbroken(long) == long


def test_what_a_page_would_fetch_from_elsewhere_is_seen() -> None:
    pytest.importorskip("mkdocs")
    seen = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["from_elsewhere"]
    assert seen('<a href="https://x.org">x</a><script src="a.js"></script>') == []
    assert seen('<link rel="stylesheet" href="https://x.org/a.css">') == ["https://x.org/a.css"]
    assert seen('<script defer src="//x.org/a.js">') == ["//x.org/a.js"]


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_the_site_has_formulas_as_mathml(page: Path) -> None:
    mkdocs = pytest.importorskip("mkdocs.config")
    markdown = pytest.importorskip("markdown").markdown
    site = mkdocs.load_config(str(ROOT / "mkdocs.yml"))
    typeset = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["typeset"]
    source = page.read_text(encoding="utf-8")
    html = typeset(
        markdown(source, extensions=site.markdown_extensions, extension_configs=site.mdx_configs)
    )
    prose = re.sub(r"<code.*?</code>", "", html, flags=re.DOTALL)
    assert "$" not in prose and "arithmatex" not in html
    blocks = re.findall(r"^```math$", source, re.MULTILINE)
    words = re.sub(r"```.*?```|`[^`]*`", "", source, flags=re.DOTALL)
    assert html.count('display="block"') == len(blocks)
    assert html.count("<math") == len(blocks) + len(re.findall(r"\$[^$]+\$", words))


def test_a_formula_that_has_no_mathml_stops_the_build() -> None:
    errors = pytest.importorskip("mkdocs.exceptions")
    typeset = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["typeset"]
    assert typeset('<span class="arithmatex">\\(a &lt; b\\)</span>').count("<mi>") == 2
    with pytest.raises(errors.PluginError, match="unknown"):
        typeset('<span class="arithmatex">\\(\\unknown a\\)</span>')
