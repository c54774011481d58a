from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset, random_split
from torchvision import transforms as tv
from torchvision.datasets import CIFAR10, FakeData, ImageFolder

from mulki.data import BadImage, DatasetImages, Task, dataset_task
from mulki.data.loader import batches
from mulki.errors import InputError
from tests import python
from tests.data.data_helpers import Blank, picture


class Pictures:
    """A map-style data set of four pictures that counts what is loaded."""

    def __init__(self, answers: Any = (0, 1, 1, 0), **attributes: Any) -> None:
        self._answers = answers
        self.loaded: list[int] = []
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        self.loaded.append(index)
        return picture(index), self._answers[index]


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(make: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": [0, 1, 1, 0]},
        {"targets": torch.tensor([0, 1, 1, 0])},
        {"labels": np.array([0, 1, 1, 0], dtype=np.uint8)},
        {"_labels": (0, 1, 1, 0)},
        {"samples": [("a", 0), ("b", 1), ("c", 1), ("d", 0)]},
        {"targets": [np.int64(0), np.int64(1), torch.tensor(1), 0]},
    ],
)
def test_stored_labels_are_taken_without_decoding(attributes: dict[str, Any]) -> None:
    data = Pictures(**attributes)
    images = DatasetImages(data)
    assert images.targets == [0, 1, 1, 0] and all(type(t) is int for t in images.targets)
    assert set(data.loaded) == {0, 2, 3}, "first, middle and last"
    part = DatasetImages(Subset(data, [2, 0]))  # type: ignore[arg-type]
    assert part.targets == [1, 0]
    assert np.array_equal(pixels(part.load(1)), picture(0))


