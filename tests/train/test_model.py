from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mulki
from mulki.data import BadImage, folder_task
from mulki.data.unlabelled import find_images
from mulki.errors import InputError
from mulki.runs.folder import RunFolder
from mulki.train import sequence
from mulki.train.config.run_config import resolve
from mulki.train.model import Model, load
from mulki.train.retest import evaluation
from mulki.train.saving.description import Description, LearnedTask
from tests.train.run_helpers import SHORT, Run
from tests.train_helpers import SHADES, without_figures, write_task


@pytest.fixture(scope="module")
def folder(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """A run on colours and shades that nothing changes."""
    given = {"tasks": task_folders, "logs": str(tmp_path_factory.mktemp("logs")), "name": "first"}
    with without_figures():
        made = sequence.run(resolve({**SHORT, **start_model, **given, "method": "finetune"}))
    assert made is not None
    return made


@pytest.fixture(scope="module")
def model(folder: RunFolder) -> Model:
    return load(folder.path)


@pytest.mark.parametrize("head", [True, False])
def test_predictions_are_those_of_the_evaluation(
    folder: RunFolder, model: Model, task_folders: tuple[str, str], head: bool
) -> None:
    assert model.classes == ("blue", "green", "red", "dark", "light")
    (colours, _) = evaluation(folder.path, {}).predictions()
    assert colours.with_head is not None and model.statistics is not None
    union = colours.with_head.union if head else colours.union
    model = model if head else load(folder.path, head=False)
    task = folder_task(task_folders[0])
    names = [task.test.name(index) for index in range(len(task.test))]
    found = model.predict(names, top=9)
    assert [each.image for each in found] == names
    for place, each in enumerate(found):
        ranked = [union.classes[c][1] for c in union.ranked[place]]
        assert list(each.classes) == ranked and len(each.probabilities) == 5
        assert each.probabilities[0] == pytest.approx(union.probability[place], abs=1e-5)
        assert sum(each.probabilities) == pytest.approx(1, abs=1e-5)
        assert each.label == each.classes[0]


@pytest.mark.parametrize("of", ["latest", "task_02_shades.safetensors"])
def test_a_checkpoint_knows_the_classes_too(folder: RunFolder, model: Model, of: str) -> None:
    other = load(folder.path / "checkpoints" / of)
    image = Image.new("RGB", (40, 30), (220, 40, 40))
    assert other.predict(image) == model.predict(image)
    assert load(folder.path / "checkpoints" / "task_01_colours.safetensors").classes == (
        "blue", "green", "red"
    )  # fmt: skip


@pytest.mark.parametrize("head", [True, False])
def test_one_layer_says_what_predict_says(
    folder: RunFolder, task_folders: tuple[str, str], head: bool
) -> None:
    model = load(folder.path, head=head)
    layer = model.layer()
    assert layer.names == model.classes and layer.weight.shape[0] == len(layer.bias) == 5
    assert (layer.bias.abs().max() > 0) == head
    features = model.encode_images(task_folders[0])
    found = (features @ layer.weight.mT + layer.bias).softmax(dim=1)
    for chances, each in zip(found, model.predict(task_folders[0]), strict=True):
        of = dict(zip(each.classes, each.probabilities, strict=True))
        assert [of[name] for name in layer.names] == pytest.approx(chances.tolist(), abs=1e-4)


def test_one_layer_needs_all_class_statistics(model: Model) -> None:
    assert model.statistics is not None
    some = replace(model.statistics, tasks=model.statistics.tasks[:1])
    other = Model(model.clip, model.description, "here", statistics=some)
    with pytest.raises(InputError, match="^here: no class statistics of task shades"):
        other.layer()


def test_other_classes_and_a_threshold(model: Model, tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 30), (220, 40, 40))
    (found,) = model.predict(image, classes=["tiger", "red", "tiger"], top=1)
    assert found.classes[0] in ("tiger", "red") and found.image == "image 0"
    (found,) = model.predict(image, classes=["tiger", "red"])
    assert sorted(found.classes) == ["red", "tiger"]
    (found,) = model.predict(image, classes=["tiger", "red"], threshold=1.0)
    assert found.label is None and found.probabilities[0] < 1
    image.save(tmp_path / "a.png")
    mixed = model.predict([image, tmp_path / "a.png", image])
    assert [each.image for each in mixed] == ["image 0", str(tmp_path / "a.png"), "image 2"]
    assert mixed[0].probabilities == pytest.approx(mixed[1].probabilities)


def test_texts_of_classes_go_with_the_checkpoint(run: Run, tmp_path: Path) -> None:
    names = tmp_path / "shades"
    write_task(names, SHADES)
    (names / "class_texts.csv").write_text("class,name,description\ndark,black,\ndark,,night\n")
    folder = run(tasks=[str(names)], method="finetune")
    texts = [["a photo of a dark.", "a photo of a black.", "night"], ["a photo of a light."]]
    model = load(folder.path)
    assert model.description is not None
    assert [*model.description.tasks[0].prompts()] == texts
    (wanted,) = evaluation(folder.path, {}).predictions()
    task = folder_task(names)
    found = model.predict([task.test.name(index) for index in range(len(task.test))])
    assert wanted.with_head is not None
    for place, each in enumerate(found):
        ranked = [wanted.with_head.own.classes[c][1] for c in wanted.with_head.own.ranked[place]]
        assert list(each.classes) == ranked
    # By name, a class has its texts, too.
    (_, weights) = model._texts(("light", "tiger", "dark"))
    assert [len(of) for of in weights] == [3]
    shutil.rmtree(names / "train")
    (names / "class_texts.csv").unlink()
    with pytest.raises(InputError, match="prompts are not those in its env.json"):
        evaluation(folder.path, {})


