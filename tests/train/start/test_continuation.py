from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mulki import methods
from mulki.clip import models
from mulki.data import folder_task
from mulki.errors import InputError
from mulki.report.comparison.compare import compare
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import read_matrix
from mulki.runs.predictions import figures
from mulki.train import costs, sequence
from mulki.train.config.run_config import RunConfig, resolve
from mulki.train.config.tasks import load_tasks
from mulki.train.learning.validation import with_validation
from mulki.train.retest import evaluation
from mulki.train.rows import Rows
from mulki.train.saving.checkpoints import description_of, save_weights
from mulki.train.saving.description import Description, LearnedTask
from mulki.train.start.continuation import (
    check_begin,
    continuation,
    continued_options,
    earlier_tasks,
    set_weights,
)
from mulki.train.start.setup import prepared
from tests.sweeps import mostly_long
from tests.train.distributed_runs import (
    ANCHORED,
    FIRST,
    assert_same_results,
    assert_same_weights,
    torchrun,
)
from tests.train.run_helpers import SHORT, weights
from tests.train.saving.test_resuming import results_of, resumed, stop_at
from tests.train_helpers import same_state, write_pairs, write_task

SIZES = {"tiny": (250, 250, 0), "large": (10, 250, 250)}
Make = Callable[..., RunFolder]


@pytest.fixture
def folders(task_folders: tuple[str, str], tmp_path: Path) -> list[str]:
    """Three task folders, as copies that a test may change."""
    copies = [shutil.copytree(path, tmp_path / Path(path).name) for path in task_folders]
    return [*map(str, copies), str(write_task(tmp_path / "sizes", SIZES))]


@pytest.fixture
def make(start_model: dict[str, str], tmp_path: Path) -> Make:
    def go(name: str, tasks: list[str], after: Path | None = None, **options: Any) -> RunFolder:
        given = {"tasks": tasks, "logs": str(tmp_path / "logs"), "name": name, **options}
        if after is None:
            given = {**SHORT, **start_model, **given}
        else:
            given = continued_options(after, given)
        made = sequence.run(resolve(given))
        assert made is not None
        return made

    return go


def check_as_one(continued: Path, whole: Path) -> None:
    """Results, but for the steps of the earlier tasks, and weights are those of one run."""
    one, other = results_of(continued), results_of(whole)
    assert one[3] == other[3] and one[1] == other[1]
    assert [line[1:] for line in one[0]] == [line[1:] for line in other[0]]
    assert one[2]["metrics"] == other[2]["metrics"]
    assert same_state(weights(continued, "task_03*"), weights(whole, "task_03*"))


