"""The run folder of a report, and what a reader needs of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mulki.runs.answers import Answers, BoolArray, Ranks
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import ZERO_SHOT
from tests.report.report_helpers import PAIR, SMALL, Make, empty_figures, write_whole_run

__all__ = ["empty_figures"]


@pytest.fixture(scope="session")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def whole(written_once: Path, tmp_path: Path) -> Path:
    """A whole run, which a test may damage."""
    return Path(shutil.copytree(written_once, tmp_path / "whole"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunFolder.create(
        tmp_path,
        "first",
        method="mulki",
        order="II",
        seed=4,
        columns=SMALL.columns,
        config={"prompt": "a photo of a <b>{}</b>"},
        hashes={"weights": "0123abcd", "splits": {"digits": "4567"}, "prompts": None},
    )
    for name, n in zip(SMALL.columns, (300, 400, 500), strict=True):
        run.record(ZERO_SHOT, name, {"acc1": (1.0, n)}, seconds=1.0, step=0)
    for after, row in [
        (ZERO_SHOT, SMALL.zero_shot or ()),
        *zip(SMALL.tasks, SMALL.rows, strict=True),
    ]:
        run.add_row(after, dict(zip(SMALL.columns, row, strict=True)))
    run.finish()
    return run.path


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run folder with drawn answers; `share` of them are right."""

    def ranks(own: BoolArray) -> Ranks:
        return Ranks((~own).astype(np.int32), (~own).astype(np.int32))

    def make(
        name: str,
        method: str = "mulki",
        seed: int = 0,
        share: float = 0.5,
        tasks: tuple[str, ...] = PAIR,
        ends: bool = True,
        learns: bool = True,
        hashes: dict[str, Any] | None = None,
        images: int = 200,
        uses: tuple[str, ...] = (),
        captions: tuple[str, ...] = (),
        **options: Any,
    ) -> Path:
        config = {"tasks": ["zoo"], "order": "I", "seed": seed, "method": method, "name": name}
        run = RunFolder.create(
            tmp_path,
            name,
            method=method,
            order="I",
            seed=seed,
            columns=tasks,
            config=config | options,
            hashes=hashes or {"weights": "w", "tasks": dict.fromkeys(tasks, "t")},
            uses=uses,
        )
        random = np.random.default_rng([seed, len(method)])
        own = {}
        for learned, after in enumerate((ZERO_SHOT, *tasks) if ends else (ZERO_SHOT, tasks[0])):
            if learns or not own:
                own = {task: random.random(images) < share for task in tasks}
            row = {
                task: Answers(
                    own[task],
                    own[task] if i < learned and task not in captions else None,
                    ranks=ranks(own[task]) if task in captions else None,
                )
                for i, task in enumerate(tasks)
            }
            run.add_answers(after, row, seconds=dict.fromkeys(tasks, 1.0), step=learned)
        run.finish("complete" if ends else "interrupted")
        return run.path

    return make
