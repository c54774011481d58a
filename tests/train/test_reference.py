"""Methods that distil on a reference set of images and captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki import methods
from mulki.clip.features import Features
from mulki.clip.models import VisionLanguageModel
from mulki.data import Task
from mulki.data.reference import ReferenceSet, read_reference
from mulki.data.vocabulary import Vocabulary, imagenet_vocabulary
from mulki.distributed.world import World
from mulki.errors import InputError
from mulki.methods import PREVIOUS, ZERO_SHOT, Method
from mulki.train.config.precision import Precision
from mulki.train.config.run_config import RunConfig, resolve
from mulki.train.learning.batches import kept_samples
from mulki.train.learning.class_step import Step
from mulki.train.learning.inputs import TaskInputs, Training
from mulki.train.learning.learn import learn_task
from mulki.train.sequence import run
from tests.train.learn_helpers import training_of
from tests.train.reference_method import OnReference
from tests.train_helpers import Calls, same_state, state_of, write_reference

Load = Callable[..., VisionLanguageModel]
CONFIG = RunConfig(iterations=4, batch_size=6, lr=1e-3, eps=1e-4, reference_batch_size=5)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "reference")


def learn(
    load: Load,
    task: Task,
    reference: ReferenceSet | None,
    method: Method | None = None,
    *,
    opaque: bool = False,
    precision: str = "fp32",
    locked: bool = False,
    **changes: Any,
) -> VisionLanguageModel:
    student = load()
    student.lock(text=locked)
    teachers = {ZERO_SHOT: load(seed=1).frozen_copy(), PREVIOUS: load(seed=2).frozen_copy()}
    training = Training(
        config=replace(CONFIG, **changes),
        method=method or OnReference(Method.Options()),
        model=student,
        transform=(lambda image: student.preprocess(image)) if opaque else student.preprocess,
        precision=Precision(precision, CPU),  # type: ignore[arg-type]
    )
    learn_task(training, TaskInputs(0, task, teachers, reference))
    return student


def assert_near(one: VisionLanguageModel, other: VisionLanguageModel) -> None:
    for key, value in state_of(one).items():
        torch.testing.assert_close(value, state_of(other)[key], rtol=0, atol=2e-5)


# --- what the losses get


def test_pairs_of_student_and_teachers(load_tiny: Load, task: Task, folder: Path) -> None:
    reference, method = read_reference(folder), OnReference(Method.Options())
    learn(load_tiny, task, reference, method, lr=1e-30)
    student = load_tiny()
    models = (student, load_tiny(seed=1), load_tiny(seed=2))
    batches = []
    for of_student, teachers in method.seen:
        for model, features in zip(models, (of_student, *teachers), strict=True):
            pairs = features.reference
            assert pairs is not None and pairs.prototypes is None and pairs.reference is None
            assert pairs.images.shape == pairs.texts.shape == (5, 32)
            whole = encoded(model, reference)
            found = [place_of(row, whole[0]) for row in pairs.images]
            assert found == [place_of(row, whole[1]) for row in pairs.texts]
            batches.append(found)
    assert all(batch == batches[place - place % 3] for place, batch in enumerate(batches))
    assert len({*batches[0], *batches[3]}) == 10, "batches of an epoch do not overlap"


@torch.no_grad()
def encoded(model: VisionLanguageModel, reference: ReferenceSet) -> tuple[Tensor, Tensor]:
    pixels = [model.preprocess(reference.images.load(i)) for i in range(len(reference))]
    texts = model.encode_texts(model.text_inputs(reference.captions))
    return model.encode_images(torch.stack(pixels)), texts


def place_of(row: Tensor, whole: Tensor) -> int:
    distances = (whole - row).norm(dim=1)
    assert distances.min() < 1e-4
    return int(distances.argmin())


def test_the_reference_matters(load_tiny: Load, task: Task, folder: Path) -> None:
    one = learn(load_tiny, task, read_reference(folder))
    lines = (folder / "captions.csv").read_text().replace("picture", "a bottle and")
    (folder / "captions.csv").write_text(lines)
    other = learn(load_tiny, task, read_reference(folder))
    assert not same_state(state_of(one), state_of(other))


# --- gradients


def first_gradients(
    load: Load, task: Task, reference: ReferenceSet, patch: pytest.MonkeyPatch, **changes: Any
) -> dict[str, Tensor]:
    gradients: dict[str, Tensor] = {}
    real = Step.update

    def update(step: Step, lr: float) -> None:
        if not gradients:
            gradients.update(
                (name, p.grad.clone())
                for name, p in step._model.trainable().items()
                if p.grad is not None
            )
        real(step, lr)

    patch.setattr(Step, "update", update)
    learn(load, task, reference, iterations=1, **changes)
    return gradients


@pytest.mark.parametrize(
    ("micro", "size", "locked"),
    [
        *(("1", 5, False), ("2", 5, False), ("4", 3, False), ("6", 11, False), ("auto", 9, False)),
        ("4", 3, True),
    ],
)
def test_micro_batches_have_the_same_gradients(
    load_tiny: Load,
    task: Task,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro: str,
    size: int,
    locked: bool,
) -> None:
    reference = read_reference(folder)
    ours, wanted = (
        first_gradients(
            load_tiny,
            task,
            reference,
            monkeypatch,
            micro_batch=micro_batch,
            reference_batch_size=size,
            locked=locked,
        )
        for micro_batch in (micro, None)
    )
    assert ours.keys() == wanted.keys()
    assert ("token_embedding.weight" in wanted) != locked
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_are_those_of_a_plain_loop(
    load_tiny: Load, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both batches are the whole sets, so their order does not matter."""
    reference = read_reference(folder)
    ours = first_gradients(
        load_tiny, task, reference, monkeypatch, batch_size=18, reference_batch_size=12
    )
    student, method = load_tiny(), OnReference(Method.Options())
    student.train()
    with torch.enable_grad():
        features = plain_features(student, task, reference)
        with torch.no_grad():
            teachers = tuple(plain_features(load_tiny(seed=s), task, reference) for s in (1, 2))
        target = torch.tensor(list(task.train.targets))
        sum(method.losses(features, teachers, target).values()).backward()
    for name, parameter in student.trainable().items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def plain_features(model: VisionLanguageModel, task: Task, reference: ReferenceSet) -> Features:
    def images(of: Any) -> Tensor:
        return torch.stack([model.preprocess(of.load(i)) for i in range(len(of))])

    def texts(prompts: Sequence[str]) -> Tensor:
        return model.encode_texts(model.text_inputs(prompts))

    scale = model.logit_scale
    pairs = Features(
        model.encode_images(images(reference.images)), texts(reference.captions), scale
    )
    prompts = [of_class[0] for of_class in task.prompts()]
    return Features(model.encode_images(images(task.train)), texts(prompts), scale, reference=pairs)


