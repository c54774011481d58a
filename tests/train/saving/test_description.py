from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mulki.errors import InputError
from mulki.runs.metrics import read_matrix
from mulki.runs.predictions import figures
from mulki.train.config.run_config import resolve
from mulki.train.retest import evaluation
from mulki.train.saving.checkpoints import description_of, save_weights
from mulki.train.saving.description import Description, LearnedTask, described
from tests.train.run_helpers import Run
from tests.train_helpers import write_pairs

TASKS = (
    LearnedTask("birds", ("jay", "owl"), ("a photo of a {}.", "a drawing of a {}.")),
    LearnedTask("a|b", (), ()),
)
SAID = Description(TASKS, {"method": "mulki", "lr": 0.1, "epochs": 2}, "ab", {"birds": 51.25})


def test_it_is_read_as_it_was_written() -> None:
    assert described(SAID.to_metadata()["mulki"], "here") == SAID
    assert TASKS[0].prompts()[1] == ["a photo of a owl.", "a drawing of a owl."]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tasks": [1]}', json.dumps({"tasks": []})])
def test_what_it_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="^here: what it says of itself"):
        described(text, "here")


def test_the_card_says_what_was_learned() -> None:
    card = SAID.card()
    assert "| birds | 2 | 51.2 % |" in card and "| a\\|b | captions | - |" in card
    assert "- birds: jay, owl" in card and "2 epochs a task" in card and "license: other" in card
    assert "Not learned" not in card and "was moved" not in card
    assert "clip.clip` is that of open_clip" in SAID.card(moves=False)
    more = Description(TASKS, SAID.recipe, "ab", {"birds": 51.25, "new": 3.0})
    assert "Not learned: new 3.0 %." in more.card()


def test_each_checkpoint_of_a_run_says_what_it_is(run: Run, task_folders: tuple[str, str]) -> None:
    folder = run(method="finetune")
    matrix = read_matrix(folder.path / "matrix.csv")
    hashes = json.loads((folder.path / "env.json").read_text())["hashes"]
    for number, path in enumerate(sorted((folder.path / "checkpoints").glob("task_*")), start=1):
        found = description_of(path)
        assert found is not None and found.weights == hashes["weights"]
        assert [task.name for task in found.tasks] == ["colours", "shades"][:number]
        assert dict(found.figures) == dict(
            zip(matrix.columns, matrix.rows[number - 1], strict=True)
        )
        assert found.tasks[0].classes == ("blue", "green", "red")
        # A recipe makes the same run, in another place.
        again = resolve({**found.recipe, "logs": "logs", "device": "cpu"})
        assert (again.run.tasks, again.run.lr) == (task_folders, 1e-3)
        assert not {"name", "logs", "workers"} & found.recipe.keys()
    for path in (folder.path, folder.latest):
        assert description_of(path) == found
    card = (folder.latest / "README.md").read_text()
    assert card == found.card() and "| shades | 2 |" in card


def test_the_card_of_captions(run: Run, tmp_path: Path) -> None:
    tasks = (f"captions:{write_pairs(tmp_path)}",)
    folder = run(method="finetune", tasks=tasks, batch_size=4)
    assert "| flags | captions |" in (folder.latest / "README.md").read_text()


def test_a_copied_checkpoint_is_enough_for_an_evaluation(run: Run, tmp_path: Path) -> None:
    folder = run(method="finetune", limit_images=9)
    copy = shutil.copytree(folder.latest, tmp_path / "elsewhere")
    chosen = evaluation(copy, {})
    found = [round(figures([of.own])["acc1"] or 0, 4) for of in chosen.predictions()]
    assert tuple(found) == read_matrix(folder.path / "matrix.csv").rows[-1]
    assert chosen.label_space == "task"
    said = description_of(copy)
    assert said is not None
    other = LearnedTask("colours", ("red", "green", "blue"), said.tasks[0].templates)
    changed = Description((other,), said.recipe, said.weights, said.figures)
    file = tmp_path / "changed.safetensors"
    save_weights(chosen.model, file, description=changed)
    with pytest.raises(InputError, match="learned a task colours with other class names"):
        evaluation(file, {})


def test_weights_of_another_program_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"")
    assert description_of(tmp_path / "w.pt") is description_of(tmp_path / "none") is None
    assert description_of(tmp_path) is None
