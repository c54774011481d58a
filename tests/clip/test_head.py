from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mulki.clip.head import ClassStatistics, Head, Moments, read_statistics, write_statistics
from mulki.clip.tensor_files import save_tensors
from mulki.data import Task
from mulki.errors import InputError

WIDTH, SCALE, SHRINKAGE, WEIGHT = 5, 20.0, 0.1, 0.25


class Nothing:
    """A split with a target for each class and no image that is looked at."""

    def __init__(self, classes: int):
        self.targets = list(range(classes))

    def __len__(self) -> int:
        return len(self.targets)


def task(name: str, classes: str) -> Task:
    images = Nothing(len(classes))
    return Task(name, tuple(classes), ("a {}.", "the {}."), images, images)  # type: ignore[arg-type]


TASKS = [task("one", "ab"), task("two", "cde"), task("three", "fg")]


def learned(
    unit: Callable[..., Tensor], tasks: list[Task]
) -> tuple[ClassStatistics, dict[str, Tensor]]:
    """Statistics of some tasks, and the images of each class that they are of."""
    statistics, images = ClassStatistics(), {}
    for each in tasks:
        moments = Moments(len(each.classes))
        of_class = {name: unit(4 + place, WIDTH) for place, name in enumerate(each.classes)}
        features = torch.cat([*of_class.values()])
        target = torch.cat([torch.full((len(x),), i) for i, x in enumerate(of_class.values())])
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
        for part in order.split(3):
            moments.add(features[part], target[part])
        statistics = statistics.with_task(*moments.of(each))
        images |= of_class
    return statistics, images


