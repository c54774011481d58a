"""torchvision and other map-style data sets as tasks.

A data set is anything with `len(dataset)` and `dataset[i]`, an image and its label. Neither torch
nor torchvision is imported here.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mulki.data.decoding import BadImage, to_rgb
from mulki.data.prompts import DEFAULT_TEMPLATES, check_templates
from mulki.data.task import ImageSet, Task
from mulki.errors import InputError

# Where data sets of torchvision and of others keep the labels, so that no image is decoded.
_LABELS = ("targets", "labels", "_labels", "samples")
_HASHED_IMAGES = 32


class DatasetImages:
    """A map-style data set as an `ImageSet`.

    An item is `(image, label)`; what follows these two is ignored. The image is a PIL image; an
    array [H, W] or [H, W, C]; or a tensor [H, W] or [C, H, W]; with C = 1, 3 or 4 channels of
    bytes, or of floating-point numbers in 0..1. A fourth channel is opacity, composited on white.
    Leave out of the data set's own transform what the run adds: augmentation, resizing to the
    model's input and normalisation.

    Args:
        dataset: with `len(dataset)` and `dataset[i]`. It must pickle, for DataLoader workers.
        targets: class index of each item, [n]. By default those of `dataset.targets`, `.labels`,
            `._labels` or `.samples` (pairs of path and index), also behind
            `torch.utils.data.Subset`; where there are none, or the data set has a
            `target_transform`, every item is loaded once. Those found are compared with the labels
            of the first, the middle and the last item.
        name: what errors call the data set; by default its class.

    Raises:
        InputError: no such data set, an item that is not an image and a label, labels that are
            not one whole number an item, stored ones that are not those of the items, or an image
            that differs from one call to the next.
    """

    def __init__(
        self, dataset: Any, targets: Sequence[int] | None = None, *, name: str | None = None
    ) -> None:
        self.dataset = dataset
        self._name = name or type(dataset).__name__
        try:
            self._length = len(dataset)
        except TypeError as error:
            raise InputError(
                f"{self._name}: has no length ({error}); pass a data set with len(dataset) and "
                "dataset[i]"
            ) from error
        if self._length:
            self._check_repeats()
        self.targets = self._targets(targets)

    def __len__(self) -> int:
        return self._length

    def _check_repeats(self) -> None:
        # Images, and what a teacher says of them, are kept.
        self.load(0)
        for index in sorted({0, self._length // 2, self._length - 1}):
            with contextlib.suppress(BadImage):
                if self.load(index).tobytes() != self.load(index).tobytes():
                    raise InputError(
                        f"{self.name(index)}: another image at every call; leave random transforms "
                        "out of the data set, and pass --augment"
                    )

    def load(self, index: int) -> Image.Image:
        """The image as RGB, transparency composited on white.

        Raises:
            BadImage: the data set cannot load it.
            InputError: the item is not an image and a label.
        """
        image, _ = self._item(index)
        try:
            return to_rgb(_as_image(image))
        except ValueError as error:
            raise InputError(f"{self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def fingerprint(self) -> str:
        """Hex SHA-256 of the targets, and of size and pixels of at most 32 images.

        These are the first, the last, and others at equal distances between them; a change in
        another image is not seen. It is the same for every run only if the data set has no random
        transform of its own.
        """
        digest = hashlib.sha256(np.asarray(self.targets, dtype="<i8").tobytes())
        count = min(len(self), _HASHED_IMAGES)
        for index in np.linspace(0, len(self) - 1, count).round().astype(int).tolist():
            image = self.load(index)
            digest.update(b"%d %d " % image.size)
            digest.update(image.tobytes())
        return digest.hexdigest()

    def _item(self, index: int) -> tuple[Any, Any]:
        try:
            item = self.dataset[index]
        except MemoryError:
            raise
        except Exception as error:  # a data set raises whatever its decoder or its code meets
            raise BadImage.at(self.name(index), error) from error
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            came = type(item).__name__
            if isinstance(item, (tuple, list)):
                came += f" of {len(item)}"
            raise InputError(
                f"{self.name(index)}: got {came}, wanted (image, label); wrap the data set in one "
                "whose items are so"
            )
        return item[0], item[1]

    def _targets(self, given: Sequence[int] | None) -> list[int]:
        if given is not None:
            return self._indices(_listed(given, "targets", len(self), self._name), "targets")
        stored = _stored_labels(self.dataset, self._name)
        if stored is None:
            return self._indices([self._item(i)[1] for i in range(len(self))], "its items")
        targets = self._indices(*stored)
        for index in sorted({0, len(self) // 2, len(self) - 1}) if targets else ():
            label = self._item(index)[1]
            try:
                same = _index(label) == targets[index]
            except TypeError:
                same = False
            if not same:
                raise InputError(
                    f"{self.name(index)}: its label is {label!r}, but {targets[index]} in "
                    f"{stored[1]}; pass targets=[...], the class index of each item"
                )
        return targets

    def _indices(self, labels: list[Any], source: str) -> list[int]:
        try:
            return [_index(label) for label in labels]
        except TypeError as error:
            raise InputError(
                f"{self._name}: the labels in {source} are not whole numbers ({error}); pass "
                "targets=[...], the class index of each item"
            ) from error


def dataset_task(
    name: str,
    train: Any,
    test: Any,
    *,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> Task:
    """A task from two map-style data sets, such as two of torchvision's.

    Args:
        name: names the task.
        train: a data set, see `DatasetImages`, or an image set, which is taken as it is.
        test: likewise.
        classes: class names, [C], by index. By default `train.classes`, with underscores read as
            spaces, and of several names for a class the first.
        templates: prompts, each with exactly one `{}`.

    Raises:
        InputError: no class names, other ones in `test`, or what `DatasetImages` and `Task` refuse.
    """
    where = f'task "{name}"'
    if classes is None:
        classes = _stored_classes(train, where)
        other = _stored_classes(test, where)
        if classes is None:
            raise InputError(
                f"{where}: {type(train).__name__} has no attribute classes; pass "
                "classes=[...], the class names by index"
            )
        if other is not None and other != classes:
            raise InputError(
                f"{where}: train and test have different classes; pass data sets of the same "
                "classes, or classes=[...]"
            )
    _check_names(classes, where)
    checked = check_templates(templates, where)
    return Task(
        name,
        tuple(classes),
        checked,
        _image_set(train, name, "train"),
        _image_set(test, name, "test"),
    )


def _image_set(data: Any, task: str, split: str) -> ImageSet:
    if hasattr(data, "load") and hasattr(data, "fingerprint"):
        return data
    return DatasetImages(data, name=f"{task}/{split}")


def _is_subset(dataset: Any) -> bool:
    # torch.utils.data.Subset, by its attributes: torch is not imported here.
    return hasattr(dataset, "dataset") and hasattr(dataset, "indices")


def _stored_labels(dataset: Any, name: str) -> tuple[list[Any], str] | None:
    """The labels that a data set keeps, one an item, and the name of their attribute."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    if _is_subset(dataset):
        stored = _stored_labels(dataset.dataset, name)
        return None if stored is None else ([stored[0][i] for i in dataset.indices], stored[1])
    for attribute in _LABELS:
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            if attribute == "samples":
                labels = [sample[1] for sample in labels]
            return _listed(labels, f".{attribute}", len(dataset), name), f".{attribute}"
    return None


