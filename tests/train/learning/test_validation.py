from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mulki import methods
from mulki.clip.evaluation import Evaluator
from mulki.data import Task, folder_task
from mulki.data.subset import held_back
from mulki.errors import InputError
from mulki.train.config.run_config import RunConfig
from mulki.train.learning.validation import validates, with_validation
from tests.train.learn_helpers import CONFIG, Load, learn
from tests.train.run_helpers import Run
from tests.train_helpers import same_state, state_of, write_split


def said(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """Let validations find these accuracies, one after another."""
    left = iter(accuracies)
    monkeypatch.setattr(Evaluator, "accuracy", lambda self, number: (next(left), 10))


def states(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch, found: list[float], **options: Any
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The weights after each step, and those that the task ends with."""
    said(monkeypatch, found)
    student = load_tiny()
    seen: list[dict[str, torch.Tensor]] = []
    config = replace(CONFIG, **options)
    learn(student, task, config=config, hear=lambda report: seen.append(state_of(student)))
    return seen, state_of(student)


@pytest.mark.parametrize(
    ("found", "best"), [([10.0, 30.0, 20.0], 4), ([5.0, 5.0, 5.0], 2), ([0.0, 1.0, 2.0], 6)]
)
def test_the_first_best_step_is_kept(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch, found: list[float], best: int
) -> None:
    seen, last = states(load_tiny, held_back(task, 0.3), monkeypatch, found, val_every=2)
    assert len(seen) == 6 and same_state(last, seen[best - 1])
    others = [place for place, each in enumerate(seen) if same_state(last, each)]
    assert others == [best - 1]


def test_the_last_step_is_always_validated(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        seen, last = states(load_tiny, held_back(task, 0.3), monkeypatch, [1.0, 2.0], val_every=4)
    assert same_state(last, seen[5])
    assert "colours step 4: 1.00 of 10 validation images; best 1.00 at step 4" in caplog.text
    assert "task colours keeps step 6, with 2.00 of its validation images" in caplog.text


def test_it_stops_where_nothing_gets_better(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [1.0, 3.0, 2.0, 3.0]
    options = {"val_every": 1, "early_stopping": 2}
    seen, last = states(load_tiny, held_back(task, 0.3), monkeypatch, found, **options)
    assert len(seen) == 4 and same_state(last, seen[1])


def test_without_validation_nothing_changes(load_tiny: Load, task: Task) -> None:
    student, other = load_tiny(), load_tiny()
    kept = held_back(task, 0.3)
    learn(student, kept, config=replace(CONFIG, val_every=0))
    learn(other, replace(kept, val=None))
    assert same_state(state_of(student), state_of(other))


def test_a_run_learns_from_what_is_not_held_back(run: Run) -> None:
    folder = run(method="finetune", val_fraction=0.5, val_every=2, early_stopping=1)
    log = (folder.path / "out.log").read_text()
    assert "colours step 2: " in log and " of 9 validation images" in log
    assert "task shades keeps step " in log
    plain = run("plain", method="finetune")
    # The same images are tested; which are held back is no matter of the data.
    assert folder.matrix.columns == plain.matrix.columns
    assert "validation" not in (plain.path / "out.log").read_text()


def test_a_folder_brings_its_validation_images(run: Run, task_folders: tuple[str, str]) -> None:
    names = Path(task_folders[0])
    colours = {"red": (220, 40, 40), "blue": (50, 60, 220)}
    write_split(names / "val", colours, 3)
    try:
        task = folder_task(names)
        assert task.val is not None and len(task.val) == 6 and validates(RunConfig(), task)
        assert {task.classes[target] for target in task.val.targets} == {"red", "blue"}
        folder = run(method="finetune", tasks=[str(names)])
        assert " of 6 validation images" in (folder.path / "out.log").read_text()
        with pytest.raises(InputError, match="--val-every: .*zscl .*--we-every 0"):
            run("refused", method="zscl", tasks=[str(names)])
        run("allowed", method="zscl", tasks=[str(names)], val_every=0)
    finally:
        for path in sorted((names / "val").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (names / "val").rmdir()


def test_options_without_images_are_refused(task: Task) -> None:
    finetune = methods.get("finetune")
    method = finetune(finetune.Options())
    for options in ({"early_stopping": 3}, {"val_every": 2}):
        (name,) = options
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')}: got .*--val-fraction"):
            with_validation(RunConfig(**options), method, [task])
    assert with_validation(RunConfig(val_every=0), method, [task]) == [task]
    mulki = methods.get("mulki")
    averaging = mulki(mulki.Options(we_every=10))
    with pytest.raises(InputError, match="method mulki ends a task .*no --val-fraction to do with"):
        with_validation(RunConfig(val_fraction=0.2), averaging, [task])


def test_options_of_validation_that_is_turned_off(task: Task) -> None:
    finetune = methods.get("finetune")
    method = finetune(finetune.Options())
    for options in ({"val_fraction": 0.3, "early_stopping": 3}, {"early_stopping": 3}):
        off = RunConfig(val_every=0, **options)  # type: ignore[arg-type]
        name, value = next(iter(options.items()))
        said = f"^--{name.replace('_', '-')}: got {value}, but --val-every 0 .*leave one of the two"
        with pytest.raises(InputError, match=said):
            with_validation(off, method, [task])
        # A run that goes on has the options of the earlier one.
        assert with_validation(replace(off, continue_="run"), method, [task]) == [task]
