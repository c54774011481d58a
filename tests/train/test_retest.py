from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mulki.clip import models
from mulki.data import Task
from mulki.errors import InputError
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import read_matrix
from mulki.runs.predictions import figures
from mulki.runs.reading import read_folder
from mulki.train import sequence
from mulki.train.config.run_config import resolve
from mulki.train.retest import evaluation
from mulki.train.saving.checkpoints import save_weights, statistics_of
from tests.train.run_helpers import SHORT, Run
from tests.train_helpers import COLOURS, without_figures, write_split, write_task


def own(path: Path, **given: object) -> list[float | None]:
    return [figures([of.own])["acc1"] for of in evaluation(path, given).predictions()]


@pytest.fixture(scope="module")
def made(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    given = {"tasks": task_folders, "logs": str(tmp_path_factory.mktemp("made")), "name": "first"}
    options = {"method": "finetune", "lr": 3e-3, "precision": "bf16", "limit_images": 9}
    with without_figures():
        return sequence.run(resolve({**SHORT, **start_model, **given, **options})).path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> RunFolder:
    """A copy of one run."""
    return RunFolder.open(shutil.copytree(made, tmp_path / "logs" / "first"))


def test_accuracies_are_those_of_the_run_to_the_digit(folder: RunFolder) -> None:
    matrix = read_matrix(folder.path / "matrix.csv")
    chosen = evaluation(folder.path, {})
    found = list(chosen.predictions())
    assert [round(figures([of.own])["acc1"] or 0, 4) for of in found] == [
        pytest.approx(value, abs=0) for value in matrix.rows[-1]
    ]
    seen = read_folder(folder.path).class_incremental
    assert round(figures([of.union for of in found])["acc1"] or 0, 4) == seen.last
    (first,) = (folder.path / "checkpoints").glob("task_01_*")
    assert own(first) == [pytest.approx(value, abs=1e-4) for value in matrix.rows[0]]
    # What the run was made of, but for the weights.
    known = read_folder(folder.path).environment["hashes"]
    assert {**known, "weights": chosen.hashes["weights"]} == chosen.hashes
    assert known["weights"] != chosen.hashes["weights"]


@pytest.mark.parametrize("label_space", ["seen", "all"])
def test_label_spaces_of_several_tasks(run: Run, label_space: str) -> None:
    path = run(method="finetune", lr=3e-3, label_space=label_space).path
    chosen = evaluation(path, {})
    assert chosen.label_space == label_space
    among_all = [round(figures([of.union])["acc1"] or 0, 4) for of in chosen.predictions()]
    assert tuple(among_all) == read_matrix(path / "matrix.csv").rows[-1]


def test_tasks_that_are_not_the_runs_own_are_refused(
    folder: RunFolder, run: Run, tmp_path: Path
) -> None:
    env = folder.path / "env.json"
    text = env.read_text()
    for part in ("prompts", "splits"):
        content = json.loads(text)
        content["hashes"][part]["colours"] = "another"
        env.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"{folder.path}: .* whose {part} are not those"):
            evaluation(folder.path, {})
    # Fewer images have other splits, and the same prompts.
    assert evaluation(folder.path, {"limit_images": 3}).label_space == "task"
    env.unlink()
    with pytest.raises(InputError, match="prompts"):
        evaluation(folder.path, {"limit_images": 3})


def test_an_image_that_changed_is_seen(run: Run, tmp_path: Path) -> None:
    shades = write_task(tmp_path / "shades", {"dark": (30, 30, 30), "light": (225, 225, 225)})
    path = run(method="finetune", tasks=(str(shades),)).path
    image = next((shades / "test").rglob("*.png"))
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(InputError, match="splits"):
        evaluation(path, {})


def test_tasks_from_python_are_not_taken_for_the_option(
    start_model: dict[str, str], tmp_path: Path, task: Task
) -> None:
    given = {**SHORT, **start_model, "method": "finetune", "logs": str(tmp_path / "logs")}
    path = sequence.run(resolve(given), tasks=[task]).path
    with pytest.raises(InputError, match=r"args\.yaml .*prompts"):
        evaluation(path, {})


def test_the_union_holds_the_classes_of_all_tasks(folder: RunFolder) -> None:
    colours, shades = evaluation(folder.path, {}).predictions()
    assert len(colours.own.classes) == 3 and len(shades.own.classes) == 2
    assert colours.union.classes == [*colours.own.classes, *shades.own.classes]
    assert set(shades.union.target) == {3, 4} and set(shades.own.target) == {0, 1}
    # The more classes, the fewer right answers.
    for of in (colours, shades):
        assert not (of.union.right & ~of.own.right).any()


def test_other_tasks_have_none_of_the_runs_options(
    folder: RunFolder, task_folders: tuple[str, str]
) -> None:
    (other,) = evaluation(folder.path, {"tasks": task_folders[:1]}).predictions()
    # The run had 9 images of 15.
    assert len(other.names) == 15


def test_weights_of_a_model_that_is_known_by_its_place(
    folder: RunFolder, tmp_path: Path, task_folders: tuple[str, str]
) -> None:
    (last,) = (folder.path / "checkpoints").glob("task_02_*")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(last.read_bytes())
    given = {"tasks": task_folders, "precision": "bf16", "batch_size_eval": 256}
    assert own(alone, **given) == own(last, tasks=task_folders)