CASES: dict[str, dict[str, Any]] = {
    "mulki": {"method": "mulki", "we_every": 2, "alpha": 0.8, "l2": 0.1, "anchors": "both",
              "anchors_per_step": 3, "augment": "crop"},
    "words": {"method": "mulki", "anchors": "seen", "lock_text": True, "precision": "bf16"},
    "wise_ft": {"method": "wise_ft", "wise_base": "zero_shot"},
    "finetune": {"method": "finetune", "label_space": "seen", "limit_images": 9},
    "er": {"method": "er", "buffer_size": 5, "shots": 3},
    "er with validation": {"method": "er", "buffer_size": 50, "val_fraction": 0.3},
    "ewc": {"method": "ewc", "fisher_images": 5, "ewc_decay": 0.5},
    "original": {"method": "mulki", "original": "tiny-vit"},
    "adapters": {"method": "mulki", "lora_rank": 2, "anchors": "both"},
    "keeplora": {"method": "keeplora", "lora_rank": 2, "lora_alpha": 1.0, "energy_image": 0.3},
    "adapters in bf16": {"method": "lwf", "lora_rank": 2, "lock_text": True, "precision": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("case", mostly_long(CASES, "mulki", "er with validation", "adapters"))
def test_it_is_as_if_both_were_one_run(make: Make, folders: list[str], case: str) -> None:
    options = CASES[case]
    whole = make("whole", folders, **options)
    first = make("first", folders[:2], **options)
    second = make("second", folders[2:], first.path)
    check_as_one(second.path, whole.path)
    assert description_of(second.path).tasks == description_of(whole.path).tasks  # type: ignore[union-attr]
    assert list(read_matrix(second.path / "matrix.csv").tasks) == ["colours", "shades", "sizes"]
    (section,) = compare([second.path, whole.path]).sections
    assert section.name == "colours, shades, sizes" and [len(g.runs) for g in section.groups] == [2]


def test_after_several_runs_and_stops(
    make: Make, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make("whole", folders, method="mulki")
    first = make("first", folders[:1], method="mulki")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 2, RuntimeError("stop"))
        make("second", folders[1:2], first.path)
    second = resumed(first.path.parent / "second")
    rows = iter([None, None, RuntimeError("stop")])
    real = Rows.record

    def record(self: Any, *given: Any) -> None:
        # The third row of an earlier model.
        if (error := next(rows)) is not None:
            raise error
        real(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        patch.setattr(Rows, "record", record)
        make("third", folders[2:], second.path)
    assert len(read_matrix(first.path.parent / "third" / "matrix.csv").rows) == 1
    third = resumed(first.path.parent / "third")
    check_as_one(third.path, whole.path)


@pytest.mark.long
def test_several_processes_go_on_as_one_does(base: dict[str, Any], tmp_path: Path) -> None:
    colours, shades = base["tasks"]
    options = {"method": "mulki", "we_every": 2, "alpha": 0.8, "l2": 5.0, "anchors": "both"}
    given = base | ANCHORED | options | {"logs": str(tmp_path), "batch_size": 6}
    first = sequence.run(resolve(given | {"name": "first", "tasks": [colours]}))
    assert first is not None
    more = {"name": "one", "logs": str(tmp_path), "tasks": [shades]}
    one = sequence.run(resolve(continued_options(first.path, more)))
    assert one is not None and len(read_matrix(one.path / "matrix.csv").rows) == 2
    for name, words in (("replicated", []), ("sharded", ["--fsdp"])):
        go_on = ["run", shades, "--continue", str(first.path), "--batch-size", "3", *words]
        place = ["--logs", str(tmp_path), "--name", name]
        done = torchrun(2, "-m", "mulki", "--", *go_on, *place)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / name / "env.json").read_text())["processes"] == 2
        assert_same_results(tmp_path / name, one.path)
        assert_same_weights(tmp_path / name, one.path, first.path / FIRST)


@pytest.mark.long
def test_from_a_copied_checkpoint_alone(make: Make, folders: list[str], tmp_path: Path) -> None:
    first = make("first", folders[:2], method="mulki")
    whole = make("whole", folders, method="mulki")
    copy = shutil.copytree(first.latest, tmp_path / "elsewhere" / "model")
    second = make("second", folders[2:], copy)
    matrix, wanted = (read_matrix(f.path / "matrix.csv") for f in (second, whole))
    # The weights after the first task are not there.
    assert matrix.tasks == ("shades", "sizes") and matrix.rows == wanted.rows[1:]
    assert matrix.zero_shot == wanted.zero_shot and matrix.columns == wanted.columns
    assert same_state(weights(second, "task_03*"), weights(whole, "task_03*"))
    # Nor are any images of the earlier tasks.
    for folder in folders[:2]:
        shutil.rmtree(folder)
    third = make("third", folders[2:], copy)
    matrix = read_matrix(third.path / "matrix.csv")
    assert matrix.columns == matrix.tasks == ("sizes",)
    assert same_state(weights(third, "task_03*"), weights(whole, "task_03*"))
    assert (third.path / "report.html").is_file()
    (found,) = evaluation(third.path, {}).predictions()
    assert round(figures([found.own])["acc1"] or 0, 4) == matrix.rows[0][0]
    # What was moved is named.
    moved = write_task(tmp_path / "moved" / "shades", {"dark": (30, 30, 30)})
    shutil.rmtree(moved / "train")
    fourth = make("fourth", folders[2:], copy, test_tasks=[str(moved)])
    assert read_matrix(fourth.path / "matrix.csv").columns == ("shades", "sizes")


def test_adapters_go_on_from_adapters(make: Make, folders: list[str], tmp_path: Path) -> None:
    adapted = {"method": "lwf", "lora_rank": 2, "lora_targets": "attn"}
    plain, first = make("plain", folders[:1], method="lwf"), make("first", folders[:1], **adapted)
    copy = shutil.copytree(first.latest, tmp_path / "copy")
    (copy / "adapters.safetensors").unlink()
    stale = shutil.copytree(first.latest, tmp_path / "stale")
    other = make("other", folders[:1], seed=1, **adapted)
    shutil.copy(other.latest / "adapters.safetensors", stale)
    refused = (
        (plain.path, {"lora_rank": 2}, "--lora-rank: there is no .*, so .* was learned without"),
        (copy, {}, "or copied without them"),
        (first.path, {"lora_rank": 3}, "has adapters of another rank or of other modules"),
        (first.path, {"lora_targets": "mlp"}, "has adapters of another rank or of other modules"),
        (first.path, {"lora_alpha": 8.0}, "do not give the .* that .* has; pass --lora-alpha and"),
        (stale, {}, "or a checkpoint that was copied whole"),
    )
    for after, given, said in refused:
        options = continued_options(after, {"tasks": folders[1:2], **given})
        with pytest.raises(InputError, match=said), prepared(resolve(options), write=False):
            pass
    other_precision = make("bf16", folders[1:2], first.path, precision="bf16")
    assert len(other_precision.matrix.rows) == 2
    # All weights learn on from a checkpoint in which adapters are merged.
    second = make("second", folders[1:2], first.path, lora_rank=None)
    assert not list(second.path.glob("checkpoints/adapters*"))


def test_another_method_takes_nothing_that_the_first_kept(
    make: Make, folders: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = make("first", folders[:1], method="keeplora", lora_rank=2)
    options = {"method": "ewc", "lora_rank": None, "fisher_images": 3}
    second = make("second", folders[1:2], first.path, **options)
    environment = json.loads((second.path / "env.json").read_text())
    (earlier,) = environment["learned_with"]
    assert earlier["tasks"] == 1 and {"lora_rank", "method"} <= earlier["options"].keys()
    third = make("third", folders[2:3], second.path, fisher_images=4)
    environment = json.loads((third.path / "env.json").read_text())
    assert [each["tasks"] for each in environment["learned_with"]] == [1, 2]
    changed = environment["learned_with"][1]["options"]
    assert changed["fisher_images"] == 3 and "method" not in changed
    assert "ewc does not hold on to the earlier tasks, for method keeplora learned" in caplog.text


def test_replay_needs_the_earlier_training_images(
    make: Make, folders: list[str], tmp_path: Path
) -> None:
    first = make("first", folders[:2], method="er")
    moved = shutil.move(folders[0], tmp_path / "moved")
    shutil.rmtree(Path(folders[1], "train"))
    with pytest.raises(InputError, match="--method er: .*colours, shades are not there"):
        make("second", folders[2:], first.path)
    # Another method does without them.
    make("third", folders[2:], first.path, method="finetune")
    assert moved.exists()


def test_fisher_information_that_is_not_there_is_told(
    make: Make, folders: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = make("first", folders[:1], method="finetune")
    second = make("second", folders[1:2], first.path, method="ewc", fisher_images=4)
    assert "ewc does not hold on" in (second.path / "out.log").read_text()
    make("third", folders[2:], second.path)
    assert caplog.text.count("ewc does not hold on") == 1


def test_class_statistics_that_are_not_there_are_told(
    make: Make, folders: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = make("first", folders[:1], method="finetune", head=False)
    made = make("second", folders[1:2], first.path, head=True)
    assert "class_statistics" in caplog.text and "texts alone answer for the earlier" in caplog.text
    assert made.with_head is None


def test_damaged_files_are_seen_before_anything_is_tested(make: Make, folders: list[str]) -> None:
    first = make("first", folders[:1], method="ewc", fisher_images=4)
    for file in sorted((first.path / "checkpoints" / "latest").glob("*.safetensors")):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{file.name}: damaged"):
            make("second", folders[1:2], first.path)
        assert not (first.path.parent / "second").exists()
        file.write_bytes(content)


def test_it_is_evaluated_again(make: Make, folders: list[str]) -> None:
    first = make("first", folders[:2], method="finetune")
    second = make("second", folders[2:], first.path)
    found = list(evaluation(second.path, {}).predictions())
    matrix = read_matrix(second.path / "matrix.csv")
    assert tuple(of.task for of in found) == matrix.columns
    assert tuple(round(figures([of.own])["acc1"] or 0, 4) for of in found) == matrix.rows[-1]
    assert round(figures([of.union for of in found])["acc1"] or 0, 4) == (
        second.class_incremental.last
    )


def test_options_left_out_are_those_of_the_earlier_run(make: Make, folders: list[str]) -> None:
    first = make("first", folders[:2], method="mulki", l2=0.3, lr_of=["shades=1e-4"], seed=3)
    new = {"tasks": ["more"]}
    config = resolve(continued_options(first.path, new))
    assert (config.run.lr, config.run.seed, config.run.iterations) == (1e-3, 3, 4)
    assert config.method.l2 == 0.3  # type: ignore[attr-defined]
    assert config.run.test_tasks == tuple(folders[:2]) and config.run.lr_of == ()
    assert config.run.continue_ == str(first.path) and config.run.name is None
    # Without a head its means cannot be shifted.
    shifted = make("shifted", folders[:1], method="finetune", head_drift="sdc")
    without = resolve(continued_options(shifted.path, new | {"head": False}))
    assert without.run.head_drift is None
    # Another method has its own options, and those of the run.
    other = resolve(continued_options(first.path, new | {"method": "lwf", "epochs": 2}))
    assert (other.run.lr, other.run.epochs, other.run.method) == (1e-3, 2, "lwf")
    for given, said in (
        ({}, "--continue: got no tasks to learn .*has learned colours, shades"),
        (new | {"method": "zero_shot"}, "--continue: method zero_shot learns nothing"),
        (new | {"test_tasks": ["embedded:flags"], "tasks": folders[2:]}, "a task flags, which was"),
        ({"tasks": folders[:1]}, "--continue: a task colours was learned before"),
    ):
        with (
            pytest.raises(InputError, match=said),
            prepared(resolve(continued_options(first.path, given)), write=False),
        ):
            pass
    with pytest.raises(InputError, match="--test-tasks: got a without --continue"):
        sequence.run(resolve({"test_tasks": ["a"]}))


def test_tasks_of_a_sequence_ride_along_by_name(make: Make, folders: list[str]) -> None:
    options = {"method": "finetune", "limit_images": 3, "iterations": 1}
    first = make("first", ["embedded"], **options)
    given = continued_options(first.path, {"tasks": folders[:1]})
    names = [task.name for task in description_of(first.path).tasks]  # type: ignore[union-attr]
    assert given["test_tasks"] == [f"embedded:{name}" for name in names]


def test_the_words_of_a_sequence_that_a_second_run_has_learned(
    said: Description, tiny_models: tuple[str, ...], folders: list[str], tmp_path: Path
) -> None:
    tasks = tuple(LearnedTask(name, (), ()) for name in ("colours", "flags", "emoji"))
    recipe = {"method": "finetune", "tasks": ["embedded"], "test_tasks": folders[:1]}
    file = tmp_path / "w.safetensors"
    learned = replace(said, tasks=tasks, recipe=recipe, earlier=1)
    save_weights(models.load("tiny-vit"), file, description=learned)
    found = continued_options(file, {"tasks": ["a"]})["test_tasks"]
    assert found == [folders[0], "embedded:flags", "embedded:emoji"]


def test_from_a_checkpoint_before_the_last(make: Make, folders: list[str], tmp_path: Path) -> None:
    """Also where the run itself has gone on from one, whose images are not there."""
    first = make("first", folders[:1], method="finetune")
    shutil.rmtree(folders[0])
    second = make("second", folders[1:], first.path)
    file = next(second.path.glob("checkpoints/task_02_*.safetensors"))
    more = str(write_task(tmp_path / "more", SIZES))
    third = make("third", [more], file)
    assert read_matrix(third.path / "matrix.csv").tasks == ("shades", "more")


@pytest.mark.parametrize(
    ("given", "said_of"),
    [
        ({"methods": ["lwf", "zscl"]}, "--methods: got lwf zscl beside --continue"),
        ({"preset": "quick"}, "--preset: got quick beside --continue"),
        ({"test_fraction": "0.5"}, "--test-fraction: got 0.5, but .* were divided with 0.25"),
        ({"import_": ["gone.py"]}, "--import: gone.py: no such file"),
    ],
)
def test_options_that_do_not_go_with_it(
    tiny_models: tuple[str, ...], tmp_path: Path, said: Description, given: Any, said_of: str
) -> None:
    file = tmp_path / "w.safetensors"
    recipe = {**said.recipe, "test_fraction": 0.25, "preset": "default"}
    made_with = replace(said, recipe=recipe)
    save_weights(models.load("tiny-vit"), file, description=made_with)
    with pytest.raises(InputError, match=said_of):
        continued_options(file, {"tasks": ["a"], **given})
    # A configuration file names all options.
    for same in ({"test_fraction": "0.25", "preset": "default"}, {"test_fraction": None}):
        continued_options(file, {"tasks": ["a"], **same})


def test_a_task_of_captions_takes_no_options_of_classes(
    make: Make, folders: list[str], tmp_path: Path
) -> None:
    first = make("first", folders[:1], method="finetune", shots=2, label_smoothing=0.1)
    pairs = f"captions:{write_pairs(tmp_path / 'pairs')}"
    second = make("second", [pairs], first.path, batch_size=2)
    assert len(second.matrix.rows) == 2


def test_held_out_images_of_an_earlier_task_are_tested_again(
    make: Make, folders: list[str]
) -> None:
    whole = Path(folders[0])
    shutil.copytree(whole / "test", whole, dirs_exist_ok=True)
    for split in ("train", "test"):
        shutil.rmtree(whole / split)
    first = make("first", folders[:1], method="finetune", test_fraction=0.25)
    second = make("second", folders[2:], first.path)
    found = list(evaluation(second.path, {}).predictions())
    assert [of.task for of in found] == ["colours", "sizes"]


def test_what_was_imported_has_to_be_given(make: Make, folders: list[str], tmp_path: Path) -> None:
    first = make("first", folders[:1], method="finetune")
    said = continuation(first.path).said
    file = tmp_path / "w.safetensors"
    made_with = replace(said, recipe={**said.recipe, "import": ["./mine.py"]})
    save_weights(models.load("tiny-vit"), file, description=made_with)
    with pytest.raises(InputError, match=r"made with \./mine.py; .*pass --import \./mine.py"):
        continued_options(file, {"tasks": ["a"]})


@pytest.fixture
def said() -> Description:
    tasks = (LearnedTask("shades", ("dark", "light"), ("a {}.",)),)
    return Description(tasks, {"method": "mulki"}, "ab", {})


def test_the_start_model_is_the_one_that_it_began_with(said: Description) -> None:
    check_begin(said, {"weights": "ab"})
    check_begin(said, {"weights": "other", "original": "ab"})
    with pytest.raises(InputError, match="not the one that the first task began with"):
        check_begin(said, {"weights": "other"})


def test_what_cannot_be_gone_on_from(
    start_model: dict[str, str], tmp_path: Path, said: Description
) -> None:
    start = Path(start_model["model"].partition(":")[2])
    for path, words in ((start, "does not say what"), (tmp_path / "gone", "no such file")):
        with pytest.raises(InputError, match=f"--continue: {path}: {words}"):
            continuation(path)
    file = tmp_path / "w.safetensors"
    save_weights(models.load("tiny-resnet"), file, description=said)
    with pytest.raises(InputError, match="does not hold the weights of tiny-vit"):
        set_weights(models.load("tiny-vit"), file)


def test_images_of_earlier_tasks(task_folders: tuple[str, str], said: Description) -> None:
    shades, config = task_folders[1], RunConfig(continue_="somewhere")
    tested = replace(config, test_tasks=(shades,))
    (found,) = earlier_tasks(tested, said.tasks)
    assert found.templates == ("a {}.",) and len(found.train) == 0 and found.test_only
    assert found.test.fingerprint() == folder_task(shades).test.fingerprint()
    # Other places of the classes, and one that was not learned.
    (more,) = earlier_tasks(tested, [LearnedTask("shades", ("light", "red", "dark"), ("a {}.",))])
    assert [more.classes[t] for t in more.test.targets] == [
        found.classes[t] for t in found.test.targets
    ]
    with pytest.raises(InputError, match="images of light, which is none of the 2 classes"):
        earlier_tasks(tested, [LearnedTask("shades", ("dark", "red"), ("a {}.",))])
    (named,) = earlier_tasks(config, said.tasks)
    assert named.classes == ("dark", "light") and len(named.test) == 0
    with pytest.raises(InputError, match="--test-tasks: flags has learned captions"):
        earlier_tasks(config, [LearnedTask("flags", (), ())])


@pytest.mark.parametrize("options", [{}, {"shots": 3}, {"limit_images": 5}])
def test_validation_images_are_not_replayed(
    folders: list[str], said: Description, options: dict[str, Any]
) -> None:
    shades = folders[1]
    config = RunConfig(tasks=(shades,), val_fraction=0.4, **options)
    er = methods.get("er")
    tested = replace(config, tasks=(), test_tasks=(shades,), continue_="somewhere")
    # One with validation images of its own is learned whole.
    for own in (False, True):
        if own:
            shutil.copytree(Path(shades, "test"), Path(shades, "val"))
        (one,) = with_validation(config, er(er.Options()), load_tasks(config))
        (found,) = earlier_tasks(tested, said.tasks, replayed=True)
        assert found.train.fingerprint() == one.train.fingerprint() and found.val is None
        assert len(found.train) == len(one.train) > 0


def test_captions_of_earlier_tasks(tmp_path: Path) -> None:
    file = f"captions:{write_pairs(tmp_path)}"
    config = RunConfig(continue_="somewhere", test_tasks=(file,), shots=1)
    (whole,) = load_tasks(replace(config, tasks=(file,), test_tasks=(), continue_=None, shots=None))
    (found,) = earlier_tasks(config, [LearnedTask("flags", (), ())], replayed=True)
    assert found.train.fingerprint() == whole.train.fingerprint()
    with pytest.raises(InputError, match="flags has learned 2 classes, and these are captions"):
        earlier_tasks(config, [LearnedTask("flags", ("a", "b"), ("a {}.",))])


def test_captions_ride_along(make: Make, folders: list[str], tmp_path: Path) -> None:
    first = make("first", [f"captions:{write_pairs(tmp_path)}"], method="finetune", batch_size=4)
    second = make("second", folders[1:2], first.path)
    assert read_matrix(second.path / "matrix.csv").tasks == ("flags", "shades")


def test_a_plan_counts_the_earlier_test_images(make: Make, folders: list[str]) -> None:
    first = make("first", folders[:2], method="finetune")
    given = {"tasks": folders[2:], "name": "second", "logs": str(first.path.parent)}
    with prepared(resolve(continued_options(first.path, given)), write=False) as setup:
        found = costs.measure(setup)
    assert [each.name for each in found.tasks] == ["sizes"]
    assert found.seconds > found.tasks[0].learning + found.tasks[0].testing
    assert not (first.path.parent / "second").exists()


def test_another_checkpoint_is_seen(
    make: Make, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make("first", folders[:1], method="finetune")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 2, RuntimeError("stop"))
        make("second", folders[1:2], first.path)
    other = make("other", folders[:1], method="finetune", seed=1)
    shutil.rmtree(first.path)
    shutil.move(other.path, first.path)
    with pytest.raises(InputError, match="--resume: the checkpoint are not those"):
        resumed(first.path.parent / "second")
    hashes = json.loads((first.path.parent / "second" / "env.json").read_text())["hashes"]
    assert len(hashes["checkpoint"]) == 64


@pytest.fixture(autouse=True)
def registered(tiny_models: tuple[str, ...]) -> Iterator[None]:
    yield