def test_labels_are_read_from_the_items_where_none_are_stored() -> None:
    data = Pictures(answers=torch.tensor([1, 0, 0, 1]))
    assert DatasetImages(data).targets == [1, 0, 0, 1]
    assert set(data.loaded) == {0, 1, 2, 3}
    changed = Pictures(answers=[1, 0, 0, 1], targets=[0, 1, 1, 0], target_transform=lambda t: 1 - t)
    assert DatasetImages(changed).targets == [1, 0, 0, 1]
    assert DatasetImages(data, targets=[3, 2, 1, 0]).targets == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (np.full((2, 3), 7, np.uint8), (7, 7, 7)),
        (np.full((2, 3, 1), 7, np.uint8), (7, 7, 7)),
        (np.full((2, 3, 3), (1, 2, 3), np.uint8), (1, 2, 3)),
        (np.full((2, 3, 3), (0.2, 0.4, 1.0), np.float64), (51, 102, 255)),
        (np.full((2, 3, 4), (9, 9, 9, 0), np.uint8), (255, 255, 255)),
        (torch.full((2, 3), 7, dtype=torch.uint8), (7, 7, 7)),
        (torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 2, 3), (1, 2, 3)),
        (torch.tensor([0.2, 0.4, 1.0])[:, None, None].expand(3, 2, 3), (51, 102, 255)),
        (torch.tensor([0.2, 0.4, 1.0, 0.0])[:, None, None].expand(4, 2, 3), (255, 255, 255)),
        (torch.full((1, 2, 3), 0.2), (51, 51, 51)),
        (torch.full((1, 2, 3), 0.5, dtype=torch.bfloat16), (128, 128, 128)),
        (Image.new("RGBA", (3, 2), (9, 9, 9, 0)), (255, 255, 255)),
        (Image.new("L", (3, 2), 7), (7, 7, 7)),
    ],
)
def test_kinds_of_image(image: Any, wanted: tuple[int, int, int]) -> None:
    found = pixels(DatasetImages([(image, 0)]).load(0))
    assert found.shape == (2, 3, 3) and (found == wanted).all()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("a.png", ["type str", "a PIL image, an array or a tensor"]),
        (np.zeros((2, 3, 2), np.uint8), ["shape [2, 3, 2]", "[H, W, C] for an array"]),
        (np.zeros((3, 8, 9), np.uint8), ["shape [3, 8, 9]", "[H, W, C] for an array"]),
        (torch.zeros(8, 9, 3), ["shape [8, 9, 3]", "[C, H, W] for a tensor"]),
        (torch.zeros(3), ["shape [3]"]),
        (torch.zeros(3, 0, 4), ["shape [3, 0, 4]"]),
        (torch.tensor([[-1.0, 2.0]]), ["pixels from -1 to 2, wanted 0 to 1", "normalisation"]),
        (torch.tensor([[float("nan")]]), ["wanted 0 to 1"]),
        (np.zeros((2, 3), np.int32), ["type int32", "uint8"]),
        (Image.new("F", (2, 2)), ["32-bit"]),
    ],
)
def test_other_images_are_refused_at_once(image: Any, words: list[str]) -> None:
    refused(lambda: DatasetImages([(image, 0)], name="mine"), "mine[0]: ", *words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DatasetImages(iter([])), ["list_iterator: has no length", "dataset[i]"]),
        (lambda: DatasetImages([{"image": picture(0)}]), ["list[0]: got dict", "(image, label)"]),
        (lambda: DatasetImages([picture(0)]), ["got Image", "(image, label)"]),
        (lambda: DatasetImages([(picture(0),)]), ["got tuple of 1"]),
        (lambda: DatasetImages([(picture(0), "cat")]), ["its items", "not whole numbers", "'str'"]),
        (lambda: DatasetImages([(picture(0), 0.5)]), ["not whole numbers", "targets=[...]"]),
        (lambda: DatasetImages([(picture(0), True)]), ["not whole numbers", "a boolean"]),
        (lambda: DatasetImages(Pictures(targets=[1])), ["1 labels in .targets, wanted 4"]),
        (lambda: DatasetImages(Pictures(), targets=[1]), ["1 labels in targets, wanted 4"]),
        (lambda: DatasetImages(Pictures(), targets=7), ["got 7 in targets, wanted 4 labels"]),
        (
            lambda: DatasetImages(Subset(Pictures(targets=[1]), [3])),  # type: ignore[arg-type]
            ["1 labels in .targets, wanted 4", "pass targets=[...]"],
        ),
        *(
            (
                lambda answers=answers: DatasetImages(Pictures(answers, targets=[0, 1, 1, 0])),
                [f"Pictures[{place}]: its label is ", "in .targets; pass targets=[...]"],
            )
            for place, answers in ((0, "abcd"), (2, (0, 1, 0, 0)), (3, (0, 1, 1, 1)))
        ),
        (lambda: DatasetImages(Pictures(answers=np.eye(4))), ["the labels in its items"]),
        (lambda: DatasetImages(Pictures(targets=np.eye(4))), ["the labels in .targets"]),
    ],
)
def test_data_sets_that_do_not_fit(make: Callable[[], object], words: list[str]) -> None:
    refused(make, *words)


def test_an_item_that_cannot_be_loaded_is_named() -> None:
    class Broken(Pictures):
        def __getitem__(self, index: int) -> Any:
            if index == 1:
                raise OSError("truncated")
            return super().__getitem__(index)

    images = DatasetImages(Broken(targets=[0, 1, 1, 0]))
    with pytest.raises(BadImage, match=r"Broken\[1\]: .*truncated"):
        images.load(1)


def test_the_fingerprint_is_of_targets_and_pixels() -> None:
    first = DatasetImages(Pictures()).fingerprint()
    assert DatasetImages(Pictures(targets=[0, 1, 1, 0]), name="other").fingerprint() == first
    assert DatasetImages(Pictures(), targets=[0, 1, 1, 1]).fingerprint() != first
    assert DatasetImages(Subset(Pictures(), [1, 0, 2, 3]), [0, 1, 1, 0]).fingerprint() != first  # type: ignore[arg-type]
    many = [(picture(0), 0)] * 1000
    assert len(DatasetImages(many, targets=[0] * 1000).fingerprint()) == 64