def test_precision_reaches_the_pairs(load_tiny: Load, task: Task, folder: Path) -> None:
    reference = read_reference(folder)
    half = learn(load_tiny, task, reference, precision="amp_bf16")
    whole = learn(load_tiny, task, reference)
    assert not same_state(state_of(half), state_of(whole))


# --- teachers


def test_teachers_keep_what_comes_up_again(
    load_tiny: Load, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = read_reference(folder)
    calls = Calls(monkeypatch)
    kept = learn(load_tiny, task, reference)
    encoded = [n for clip, kind, n in calls._log if kind == "texts" and clip != id(kept.clip)]
    # Both teachers: 3 class texts, then each of the 12 captions once.
    assert sum(encoded) == 2 * (3 + 12)
    assert_near(kept, learn(load_tiny, task, reference, opaque=True))


@pytest.mark.parametrize(("steps", "size", "kept"), [(2, 5, None), (2, 6, None), (3, 5, 12)])
def test_teachers_keep_nothing_of_a_set_that_is_not_seen_twice(
    load_tiny: Load, task: Task, folder: Path, steps: int, size: int, kept: int | None
) -> None:
    training = training_of(load_tiny(), config=replace(CONFIG, reference_batch_size=size))
    reference = read_reference(folder)
    assert kept_samples(training, task, reference, steps) == (18, kept)
    two = replace(training, world=World(0, 2))
    assert kept_samples(two, task, reference, steps) == (18, 12)
    assert kept_samples(training, task, None, steps) == (18, None)
    random = replace(training, transform=lambda x: x)
    assert kept_samples(random, task, reference, steps) == (None, None)


def test_the_set_has_to_fit_the_method(load_tiny: Load, task: Task, folder: Path) -> None:
    method = OnReference(Method.Options())
    with pytest.raises(ValueError, match="^reference: got None"):
        learn(load_tiny, task, None, method)
    finetune = methods.get("finetune")
    with pytest.raises(ValueError, match="^reference: got a reference set"):
        learn(load_tiny, task, read_reference(folder), finetune(finetune.Options()))


# --- runs


@pytest.fixture
def options(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_model: dict[str, str],
    task_folders: tuple[str, str],
) -> dict[str, Any]:
    monkeypatch.setattr(OnReference, "name", "on_reference", raising=False)
    return {
        "method": "on_reference",
        "tasks": task_folders,
        "logs": str(tmp_path / "logs"),
        "name": "first",
        "iterations": 3,
        "batch_size": 6,
        "lr": 1e-3,
        "precision": "fp32",
        "device": "cpu",
        **start_model,
    }


def test_a_run_with_a_folder(options: dict[str, Any], folder: Path) -> None:
    done = run(resolve(options | {"reference": str(folder), "reference_batch_size": 4}))
    assert done is not None and done.status == "complete"
    assert done.uses == ("reference images and captions",)
    hashes = json.loads((done.path / "env.json").read_text())["hashes"]
    assert hashes["reference"] == read_reference(folder).fingerprint()
    assert "reference_0 " in (done.path / "out.log").read_text()


def test_unreadable_images_are_left_out_and_logged(options: dict[str, Any], folder: Path) -> None:
    (folder / "red" / "0.png").write_bytes(b"x")
    given = options | {"reference": str(folder)}
    with pytest.raises(InputError, match=r"0\.png"):
        run(resolve(given))
    done = run(resolve(given | {"skip_bad_images": True}))
    assert done is not None
    assert "reference set: unreadable images left out: 1" in (done.path / "out.log").read_text()


def test_a_run_on_the_current_images(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    hashes = {}
    for name, vocabulary in (("names", None), ("words", str(tmp_path / "words.txt"))):
        given = {"reference": "current", "vocabulary": vocabulary, "name": name}
        done = run(resolve(options | given))
        assert done is not None and done.status == "complete"
        assert done.uses == ("a vocabulary of words",)
        hashes[name] = json.loads((done.path / "env.json").read_text())["hashes"]
        assert "reference" not in hashes[name]
        words = "999 words of ImageNet's class names" if vocabulary is None else "2 words of "
        assert f"uses     {words}" in (done.path / "out.log").read_text()
    assert hashes["names"]["vocabulary"] == imagenet_vocabulary().fingerprint()
    assert hashes["words"]["vocabulary"] == Vocabulary(("cat", "dog")).fingerprint()


@pytest.mark.parametrize("given", ["current", "folder"])
def test_images_alone(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (folder / "captions.csv").unlink()
    calls = Calls(monkeypatch)
    reference = str(folder) if given == "folder" else given
    done = run(resolve(options | {"method": "snd", "reference": reference}))
    assert done is not None and done.status == "complete"
    assert done.uses == (("reference images",) if given == "folder" else ())
    hashes = json.loads((done.path / "env.json").read_text())["hashes"]
    assert "vocabulary" not in hashes
    # Class texts, and the words by which it is seen how far the student has moved.
    assert {n for _, kind, n in calls._log if kind == "texts"} == {3, 2, 256}


def test_captions_are_encoded_by_the_teacher_alone(
    load_tiny: Load, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, zscl = Calls(monkeypatch), methods.get("zscl")
    student = learn(load_tiny, task, read_reference(folder), zscl(zscl.Options()))
    assert set(calls.of(student, "texts")) == {3}
    of_teacher = [n for clip, kind, n in calls._log if kind == "texts" and clip != id(student.clip)]
    assert sum(of_teacher) == 3 + 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"reference": None},
            "--reference: method on_reference distils on images with captions and got none",
        ),
        (
            {"method": "snd", "reference": None},
            "--reference: method snd distils on reference images and got none",
        ),
        (
            {"method": "snd", "reference": "current", "vocabulary": "words.txt"},
            "--vocabulary: got words.txt, but method snd",
        ),
        (
            {"method": "zscl", "reference": "current", "vocabulary": "nowhere.txt"},
            "--vocabulary: nowhere.txt cannot be read",
        ),
        ({"method": "lwf", "reference": "current"}, "--reference: got current, but method lwf"),
        (
            {"method": "lwf", "reference_batch_size": 4},
            "--reference-batch-size: got 4, but method lwf",
        ),
        ({"reference": "nowhere"}, "--reference: no file or folder nowhere"),
        ({"reference": ""}, "--reference: got an empty path, wanted a CSV"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_folder_is_made(
    options: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=f"^{said}") as info:
        run(resolve(options | changes))
    assert "\n" not in str(info.value)
    assert not (tmp_path / "logs").exists()