def test_an_own_model_needs_no_run(
    tiny_models: tuple[str, ...], tmp_path: Path, task_folders: tuple[str, str]
) -> None:
    torch.manual_seed(0)
    save_weights(models.load("tiny-biased"), tmp_path / "w.safetensors")
    assert len(own(tmp_path / "w.safetensors", tasks=task_folders)) == 2
    torch.save(models.load("tiny-vit").clip.state_dict(), tmp_path / "w.pt")
    assert len(own(tmp_path / "w.pt", tasks=task_folders, model="tiny-vit")) == 2


@pytest.mark.parametrize(
    ("path", "given", "said"),
    [
        ("none", {}, "none: no such file or folder"),
        (".", {}, "--tasks: got none"),
        ("none", {"tasks": ("embedded",)}, "none: no such file or folder"),
        (".", {"tasks": ("embedded",)}, "no open_clip_config.json"),
        ("w.pt", {"tasks": ("embedded",)}, "does not say of which model"),
        ("w.safetensors", {"tasks": ("embedded",)}, "not a whole safetensors file"),
    ],
)
def test_bad_checkpoints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    given: dict[str, object],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("w.pt", "w.safetensors"):
        Path(name).write_bytes(b"nothing")
    with pytest.raises(InputError, match=said):
        evaluation(Path(path), given)


def test_a_model_of_a_folder_is_not_given_twice(folder: RunFolder) -> None:
    with pytest.raises(InputError, match="^--model: .*tiny-vit"):
        evaluation(folder.path, {"model": "tiny-vit"})


def test_weights_of_another_model_or_not_finite(
    folder: RunFolder, start_model: dict[str, str]
) -> None:
    other, broken = models.load("tiny-resnet"), models.load("tiny-vit")
    other.name = start_model["model"]
    with torch.no_grad():
        broken.clip.visual.proj[0, 0] = torch.nan
    path = folder.path / "checkpoints" / "task_09_x.safetensors"
    for model, said in ((other, "local-dir"), (broken, "NaN")):
        save_weights(model, path)
        with pytest.raises(InputError, match=said):
            evaluation(path, {})


def test_options_of_a_head_that_is_not_used_are_refused(folder: RunFolder) -> None:
    with pytest.raises(InputError, match=r"--head-weight: got 2.0, .* the head is off"):
        evaluation(folder.path, {"head": False, "head_weight": 2.0})
    statistics_of(folder.path).unlink()
    for options in ({"head": True}, {"head_shrinkage": 0.5}):
        with pytest.raises(InputError, match="--head.*there is no .*class_statistics"):
            evaluation(folder.path, options)
    assert evaluation(folder.path, {"head": False}).statistics is None


def test_what_a_run_has_imported_is_not_run_unasked(folder: RunFolder, tmp_path: Path) -> None:
    """The folder may be from elsewhere; its weights alone are not a reason to run its code."""
    module = tmp_path / "from_elsewhere.py"
    module.write_text("raise RuntimeError\n")
    arguments = folder.path / "args.yaml"
    text = arguments.read_text()
    assert "import: []" in text
    arguments.write_text(text.replace("import: []", f"import: [{module}]"))
    for path in (folder.path, folder.path / "checkpoints" / "latest"):
        with pytest.raises(InputError, match=r"from_elsewhere\.py.*--import"):
            evaluation(path, {})
    with pytest.raises(InputError, match=r"from_elsewhere\.py"):
        evaluation(folder.path, {"import_": (str(module),)})


def test_the_images_that_a_run_has_held_out_are_tested(run: Run, tmp_path: Path) -> None:
    write_split(tmp_path / "whole", COLOURS, 5)
    tasks = (str(tmp_path / "whole"),)
    path = run(method="finetune", lr=3e-3, tasks=tasks, test_fraction=0.4).path
    (found,) = evaluation(path, {}).predictions()
    assert len(found.names) == 6
    assert (
        round(figures([found.own])["acc1"] or 0, 4) == read_matrix(path / "matrix.csv").rows[-1][0]
    )
    for fraction in ("0.4", "0.6"):
        with pytest.raises(InputError, match=r"^--test-fraction: got 0\.."):
            evaluation(path, {"test_fraction": fraction})
    # Options of the run's tasks are not those of others.
    with pytest.raises(InputError, match="--test-fraction 0.2"):
        evaluation(path, {"tasks": tasks})
    (found,) = evaluation(path, {"tasks": tasks, "test_fraction": "0.6"}).predictions()
    assert len(found.names) == 9
    # An image more is another split.
    shutil.copy(tmp_path / "whole" / "red" / "0.png", tmp_path / "whole" / "red" / "5.png")
    with pytest.raises(InputError, match="splits"):
        evaluation(path, {})


def test_training_images_may_be_gone(run: Run, tmp_path: Path) -> None:
    shades = write_task(tmp_path / "shades", {"dark": (30, 30, 30), "light": (225, 225, 225)})
    path = run(method="finetune", tasks=(str(shades),)).path
    before = own(path)
    shutil.rmtree(shades / "train")
    assert own(path) == own(path, tasks=(str(shades),)) == before
    shutil.rmtree(shades / "test" / "light")
    assert own(path, tasks=(str(shades),)) == [100.0]
    with pytest.raises(InputError, match="prompts"):
        evaluation(path, {})