def test_data_sets_of_torchvision(tmp_path: Path) -> None:
    for label in ("blue_jay", "crow"):
        (tmp_path / label).mkdir()
        picture(len(label)).save(tmp_path / label / "0.png")
    folder = ImageFolder(tmp_path)
    task = dataset_task("birds", folder, folder)
    assert task.classes == ("blue jay", "crow") and task.train.targets == [0, 1]
    fake = FakeData(6, (3, 8, 8), 2, transform=tv.ToTensor())
    left, right = random_split(fake, [4, 2])
    task = dataset_task("fake", left, right, classes=["a", "b"], templates=["{}"])
    assert (len(task.train), len(task.test), task.templates) == (4, 2, ("{}",))
    assert task.train.targets == [int(fake[i][1]) for i in left.indices]
    assert task.train.name(1) == "fake/train[1]"
    with pytest.raises(RuntimeError):  # nothing is downloaded unasked
        CIFAR10(str(tmp_path / "none"))


def test_the_tensors_of_torch() -> None:
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]))
    assert DatasetImages(data).targets == [0, 1, 1, 0]


def test_workers_load_from_a_data_set() -> None:
    images = DatasetImages(Pictures(targets=[0, 1, 1, 0]))
    assert pickle.loads(pickle.dumps(images)).fingerprint() == images.fingerprint()
    found = [
        [batch[0] for batch in batches(images, tv.ToTensor(), 2, shuffle=True, seed=0, workers=n)]
        for n in (0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_class_names() -> None:
    named = Pictures(classes=[("tench", "Tinca tinca"), "great_white"])
    assert dataset_task("fish", named, Pictures()).classes == ("tench", "great white")
    assert dataset_task("fish", Subset(named, [0, 1]), named).classes == ("tench", "great white")  # type: ignore[arg-type]
    assert dataset_task("fish", named, named, classes=["a_1", "b"]).classes == ("a_1", "b")
    refused(lambda: dataset_task("fish", Pictures(), named), 'task "fish"', "Pictures", "classes=")
    other = Pictures(classes=["shark", "tench"])
    refused(lambda: dataset_task("fish", named, other), "different classes")
    refused(lambda: dataset_task("fish", named, named, classes=["a"]), "at least two")
    numbered = Pictures(classes=[0, 1])
    for make in (
        lambda: dataset_task("fish", numbered, named),
        lambda: dataset_task("fish", named, numbered),
        lambda: dataset_task("fish", named, named, classes=[0, 1]),  # type: ignore[list-item]
    ):
        refused(make, 'task "fish"', "got the class name 0, wanted text")
    refused(
        lambda: dataset_task("fish", Pictures(answers=[0, 1, 2, 0]), named, classes=["a", "b"]),
        "target 2 in its train split",
    )


def test_image_sets_are_taken_as_they_are() -> None:
    blank = Blank((0, 1))
    task = dataset_task("t", blank, Pictures(), classes=["a", "b"])
    assert isinstance(task, Task) and task.train is blank


def test_torchvision_is_not_imported() -> None:
    code = (
        "import sys\nfrom PIL import Image\nfrom mulki.data import dataset_task\n"
        "data = [(Image.new('L', (2, 2)), 0), (Image.new('L', (2, 2)), 1)]\n"
        "dataset_task('t', data, data, classes=['a', 'b']).fingerprint()\n"
        "assert 'torchvision' not in sys.modules"
    )
    python("-c", code)


def test_a_random_transform_is_refused() -> None:
    class Noise(list):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:  # type: ignore[override]
            return Image.effect_noise((8, 8), 50), index

    with pytest.raises(InputError, match=r"^Noise\[0\]: another image at every call; leave random"):
        DatasetImages(Noise(range(3)), [0, 1, 2])