def test_an_unreadable_image_is_named(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    with pytest.raises(BadImage, match=r"a\.png"):
        model.predict(tmp_path)
    with pytest.raises(BadImage, match=r"a\.png"):
        model.encode_images(tmp_path)
    told: list[tuple[int, int]] = []
    one, other = model.predictions(
        find_images([tmp_path]), batch_size=1, told=lambda *count: told.append(count)
    )
    assert isinstance(one, BadImage) and not isinstance(other, BadImage)
    assert told == [(1, 2), (2, 2)]


def test_features_are_of_unit_length(model: Model, task_folders: tuple[str, str]) -> None:
    features = model.encode_images(Path(task_folders[0]) / "test", batch_size=4)
    assert features.shape == (15, 32) and features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(15))
    with pytest.raises(InputError, match="images: got an empty list"):
        model.encode_images([])


def test_classes_of_several_tasks(model: Model) -> None:
    """Those with the same prompts are one; others of one name have that of their task."""
    tasks = (
        LearnedTask("a", ("red", "blue"), ("a photo of a {}.",)),
        LearnedTask("b", ("red", "green"), ("a photo of a {}.",)),
        LearnedTask("c", ("blue",), ("a drawing of a {}.",)),
    )
    every = Model(model.clip, Description(tasks, {}, "", {}))
    assert every.classes == ("red", "blue (a)", "green", "blue (c)")
    (found,) = every.predict(Image.new("RGB", (9, 9)))
    assert sorted(found.classes) == sorted(every.classes)


def test_a_model_that_says_no_classes(start_model: dict[str, str]) -> None:
    model = load(start_model["model"])
    assert model.classes == () and model.description is None
    with pytest.raises(InputError, match="^classes: the model says none"):
        model.predict(Image.new("RGB", (9, 9)))
    assert model.predict(Image.new("RGB", (9, 9)), classes=["cat"])[0].label == "cat"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": "tiny-vit"}, "--pretrained none if random ones are meant"),
        ({"path": "nowhere"}, "no model 'nowhere'"),
        ({"path": "mulki-mini", "precision": "fp8"}, "--precision"),
    ],
)
def test_what_cannot_be_loaded(
    tiny_models: tuple[str, ...], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        load(**given)


def test_a_run_from_python(
    start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path
) -> None:
    colours, shades = task_folders
    given: dict[str, Any] = {**SHORT, "logs": str(tmp_path), "method": "finetune"}
    with without_figures():
        first = mulki.run(colours, model=start_model["model"], name="first", **given)
        second = first.model.learn([Path(shades)], name="second", logs=str(tmp_path))
        # Objects have no words by which they could be tested again.
        objects = replace(folder_task(shades), name="objects")
        third = second.model.learn(objects, name="third", logs=str(tmp_path))
        more = replace(folder_task(colours), name="more")
        fourth = third.model.learn([more], name="fourth", logs=str(tmp_path))
        alone = mulki.load(start_model["model"]).learn(colours, name="alone", **given)
    assert first.path == tmp_path / "first" and first.results.tasks == ("colours",)
    assert first.metrics.last == first.results.rows[0][0]
    assert second.results.tasks == ("colours", "shades")
    assert second.model.classes == ("blue", "green", "red", "dark", "light")
    assert third.results.tasks == ("colours", "shades", "objects")
    assert fourth.results.tasks == ("colours", "shades", "more")
    assert alone.results == first.results
    assert alone.model.source == str(alone.path)


def test_bad_calls(task_folders: tuple[str, str], tmp_path: Path) -> None:
    for tasks in ([], [task_folders[0], folder_task(task_folders[1])]):
        with pytest.raises(InputError, match="^tasks: got"):
            mulki.run(tasks)
    wrong: Any = 3
    with pytest.raises(InputError, match="^tasks: got int, wanted words, paths or Task objects"):
        mulki.run(wrong)
    with pytest.raises(InputError, match="^model: got int, wanted a name or a path"):
        mulki.run(task_folders[0], model=wrong)
    with pytest.raises(InputError, match="^path: got int, wanted a name or a path"):
        mulki.load(wrong)
    with pytest.raises(InputError, match="^--l3: no such option"):
        mulki.run(task_folders[0], l3=1)
    with pytest.raises(InputError, match="^--continue: .*no such file"):
        mulki.run(task_folders[0], continue_from=tmp_path / "gone")
    with pytest.raises(InputError, match="the first process of torchrun alone"):
        _ = mulki.Run(None).path


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"classes": "bear"}, r"classes: got 'bear', wanted a list of names; write \['bear'\]"),
        ({"classes": []}, "classes: got an empty list, wanted names"),
        ({"classes": ["bear", " "]}, "classes: got ' ', wanted names"),
        ({"classes": [1]}, "classes: got 1, wanted names"),
        ({"top": 0}, "top: got 0, wanted a whole number of at least 1"),
        ({"top": 1.5}, "top: got 1.5, wanted a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size: got 0, wanted a whole number of at least 1"),
        ({"threshold": float("nan")}, "threshold: got nan, wanted a number from 0 to 1"),
        ({"threshold": 2}, "threshold: got 2, wanted a number from 0 to 1"),
        ({"images": torch.zeros(2, 3)}, "images: got Tensor, wanted paths or pictures of PIL"),
        ({"images": None}, "images: got NoneType, wanted paths or pictures of PIL"),
    ],
)
def test_other_arguments_of_predict_are_refused(
    model: Model, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        model.predict(**{"images": Image.new("RGB", (8, 8))} | given)