def _listed(labels: Any, source: str, count: int, name: str) -> list[Any]:
    listed = labels.tolist() if hasattr(labels, "tolist") else labels
    if not isinstance(listed, Iterable):
        raise InputError(
            f"{name}: got {listed!r} in {source}, wanted {count} labels, one an item; pass "
            "targets=[...]"
        )
    listed = list(listed)
    if len(listed) != count:
        raise InputError(
            f"{name}: {len(listed)} labels in {source}, wanted {count}, one an item; pass "
            "targets=[...]"
        )
    return listed


def _stored_classes(dataset: Any, where: str) -> list[str] | None:
    if _is_subset(dataset):
        return _stored_classes(dataset.dataset, where)
    classes = getattr(dataset, "classes", None)
    if classes is None:
        return None
    # Of several names for a class, the first.
    first = [names[0] if isinstance(names, (tuple, list)) else names for names in classes]
    _check_names(first, f"{where}: {type(dataset).__name__}.classes")
    return [name.replace("_", " ").strip() for name in first]


def _check_names(classes: Sequence[Any], where: str) -> None:
    for name in classes:
        if not isinstance(name, str):
            raise InputError(
                f"{where}: got the class name {name!r}, wanted text; pass classes=[...], the class "
                "names by index"
            )


def _index(label: Any) -> int:
    if isinstance(label, bool):
        raise TypeError("got a boolean")
    return operator.index(label)


def _as_image(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    channels_first = hasattr(image, "detach")
    if channels_first:
        image = image.detach().cpu()
        if image.is_floating_point() and image.element_size() < 4:
            image = image.float()  # NumPy has no bfloat16
        image = image.numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"got an image of type {type(image).__name__}, wanted a PIL image, an array or a tensor"
        )
    pixels = image
    if pixels.ndim == 3 and channels_first:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.size == 0 or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    ):
        order = "[C, H, W] for a tensor" if channels_first else "[H, W, C] for an array"
        raise ValueError(
            f"got an image of shape {list(image.shape)}, wanted [H, W] or {order}, with 1, 3 or 4 "
            "channels"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # also for NaN
            raise ValueError(
                f"got pixels from {low:g} to {high:g}, wanted 0 to 1; leave normalisation out of "
                "the data set's transform"
            )
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"got pixels of type {pixels.dtype}, wanted uint8 or floating-point")
    return Image.fromarray(np.ascontiguousarray(pixels))
