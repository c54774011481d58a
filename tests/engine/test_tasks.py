from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mulki.engine.config import resolve
from mulki.engine.tasks import load_tasks, warn_of_twins
from mulki.errors import InputError
from tests.engine_helpers import write_task


def test_few_shots_of_a_task_class_by_class(tmp_path: Path) -> None:
    shades = {name: (32 * i, 32 * i, 32 * i) for i, name in enumerate("abcdef")}
    folder = str(write_task(tmp_path / "shades", shades))
    options = {"scenario": "cil", "increments": "2", "base_classes": "2", "shots": "2"}
    config = resolve({"tasks": [folder], "seed": 5, **options}).run
    tasks = load_tasks(config)
    assert [task.name for task in tasks] == ["shades-1", "shades-2", "shades-3"]
    for task in tasks:
        assert sorted(task.train.targets) == [0, 0, 1, 1]
    again = load_tasks(config)
    assert [t.fingerprint() for t in tasks] == [t.fingerprint() for t in again]
    with pytest.raises(InputError, match="--scenario cil: got 2 tasks, wanted the one"):
        load_tasks(replace(config, tasks=(folder, "embedded:digits")))


def test_rates_belong_to_tasks_or_published_data_sets(task_folders: tuple[str, str]) -> None:
    config = resolve({"tasks": task_folders, "lr_of": ["colours=1", "mnist=1"]}).run
    assert len(load_tasks(config)) == 2
    with pytest.raises(InputError, match='--lr-of: got a rate of shade, .*did you mean "shades"'):
        load_tasks(replace(config, lr_of=("shade=1",)))


def test_a_limit_below_the_number_of_classes_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_task(tmp_path / "shades", dict.fromkeys("abc", (32, 32, 32)))
    config = resolve({"tasks": [str(folder)], "limit_images": "2"}).run
    (task,) = load_tasks(config)
    assert len(task.train) == 3
    assert "--limit-images 2: task shades keeps an image of each of its 3" in caplog.text


def test_classes_that_a_tokenizer_cannot_tell_apart_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_task(tmp_path / "pets", dict.fromkeys(("Cat", "cat", "dog"), (32, 32, 32)))
    (task,) = load_tasks(resolve({"tasks": [str(folder)]}).run)

    def tokens(texts: list[str], lower: bool = True) -> torch.Tensor:
        return torch.tensor([[*(text.lower() if lower else text).encode()] for text in texts])

    warn_of_twins([task], lambda texts: tokens(texts, lower=False))
    assert not caplog.text
    warn_of_twins([task], tokens)
    assert 'task pets: the classes "Cat" and "cat" are the same' in caplog.text
