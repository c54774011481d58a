"""What the README and the documentation show must exist, and their Python must run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mulki import methods
from mulki.app import cli
from mulki.losses import ClipLoss
from tests import ROOT, project_files

DOCS = (ROOT / "README.md", *project_files("docs/*.md"))
# Their links are followed too; what they name is history, or a matter of their own folder.
LINKING = (
    *DOCS,
    *project_files("docs/api/*.md"),
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "examples" / "README.md",
    *project_files("benchmarks/*.md"),
)
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in DOCS
    if page.stem not in ("tutorial", "python")  # whose blocks belong together, see test_docs.py
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
N, P = 6, 6


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def rows(count: int, width: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width), dim=1)


class TwoTowers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(5, 8), torch.nn.Linear(6, 8)

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        image_features, text_features = (
            F.normalize(tower(x), dim=1) for tower, x in ((self.image, images), (self.text, texts))
        )
        return {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": torch.tensor(10.0),
        }


def names() -> dict[str, Any]:
    """What the blocks take from the program around them."""
    from mulki import Similarity

    model = TwoTowers()
    return {
        "rank": 0,
        "world_size": 1,
        "loss": ClipLoss(),
        "model": model,
        "images": torch.randn(100, 5),
        "texts": torch.randn(100, 6),
        "image_tower": lambda images: F.normalize(model.image(images), dim=1),
        "text_tower": lambda texts: F.normalize(model.text(texts), dim=1),
        "class_texts": torch.randn(P, 6),
        "labels": torch.arange(100) % P,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "image_features": rows(N, 16).requires_grad_(),
        "text_features": rows(P, 16).requires_grad_(),
        "logit_scale": torch.tensor(20.0),
        "target": torch.arange(N) % P,
        "student": Similarity(rows(N, 16), rows(P, 16), 20.0),
        "zs_images": rows(N, 16),
        "zs_texts": rows(P, 16),
        "zs_scale": torch.tensor(30.0),
        "prev_images": rows(N, 16),
        "prev_texts": rows(P, 16),
        "prev_scale": 10.0,
    }


def block(words: str) -> str:
    """The one block of code with these words."""
    (found,) = (str(param.values[0]) for param in BLOCKS if words in str(param.values[0]))
    return found


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_of_python_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import open_clip

    # A run folder is made by the tests of tests/train, which load its model by this very call.
    loaded: list[str] = []
    monkeypatch.setattr(open_clip, "create_model", loaded.append)
    exec(code, names() | {"run_folder": tmp_path})
    assert loaded == (
        [f"local-dir:{tmp_path / 'checkpoints' / 'latest'}"] if "create_model" in code else []
    )


def test_the_losses_in_place_of_open_clips_reach_the_model() -> None:
    found = names()
    exec(block('# {"contrastive_loss"'), found)
    weight = found["model"].image.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_the_example_of_micro_batches_is_a_step_on_the_whole_batch() -> None:
    ours, whole = names(), TwoTowers()
    exec(block("(model, images, texts)"), ours)
    ClipLoss()(**whole(ours["images"], ours["texts"])).backward()
    torch.optim.SGD(whole.parameters(), lr=0.1).step()
    for parameter, wanted in zip(ours["model"].parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)


@pytest.mark.parametrize("words", ["dual_teacher_kl", "objective = MulKILoss("])
def test_the_loss_examples_reach_the_student(words: str) -> None:
    found = names()
    # The function takes teachers of other widths.
    if words == "dual_teacher_kl":
        found |= {"zs_images": rows(N, 24), "zs_texts": rows(P, 24)}
        found |= {"prev_images": rows(N, 8), "prev_texts": rows(P, 8)}
    exec(block(words), found)
    if words == "dual_teacher_kl":
        found["loss"].backward()
    gradient = found["image_features"].grad
    assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_the_documented_methods_are_those_there_are() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    section = text[text.index("## Methods") : text.index("### The stages of MulKI")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == list(methods.available())


def test_the_documented_gates_and_functions_are_those_there_are() -> None:
    from mulki import functional
    from mulki.ops.gates import gate_names

    text = (ROOT / "docs" / "losses.md").read_text()
    gates = re.findall(r'^\| `"(\w+)"` \|', text, re.MULTILINE)
    assert sorted(gates) == sorted(gate_names())
    for function in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE):
        assert callable(getattr(functional, function))


def anchors(page: Path) -> set[str]:
    """What a link into a page may name, as GitHub makes it from the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


def test_the_index_has_every_page() -> None:
    pages = {page.name for page in DOCS[1:]} - {"index.md"}
    assert pages <= set(re.findall(r"\]\((\S+?)\)", (ROOT / "docs" / "index.md").read_text()))


def quoted(page: Path) -> list[str]:
    """Text between backticks, outside Python blocks."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    top = {path.relative_to(ROOT).parts[0] for path in project_files()}
    for words in quoted(page):
        path = words.split()[0]
        made = path.startswith("build/")  # by make
        if "/" in path and path.split("/")[0] in top and not made and not set(path) & set("<>*{}"):
            assert (ROOT / path).exists(), path


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page: indented lines, and quoted ones, without their comments."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    lines += quoted(page)
    starts = ("mulki ", "make ", "python -m ", "python setup.py ", "torchrun ", "benchmarks/")
    lines = [line.partition(" #")[0] for line in lines]
    return [shlex.split(line) for line in lines if line.startswith(starts)]


@functools.cache
def our_commands() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        cli.run_command(["--help"])
    return re.findall(r"^  (\w+) ", shown.getvalue(), re.MULTILINE)


@functools.cache
def known_options(command: str) -> set[str]:
    """The options that the help of a command shows."""
    given = [["--help"]]
    if command in ("run", "plan"):
        given += [["--help-all", "--method", method] for method in methods.available()]
    if command == "bench":
        given += [["plot", "--help"]]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        for each in given:
            with contextlib.suppress(SystemExit):  # argparse's own end
                cli.run_command([command, *each])
    lines = re.findall(r"^ +(?:-\w(?: \w+)?, )?(--\w.*)$", shown.getvalue(), re.MULTILINE)
    return {word for line in lines for word in re.findall(r"(?:^|, )(--[\w-]+)", line)}


def test_an_option_that_a_help_only_mentions_is_none() -> None:
    assert "--resume" in known_options("run") - known_options("plan")
    assert {"--classes", "--no-head"} <= known_options("predict")
    assert "--model" not in known_options("predict")


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_every_command_exists(page: Path) -> None:
    ours = our_commands()
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        words = line[line.index("-m") + 1 :] if "-m" in line else line
        assert words is line or importlib.util.find_spec(words[0]) is not None, words
        if words[0] == "mulki":
            after = [word for word in words[1:] if word != "--"]
            assert after[0] in ours, words
            given = {word.partition("=")[0] for word in after if word.startswith("--")}
            assert given <= known_options(after[0]), words
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0].startswith("benchmarks/"):
            assert (ROOT / words[0]).exists(), words


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_every_quoted_option_exists(page: Path) -> None:
    known = set().union(*map(known_options, our_commands()))
    for words in quoted(page):
        option = words.split()[0].partition("=")[0].rstrip(":")
        if option.startswith("--") and option != "--":
            assert option in known, words
