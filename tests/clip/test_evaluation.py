from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.clip.evaluation import Evaluator, LabelSpace, shared_classes, zero_shot_classifier
from mulki.clip.head import ClassStatistics, Head, Moments
from mulki.clip.models import VisionLanguageModel
from mulki.data import Task, caption_task, folder_task
from mulki.data.loader import batches
from mulki.errors import InputError
from tests import train_helpers
from tests.train_helpers import Calls

Load = Callable[..., VisionLanguageModel]
tiny_models = train_helpers.tiny_models
load_tiny = train_helpers.load_tiny
task_folders = train_helpers.task_folders
TEMPLATES = ("a photo of a {}.", "a blurry {}.", "{}, seen from afar.", "many {} and more {{}}.")


@pytest.fixture
def task(task_folders: tuple[str, str]) -> Task:
    return folder_task(task_folders[0], templates=TEMPLATES[:3])


def loader(
    model: VisionLanguageModel, task: Task, size: int, shuffle: bool = False, seed: int = 0
) -> Iterable[Sequence[Tensor]]:
    return batches(task.test, model.preprocess, size, shuffle=shuffle, seed=seed)


WAYS = [(1, False, 0), (7, False, 0), (64, False, 0), (1, True, 1), (4, True, 2), (64, True, 3)]


def predictions(
    model: VisionLanguageModel, task: Task, size: int, shuffle: bool, seed: int
) -> tuple[float, list[int]]:
    """The accuracy, and the number of right answers of each image alone in order of the set."""
    evaluator = Evaluator(model, [task], [loader(model, task, size, shuffle, seed)])
    accuracy, seen = evaluator.accuracy(0)
    assert seen == 15
    inputs = model.text_inputs([p for of_class in task.prompts() for p in of_class])
    classifier = zero_shot_classifier(model, inputs, 3)
    right = [0] * seen
    for images, target, places in loader(model, task, size, shuffle, seed):
        with torch.no_grad():
            predicted = (model.encode_images(images) @ classifier.mT).argmax(dim=1)
        for place, ok in zip(places.tolist(), (predicted == target).tolist(), strict=True):
            right[place] = int(ok)
    return accuracy, right


def assert_independent_of_batches(model: VisionLanguageModel, task: Task) -> None:
    answers = [predictions(model, task, *way) for way in WAYS]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == pytest.approx(100 * sum(answers[0][1]) / 15)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
def test_batches_and_order_do_not_matter(load_tiny: Load, task: Task, name: str) -> None:
    model = load_tiny(name)
    model.train()  # as after an epoch: the evaluator itself has to leave it
    assert_independent_of_batches(model, task)