def expected_layers(images: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The second term of the score by its formula: matrix [C, D] and bias [C]."""
    means = torch.stack([x.mean(dim=0) for x in images.values()])
    rows = torch.cat([x - x.mean(dim=0) for x in images.values()])
    covariance = rows.T @ rows / (len(rows) - len(images))
    mixed = (1 - SHRINKAGE) * covariance
    mixed = mixed + SHRINKAGE * covariance.trace() / WIDTH * torch.eye(WIDTH, dtype=mixed.dtype)
    linear = means @ torch.linalg.inv(mixed)
    return WEIGHT * linear, -WEIGHT * (linear * means).sum(dim=1) / 2


def cosines(unit: Callable[..., Tensor], features: Tensor) -> dict[int, Tensor]:
    return {n: features @ unit(len(of.classes), WIDTH).T for n, of in enumerate(TASKS)}


def head_of(statistics: ClassStatistics, weight: float = WEIGHT) -> Head:
    return Head(statistics, TASKS, SCALE, SHRINKAGE, weight)


def test_all_classes_learned(unit: Callable[..., Tensor]) -> None:
    statistics, images = learned(unit, TASKS)
    features = unit(9, WIDTH)
    by_texts = cosines(unit, features)
    got = head_of(statistics).scores(features, by_texts, [0, 1, 2])
    linear, bias = expected_layers(images)
    texts = SCALE * torch.cat([by_texts[n] for n in range(3)], dim=1)
    expected = texts + features @ linear.T + bias
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    # Of one task: its columns, with the covariance of all.
    got = head_of(statistics).scores(features, by_texts, [1])
    torch.testing.assert_close(got.double(), expected[:, 2:5], rtol=1e-4, atol=1e-4)


def test_among_classes_that_are_not_learned_the_texts_decide(unit: Callable[..., Tensor]) -> None:
    statistics, _ = learned(unit, TASKS[:2])
    features = unit(200, WIDTH)
    by_texts = cosines(unit, features)
    head = head_of(statistics, weight=3.0)
    assert 0 in head and 1 in head and 2 not in head
    got = head.scores(features, by_texts, [0, 1, 2])
    texts = SCALE * torch.cat([by_texts[n] for n in range(3)], dim=1).float()
    assert got[:, 5:].equal(texts[:, 5:])
    torch.testing.assert_close(got[:, :5].amax(dim=1), texts[:, :5].amax(dim=1))
    said, by_texts_said = got.argmax(dim=1), texts.argmax(dim=1)
    assert ((said < 5) == (by_texts_said < 5)).all(), "no image changes sides"
    among = head.scores(features, by_texts, [0, 1]).argmax(dim=1)
    assert (said[said < 5] == among[said < 5]).all()
    assert (said != by_texts_said).any(), "the head has a say"
    assert head.scores(features, by_texts, [2]).equal(texts[:, 5:])


def test_an_image_a_class_leaves_the_texts_alone(unit: Callable[..., Tensor]) -> None:
    moments = Moments(2)
    for target in (1, 0):
        moments.add(unit(1, WIDTH), torch.tensor([target]))
    statistics = ClassStatistics().with_task(*moments.of(TASKS[0]))
    assert statistics.scatter is not None
    # What rounding leaves of it on some CPUs, where others leave exactly nothing.
    rounding = torch.full_like(statistics.scatter, 1e-17)
    statistics = replace(statistics, scatter=statistics.scatter + rounding)
    features = unit(9, WIDTH)
    by_texts = cosines(unit, features)
    got = head_of(statistics).scores(features, by_texts, [0])
    assert got.equal(SCALE * by_texts[0].float())


def test_a_mean_moves_as_the_images_near_it(unit: Callable[..., Tensor]) -> None:
    statistics, _ = learned(unit, TASKS[:2])
    before, after = unit(40, WIDTH), unit(40, WIDTH)
    found = statistics.shifted(before.float(), after.float())
    for old, new in zip(statistics.tasks, found.tasks, strict=True):
        for mean, moved in zip(old.means.double(), new.means, strict=True):
            # Semantic drift compensation, equations 12 and 13, with sigma = 0.3.
            near = torch.exp(-((before - mean) ** 2).sum(dim=1) / (2 * 0.3**2))
            expected = mean + (near[:, None] * (after - before)).sum(dim=0) / near.sum()
            torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-5)
        assert new.counts.equal(old.counts)
    assert found.scatter is statistics.scatter
    # None of the images is near: the nearest one decides, and nothing is divided by zero.
    far = torch.full((1, WIDTH), 100.0)
    (one, _) = statistics.shifted(far, far + 1).tasks
    torch.testing.assert_close(one.means, statistics.tasks[0].means + 1)


def test_a_class_is_known_by_its_prompts(unit: Callable[..., Tensor]) -> None:
    statistics, images = learned(unit, TASKS[:2])
    others = [task("mixed", "dbc"), task("half", "ax"), replace(TASKS[0], templates=("no {}",))]
    (found,) = statistics.means_of(others).items()
    assert found[0] == 0
    expected = torch.stack([images[name].mean(dim=0) for name in "dbc"])
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_class_of_two_tasks_has_all_its_images(unit: Callable[..., Tensor]) -> None:
    again = replace(TASKS[1], name="again", classes=("D", "c", "h"))
    statistics, images = learned(unit, [TASKS[0], TASKS[1]])
    more, of_again = learned(unit, [again])
    assert more.scatter is not None
    statistics = statistics.with_task(more.tasks[0], more.scatter)
    for name, features in of_again.items():
        key = name.lower()
        images[key] = torch.cat([images[key], features]) if key in images else features
    linear, bias = expected_layers(images)
    head = Head(statistics, [*TASKS[:2], again], SCALE, SHRINKAGE, WEIGHT)
    for number, columns in ((0, [0, 1]), (1, [2, 3, 4]), (2, [3, 2, 5])):
        got = head.layer(number)
        torch.testing.assert_close(got[0].double(), linear[columns], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1].double(), bias[columns], rtol=1e-4, atol=1e-4)


def test_statistics_of_another_model(unit: Callable[..., Tensor]) -> None:
    head, features = head_of(learned(unit, TASKS[:1])[0]), unit(2, WIDTH + 1)
    with pytest.raises(InputError, match="of 5 features, but the model has 6"):
        head.scores(features, {0: unit(2, 2)}, [0])


def test_statistics_on_disk_and_in_a_save(unit: Callable[..., Tensor], tmp_path: Path) -> None:
    statistics, _ = learned(unit, TASKS[:2])
    write_statistics(tmp_path / "a.safetensors", statistics)
    read = read_statistics(tmp_path / "a.safetensors")
    saved = ClassStatistics.of_state(statistics.state())
    for other in (read, saved):
        assert [vars(t).keys() for t in other.tasks] == [vars(t).keys() for t in statistics.tasks]
        for one, of in zip(other.tasks, statistics.tasks, strict=True):
            assert (one.task, one.classes, one.prompts) == (of.task, of.classes, of.prompts)
            assert one.means.equal(of.means) and one.counts.equal(of.counts)
        assert other.scatter is not None and other.scatter.equal(statistics.scatter)
    write_statistics(tmp_path / "b.safetensors", read)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert ClassStatistics.of_state(ClassStatistics().state()).tasks == ()


@pytest.mark.parametrize(
    "damage", ["format", "metadata", "means", "classes", "scatter", "nan", "count"]
)
def test_files_that_are_something_else(
    unit: Callable[..., Tensor], tmp_path: Path, damage: str
) -> None:
    state = learned(unit, TASKS[:2])[0].state()
    state.pop("tasks")
    names = '[{"task": "one", "classes": ["a", "b"], "prompts": [["a"], ["b"]]}]'
    metadata = {"format": "class statistics 1", "tasks": names}
    state |= {"means": state["means"][:2], "counts": state["counts"][:2]}
    if damage == "format":
        metadata["format"] = "other"
    elif damage == "metadata":
        metadata["tasks"] = "[1]"
    elif damage == "classes":
        metadata["tasks"] = names.replace('["a"], ', "")
    elif damage == "means":
        state["means"] = state["means"][:1]
    elif damage == "nan":
        state["means"] = state["means"] * torch.nan
    elif damage == "count":
        state["counts"] = state["counts"] * 0
    else:
        state["scatter"] = state["scatter"][:1].clone()
    save_tensors(tmp_path / "x.safetensors", state, metadata)
    with pytest.raises(InputError, match="not class statistics that this version reads"):
        read_statistics(tmp_path / "x.safetensors")
