"""A small matrix with what reports find hard, and a run folder with all that a run writes."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mulki.report.comparison.compare import Comparison
from mulki.report.comparison.tables import print_comparison
from mulki.report.plot import Plot
from mulki.runs.answers import Answers
from mulki.runs.folder import RunFolder
from mulki.runs.history import BINS, StepRecord, add_step
from mulki.runs.metrics import ZERO_SHOT, AccuracyMatrix

#: Makes a run folder, see `tests.report.conftest.make`.
Make = Callable[..., Path]
#: Its tasks.
PAIR = ("a", "b")

# Columns are neither in the order learned nor all learned, and one name is hostile.
SMALL = AccuracyMatrix(
    columns=("digits", "a|b <i>[red]", "letters"),
    tasks=("letters", "digits"),
    rows=((1.0, 2.0, 3.0), (100.0, 50.0, 6.0)),
    zero_shot=(4.0, 5.0, 7.0),
)

HOSTILE = '<script>alert(1)</script> $x^2$ & "quoted" \''
TASKS = ("digits", HOSTILE, "flags")
CLASSES = {
    "digits": ("zero", "one"),
    HOSTILE: ("<img src=x onerror=alert(2)>", "plain", "=1+1"),
    "flags": ("left", "right"),
}


VOID = ("meta", "img", "br", "wbr")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.fixture(autouse=True)
def empty_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw them takes most of the time of a page; what is marked drawn is about them."""
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr(Plot, "svg", lambda plot: '<svg aria-hidden="true"></svg>')


class Page(HTMLParser):
    """The text of each table cell and card, the attributes seen, and whether tags were closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.cards: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("dt", "dd"):
            self.cards.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("dt", "dd"):
            self.cards[-1] += data


def check_headings(text: str) -> None:
    """One h1, no level left out, and each table in a region of its own name that keys reach."""
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", text)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels
    regions = re.findall(r'tabindex="0" role="region" aria-label="[^"]+">\s*<table', text)
    assert len(regions) == text.count("<table")


def said_in_browser(page: str, ask: str, folder: Path, width: int) -> dict[str, Any]:
    """What a script in the page has put into `said`, with `errors`, how many there were."""
    watch = "<script>const errors = []; onerror = (m) => errors.push(m);</script>"
    asked = (
        f"<script>const said = {{}};{ask}said.errors = errors.length;"
        "document.title = JSON.stringify(said);</script>"
    )
    page = page.replace("<body>", "<body>" + watch).replace("</body>", asked + "</body>")
    (folder / "asked.html").write_text(page)
    command = [
        str(BROWSER),
        *("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr"),
        f"--window-size={width},900",
        f"--user-data-dir={folder / 'profile'}",
        (folder / "asked.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    return json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def _right_throughout(answers: Answers) -> Answers:
    seen = None if answers.seen is None else np.ones_like(answers.seen)
    return Answers(np.ones_like(answers.own), seen, answers.said)


def write_whole_run(
    logs: Path,
    *,
    images: int = 12,
    steps: int = 6,
    name: str = "whole",
    seed: int = 1,
    method: str = "mulki",
    note: str = HOSTILE,
    head: bool = False,
) -> Path:
    """A complete run folder with everything that a run writes and a report reads.

    Args:
        head: whether its models have a head of class statistics, which is right throughout.
    """
    config = {"method": method, "model": "mulki-mini", "seed": seed, "note": note}
    run = RunFolder.create(
        logs,
        name,
        method=method,
        order="I",
        seed=seed,
        columns=TASKS,
        config=config | {"tasks": ["zoo"], "order": "I"},
        hashes={"weights": "0123abcd" * 8, "splits": dict.fromkeys(TASKS, "4567")},
    )
    sets = [
        {
            "name": name,
            "classes": CLASSES[name],
            "targets": [place % len(CLASSES[name]) for place in range(images)],
            "train": 30,
        }
        for name in TASKS
    ]
    (run.path / "tasks.json").write_text(json.dumps({"tasks": sets}))
    for index, name in enumerate(TASKS):
        for step in range(1, steps + 1):
            add_step(run.path, record(name, index, step, steps))
    random = np.random.default_rng(seed - 1)
    for learned, after in enumerate((ZERO_SHOT, *TASKS)):
        row = {
            name: Answers(
                random.random(images) < 0.4 + 0.1 * learned,
                random.random(images) < 0.5 if place < learned else None,
                np.zeros(images, dtype=np.int32),
            )
            for place, name in enumerate(TASKS)
        }
        if head and learned:
            row = {name: replace(each, head=_right_throughout(each)) for name, each in row.items()}
        run.add_answers(after, row, seconds=dict.fromkeys(TASKS, 1.5), step=steps * learned)
    image = base64.b64encode(b"RIFF").decode()
    (run.path / "examples.json").write_text(
        json.dumps(
            {
                "after_task": TASKS[-1],
                "examples": [
                    {"data_set": HOSTILE, "kind": kind, "target": CLASSES[HOSTILE][0],
                     "before": "zero", "after": None, "image": image}
                    for kind in ("gained", "lost")
                ],
            }
        )
    )  # fmt: skip
    run.finish()
    run.release()
    return run.path


def record(task: str, index: int, step: int, steps: int) -> StepRecord:
    half = BINS // 2
    return StepRecord(
        task=task,
        index=index,
        step=step,
        steps=steps,
        total=steps * index + step,
        losses={"ce_loss": 2.0 / step, "text_text_loss": 0.0},
        lr=1e-3,
        images_per_second=100.0 + step,
        seconds={"loading": 0.01, "gradients": 0.2, "update": 0.02, "rest": 0.001},
        memory_mib=500.0,
        teacher_weights={
            "zero_shot": [0] * half + [8] + [0] * (BINS - half - 1),
            "previous": [0] * (half - 1) + [8] + [0] * (BINS - half),
        },
        prototype_drift={"mean": 0.01 * step, "max": 0.03 * step},
        prepared=4.25 if step == 1 else None,
    )


def printed(comparison: Comparison) -> str:
    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream), width=200)
    return stream.getvalue()