def test_the_test_above_notices_a_model_that_looks_at_its_batch(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = VisionLanguageModel.encode_images

    def centred(model: VisionLanguageModel, images: Tensor) -> Tensor:
        features = real(model, images)
        return F.normalize(features - features.mean(dim=0), dim=-1)

    monkeypatch.setattr(VisionLanguageModel, "encode_images", centred)
    with pytest.raises(AssertionError):
        assert_independent_of_batches(load_tiny(), task)


def test_the_test_above_notices_batch_statistics(load_tiny: Load, task: Task) -> None:
    model = load_tiny("tiny-resnet")
    model.eval = model.clip.train  # type: ignore[method-assign]
    with pytest.raises((AssertionError, ValueError)):
        assert_independent_of_batches(model, task)


def test_evaluation_leaves_training_mode_and_statistics_alone(load_tiny: Load, task: Task) -> None:
    model = load_tiny("tiny-resnet")
    before = train_helpers.state_of(model)
    model.clip.train()
    Evaluator(model, [task], [loader(model, task, 7)]).accuracy(0)
    assert not any(module.training for module in model.clip.modules())
    assert train_helpers.same_state(train_helpers.state_of(model), before)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-biased"])
def test_classifier_is_that_of_open_clip(load_tiny: Load, name: str) -> None:
    model = load_tiny(name)
    model.eval()
    classes = ["red fox", "grey heron", "tree frog", "pond", "moss"]
    templates = list(TEMPLATES[:3])
    wanted = open_clip.build_zero_shot_classifier(
        model.clip, model.tokenizer, classes, templates, num_classes_per_batch=2
    )
    inputs = model.text_inputs([t.format(c) for c in classes for t in templates])
    torch.testing.assert_close(zero_shot_classifier(model, inputs, 5), wanted.mT)


def test_classes_may_have_unequal_numbers_of_texts(load_tiny: Load) -> None:
    model = load_tiny()
    model.eval()
    texts = [["a"], ["b", "c", "d"], ["e", "f"]]
    inputs = model.text_inputs([text for of_class in texts for text in of_class])
    each = [zero_shot_classifier(model, model.text_inputs(of), 1) for of in texts]
    torch.testing.assert_close(zero_shot_classifier(model, inputs, [1, 3, 2]), torch.cat(each))
    equal = zero_shot_classifier(model, inputs, [2, 2, 2])
    assert torch.equal(equal, zero_shot_classifier(model, inputs, 3))


def test_classifier_does_not_depend_on_the_text_batch(
    load_tiny: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny()
    model.eval()
    inputs = model.text_inputs([f"{t} {c}" for c in range(5) for t in "abc"])
    whole = zero_shot_classifier(model, inputs, 5)
    monkeypatch.setattr("mulki.clip.texts.TEXT_BATCH", 4)
    calls = Calls(monkeypatch)
    torch.testing.assert_close(zero_shot_classifier(model, inputs, 5), whole)
    assert calls.of(model, "texts") == [4, 4, 4, 3]


@pytest.fixture
def both(task_folders: tuple[str, str]) -> list[Task]:
    return [folder_task(folder, templates=TEMPLATES[:3]) for folder in task_folders]


def by_hand(model: VisionLanguageModel, tasks: list[Task], task: int) -> list[bool]:
    """Whether each test image of a task is right among the classes of all tasks, one by one."""
    model.eval()
    prompts = [p for t in tasks for of_class in t.prompts() for p in of_class]
    classes = sum(len(t.classes) for t in tasks)
    head = zero_shot_classifier(model, model.text_inputs(prompts), classes)
    names = [(t.name, c) for t in tasks for c in t.classes]
    right = []
    for index, target in enumerate(tasks[task].test.targets):
        with torch.no_grad():
            image = model.preprocess(tasks[task].test.load(index)).unsqueeze(0)
            best = int((model.encode_images(image) @ head.mT).argmax())
        right.append(names[best] == (tasks[task].name, tasks[task].classes[target]))
    return right


@pytest.mark.parametrize("way", [(7, False, 0), (64, True, 3)])
def test_seen_classes_compete(load_tiny: Load, both: list[Task], way: tuple[Any, ...]) -> None:
    model = load_tiny()
    evaluator = Evaluator(model, both, [loader(model, task, *way) for task in both])
    heads = {number: evaluator.classifier(number) for number in (0, 1)}
    found = [evaluator.answers(number, heads, [0, 1, 2]) for number in (0, 1)]
    assert [[a.seen is None for a in of] for of in found] == [[True, False, False]] + [
        [True, True, False]
    ]
    for number in (0, 1):
        alone = by_hand(model, both[number : number + 1], 0)
        assert all(a.own.tolist() == alone for a in found[number])
        assert found[number][0].accuracy == evaluator.accuracy(number)[0]
        together = found[number][2].seen
        assert together is not None and together.tolist() == by_hand(model, both, number)
    assert found[0][1].seen is not None and found[0][1].seen.tolist() == found[0][1].own.tolist()
    # Some image is lost to a class of the other task, or the test would show nothing.
    assert sum(int(of[2].own.sum() - of[2].seen.sum()) for of in found) > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("space", ["task", "all"])
def test_a_head_answers_beside_the_texts(
    load_tiny: Load, both: list[Task], space: LabelSpace
) -> None:
    model = load_tiny()
    loaders = [loader(model, task, 7) for task in both]
    evaluator = Evaluator(model, both, loaders, label_space=space)
    texts = {number: evaluator.classifier(number) for number in (0, 1)}
    heads = {}
    statistics = ClassStatistics()
    for number, task in enumerate(both):
        moments = Moments(len(task.classes))
        for images, target, _ in loaders[number]:
            with torch.no_grad():
                moments.add(model.encode_images(images), target)
        statistics = statistics.with_task(*moments.of(task))
        scale = float(model.logit_scale)
        heads[number + 1] = Head(statistics, both, scale, shrinkage=0.1, weight=1.0)
    changed = 0
    for number, task in enumerate(both):
        plain = evaluator.answers(number, texts, [0, 1, 2])
        found = evaluator.answers(number, texts, [0, 1, 2], heads)
        assert found[0].head is None
        for one, other, count in zip(plain, found, (0, 1, 2), strict=True):
            assert one.own.tolist() == other.own.tolist()
            if not count:
                continue
            assert other.head is not None and other.head.head is None
            assert (other.head.seen is None) == (other.seen is None)
            features = torch.cat(
                [model.encode_images(images).detach() for images, *_ in loaders[number]]
            )
            cosines = {n: features @ of.mT for n, of in texts.items()}
            tasks = [0, 1] if space == "all" else [number]
            said = heads[count].scores(features, cosines, tasks).argmax(dim=1)
            before = len(both[0].classes) if space == "all" and number else 0
            right = said == torch.tensor(list(task.test.targets)) + before
            assert other.head.own.tolist() == right.tolist()
            changed += int((other.head.own != other.own).sum())
    assert changed, "or the test would show nothing"


@pytest.mark.parametrize("space", ["seen", "all"])
def test_other_label_spaces(load_tiny: Load, both: list[Task], space: LabelSpace) -> None:
    model = load_tiny()
    loaders = [loader(model, task, 64) for task in both]
    evaluator = Evaluator(model, both, loaders, label_space=space)
    heads = {number: evaluator.classifier(number) for number in (0, 1)}
    differs = False
    for number in (0, 1):
        alone, together = by_hand(model, both[number : number + 1], 0), by_hand(model, both, number)
        differs |= alone != together
        first, second, last = evaluator.answers(number, heads, [0, 1, 2])
        targets = np.asarray(both[number].test.targets)
        before = len(both[0].classes) if number else 0
        for each in (first, second, last):
            # What was said is the class where it was right, and another where it was not.
            assert each.said is not None
            assert ((each.said == targets + before) == each.own).all()
        assert last.own.tolist() == together and first.seen is None
        assert last.seen is not None and last.seen.tolist() == together
        wanted = together if space == "all" else alone
        assert first.own.tolist() == second.own.tolist() == wanted
        assert evaluator.accuracy(number)[0] == first.accuracy
    assert differs  # or the test would show nothing
    if space == "all":
        # After the first task its own classes are those seen, not those of the label space.
        second = evaluator.answers(0, heads, [1])[0]
        assert second.seen is not None and second.seen.tolist() == by_hand(model, both[:1], 0)


def test_shared_classes_are_those_with_the_same_prompts(task: Task) -> None:
    other = dataclasses.replace(task, name="other", classes=(task.classes[1], "x", "y"))
    assert shared_classes([task, other]) == {task.classes[1]: [task.name, "other"]}
    assert shared_classes([task, dataclasses.replace(other, templates=("no {}",))]) == {}


def test_classes_of_two_tasks_with_the_same_prompts_are_one_class(
    load_tiny: Load, task: Task
) -> None:
    model = load_tiny()
    again = dataclasses.replace(task, name="again", classes=task.classes[::-1])
    tasks = [task, again]
    evaluator = Evaluator(model, tasks, [loader(model, t, 64) for t in tasks])
    heads = {number: evaluator.classifier(number) for number in range(2)}
    # Whichever of the equal scores is the largest, which rounding decides.
    for factor in (1.0, 1 + 1e-6, 1 - 1e-6):
        heads[1] = heads[1] * factor
        (answers,) = evaluator.answers(0, heads, [2])
        assert answers.seen is not None and answers.seen.tolist() == answers.own.tolist()
        assert answers.own.any()
    # Capitals make no other class in another task, but they do within a task.
    first, *others = task.classes
    tasks = [dataclasses.replace(task, classes=(first, first.upper(), *others[1:])), again]
    tasks[1] = dataclasses.replace(again, classes=(first.title(), "x", "y"))
    evaluator = Evaluator(model, tasks, [loader(model, t, 64) for t in tasks])
    assert evaluator._first_alike(range(2)).tolist() == [0, 1, 2, 0, 4, 5]
    assert shared_classes(tasks) == {first: [task.name, "again"]}
    tasks[0] = task
    # Another template makes another class of the same name.
    tasks[1] = dataclasses.replace(task, name="again", templates=("not a {}",))
    evaluator = Evaluator(model, tasks, [loader(model, t, 64) for t in tasks])
    (second,) = evaluator.answers(1, {0: heads[0], 1: heads[0]}, [2])
    # Of equal scores the first wins.
    assert second.own.any() and second.seen is not None and not second.seen.any()


def test_images_are_encoded_once_for_all_heads(
    load_tiny: Load, both: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny()
    evaluator = Evaluator(model, both, [loader(model, task, 7) for task in both])
    heads = {number: evaluator.classifier(number) for number in (0, 1)}
    calls = Calls(monkeypatch)
    evaluator.answers(0, heads, [0, 1, 2])
    assert calls.of(model, "images") == [7, 7, 1] and calls.of(model, "texts") == []


def test_texts_are_tokenized_once_and_encoded_again(
    load_tiny: Load, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny()
    real: Any = model.tokenizer
    tokenized: list[int] = []
    model.tokenizer = lambda texts: tokenized.append(len(texts)) or real(texts)
    calls = Calls(monkeypatch)
    evaluator = Evaluator(model, [task], [loader(model, task, 64)])
    evaluator.accuracy(0)
    with torch.no_grad():
        for p in model.clip.transformer.parameters():
            p.normal_()
    evaluator.accuracy(0)
    assert tokenized == [9]
    assert calls.of(model, "texts") == [9, 9]


def test_locked_texts_are_encoded_once(load_tiny: Load, task: Task) -> None:
    model = load_tiny()
    model.lock(text=True)
    asked: list[int] = []
    real = model.clip.encode_text
    model.clip.encode_text = lambda tokens: asked.append(len(tokens)) or real(tokens)
    evaluator = Evaluator(model, [task], [loader(model, task, 64)])
    assert evaluator.accuracy(0) == evaluator.accuracy(0)
    assert asked == [9]


def test_no_graph_is_built(load_tiny: Load, task: Task) -> None:
    model = load_tiny()
    inputs = model.text_inputs([p for of_class in task.prompts() for p in of_class])
    assert not zero_shot_classifier(model, inputs, 3).requires_grad


@pytest.mark.parametrize("part", ["visual.proj", "text_projection"])
def test_features_that_are_not_finite_have_no_accuracy(
    load_tiny: Load, task: Task, part: str
) -> None:
    model = load_tiny()
    evaluator = Evaluator(model, [task], [loader(model, task, 4)])
    with torch.no_grad():
        model.clip.get_parameter(part).fill_(3e38)  # finite, and its products are not
    with pytest.raises(InputError, match="task colours: .* features .* not finite"):
        evaluator.accuracy(0)


def test_captions_by_images_and_images_by_captions(load_tiny: Load, tmp_path: Path) -> None:
    file = train_helpers.write_pairs(tmp_path / "flags")
    # A second picture of the first flag, and a second caption of its first picture.
    lines = file.read_text().splitlines()
    first = next(line for line in lines if line.endswith(",test"))
    name, text, _ = first.split(",")
    learned = next(line for line in lines if line.endswith(",train"))
    shutil.copy(file.parent / learned.split(",")[0], file.parent / "again.png")
    file.write_text("\n".join([*lines, f"again.png,{text},test", f'{name},"a flag",test', ""]))
    task, model = caption_task(file), load_tiny()
    assert (len(task.test), len(task.test.texts())) == (7, 7)
    (row,) = Evaluator(model, [task], [loader(model, task, 3, shuffle=True, seed=1)]).answers(
        0, {0: Evaluator(model, [task], []).classifier(0)}, [1]
    )
    texts = model.encode_texts(model.text_inputs(task.test.texts()))
    images = model.encode_images(
        torch.stack([model.preprocess(task.test.load(i)) for i in range(7)])
    )
    similar = images @ texts.T
    right = torch.tensor([[t in of for t in task.test.texts()] for of in task.test.captions])
    assert row.ranks is not None and right.sum() == 8
    for found, scores, wanted in (
        (row.ranks.images, similar, right),
        (row.ranks.texts, similar.T, right.T),
    ):
        best = torch.where(wanted, scores, -torch.inf).amax(dim=1, keepdim=True)
        assert found.tolist() == (scores > best).sum(dim=1).tolist()
    assert row.said is not None and row.said.tolist() == similar.argmax(dim=1).tolist()
    assert row.own.tolist() == (row.ranks.images == 0).tolist()


def test_each_image_and_each_caption_is_encoded_once(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = train_helpers.write_pairs(tmp_path / "flags", kinds=2)
    name = file.read_text().splitlines()[-1].split(",")[0]
    more = ["a flag", "A  FLAG", "some flag", "a flag on a pole"]
    with file.open("a") as stream:
        stream.writelines(f'{name},"{text}",test\n' for text in more)
    task, model = caption_task(file), load_tiny()
    calls = train_helpers.Calls(monkeypatch)
    evaluator = Evaluator(model, [task], [loader(model, task, 64)])
    (row,) = evaluator.answers(0, {0: evaluator.classifier(0)}, [1])
    assert calls.of(model, "images") == [2] and calls.of(model, "texts") == [5]
    assert row.ranks is not None and len(row.ranks.texts) == 5


def test_a_caption_in_other_capitals_takes_no_place(load_tiny: Load, tmp_path: Path) -> None:
    file = train_helpers.write_pairs(tmp_path / "flags", kinds=5)
    recalls = []
    for _ in range(2):
        task, model = caption_task(file), load_tiny()
        evaluator = Evaluator(model, [task], [loader(model, task, 64)])
        (row,) = evaluator.answers(0, {0: evaluator.classifier(0)}, [1])
        recalls.append(row.metrics())
        # The same pictures under other names, with their captions in capitals.
        lines = [line for line in file.read_text().splitlines() if line.endswith(",test")]
        with file.open("a") as stream:
            for line in lines:
                name, text, _ = line.split(",")
                shutil.copy(file.parent / name, file.parent / f"{name}.png")
                stream.write(f"{name}.png,{text.upper()},test\n")
    once, twice = recalls
    for metric in ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1"):
        assert once[metric][0] == twice[metric][0]
    assert twice["text_to_image_R@1"][1] == 5 and twice["image_to_text_R@1"][1] == 10


def test_captions_with_features_that_are_not_finite(load_tiny: Load, tmp_path: Path) -> None:
    task, model = caption_task(train_helpers.write_pairs(tmp_path / "flags")), load_tiny()
    with torch.no_grad():
        model.clip.visual.proj.fill_(float("nan"))
    evaluator = Evaluator(model, [task], [loader(model, task, 3)])
    with pytest.raises(InputError, match="^task flags: 6 features"):
        evaluator.accuracy(0)
