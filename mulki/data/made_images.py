"""Images made of a task's own, to keep a model where it was on images that are not the task's.

Held on the task's own images, the student cannot learn them; held on images of another kind, it
learns the task and keeps the rest. Made images need no data beyond the task. Each is one image of
the task after one of these changes, the same one every time:

    invert     255 less each pixel
    channels   the colour channels in another order
    average    the mean with another image of the task
    enlarge    the middle half of its width and height, enlarged to its size
    cutmix     a rectangle of half its area, in another image's place
    blocks     its four quarters in another order
    crop       a rectangle of 0.3 of its area, enlarged to its size
    noise      noise of its size, nothing else

The first four are the default. Source: our measurements (docs/presets.md). CutMix is that of Yun et
al. (ICCV 2019), with a fixed area.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from PIL import Image, ImageOps

from mulki.data.task import ImageSet
from mulki.errors import InputError, nearest

_Other = Callable[[], Image.Image]
# From an image, a generator, and a function that loads another image, to an image of its size.
Change = Callable[[Image.Image, random.Random, _Other], Image.Image]


def _invert(image: Image.Image, draw: random.Random, other: _Other) -> Image.Image:
    return ImageOps.invert(image)


def _channels(image: Image.Image, draw: random.Random, other: _Other) -> Image.Image:
    _, *orders = itertools.permutations(image.split())
    return Image.merge("RGB", draw.choice(orders))


def _average(image: Image.Image, draw: random.Random, other: _Other) -> Image.Image:
    return Image.blend(image, other().resize(image.size), 0.5)


def _enlarge(image: Image.Image, draw: random.Random, other: _Other) -> Image.Image:
    width, height = image.size
    middle = (width / 4, height / 4, width * 3 / 4, height * 3 / 4)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=middle)


def _cutmix(image: Image.Image, draw: random.Random, other: _Other) -> Image.Image:
    left, top, right, bottom = map(round, _rectangle(image.size, 0.5, draw))
    mixed = image.copy()
    mixed.paste(other().resize((max(1, right - left), max(1, bottom - top))), (left, top))
    return mixed


def _blocks(image: Image.Image, draw: random.Random, other: _Other) -> Image.Image:
    width, height = image.size
    boxes = [
        (x * width / 2, y * height / 2, (x + 1) * width / 2, (y + 1) * height / 2)
        for x, y in itertools.product(range(2), repeat=2)
    ]
    _, *orders = itertools.permutations(boxes)
    mixed = image.copy()
    for box, (left, top, right, bottom) in zip(draw.choice(orders), boxes, strict=True):
        corner = (round(left), round(top))
        size = (max(1, round(right) - corner[0]), max(1, round(bottom) - corner[1]))
        mixed.paste(image.resize(size, box=box), corner)
    return mixed


def _crop(image: Image.Image, draw: random.Random, other: _Other) -> Image.Image:
    box = _rectangle(image.size, 0.3, draw)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _noise(image: Image.Image, draw: random.Random, other: _Other) -> Image.Image:
    width, height = image.size
    return Image.frombytes("RGB", image.size, draw.randbytes(3 * width * height))


def _rectangle(
    size: tuple[int, int], area: float, draw: random.Random
) -> tuple[float, float, float, float]:
    # One of the image's form, with that share of its area, at a place of chance.
    width, height = (math.sqrt(area) * side for side in size)
    left, top = draw.uniform(0, size[0] - width), draw.uniform(0, size[1] - height)
    return left, top, left + width, top + height


CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "invert": _invert,
        "channels": _channels,
        "average": _average,
        "enlarge": _enlarge,
        "cutmix": _cutmix,
        "blocks": _blocks,
        "crop": _crop,
        "noise": _noise,
    }
)
DEFAULT_CHANGES = ("invert", "channels", "average", "enlarge")


def check_changes(names: Sequence[str]) -> None:
    """Check the value of ``--reference-changes``.

    Raises:
        InputError: no name, one that comes twice, or one that is not in `CHANGES`.
    """
    known = ", ".join(CHANGES)
    for place, name in enumerate(names):
        if name not in CHANGES:
            raise InputError(
                f"--reference-changes: got {name!r}{nearest(name, CHANGES)}, wanted some of {known}"
            )
        if name in names[:place]:
            raise InputError(f"--reference-changes: {name} comes twice; leave one of them out")
    if not names:
        raise InputError(f"--reference-changes: got no name, wanted some of {known}")


class MadeImages:
    """A set of images, each changed; see the module. It is an `ImageSet`.

    Args:
        images: n images, of which n are made.
        changes: names in `CHANGES`. For each image one of them is drawn.
        seed: of the draws. What is made of an image depends on the seed and its place alone.
    """

    def __init__(self, images: ImageSet, changes: Sequence[str], seed: int):
        check_changes(changes)
        self._images = images
        self._changes = tuple(changes)
        self._seed = seed

    @property
    def targets(self) -> Sequence[int]:
        return self._images.targets

    @property
    def sample_of(self) -> int:
        """See `mulki.data.subset.Subset.sample_of`."""
        return int(getattr(self._images, "sample_of", len(self)))

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Image.Image:
        draw, change = self._drawn(index)

        def other() -> Image.Image:
            step = draw.randrange(1, len(self)) if len(self) > 1 else 0
            return self._images.load((index + step) % len(self))

        return CHANGES[change](self._images.load(index), draw, other)

    def name(self, index: int) -> str:
        return f"{self._images.name(index)} ({self._drawn(index)[1]})"

    def fingerprint(self) -> str:
        whole = f"{self._images.fingerprint()} {self._changes} {self._seed}"
        return hashlib.sha256(whole.encode()).hexdigest()

    def _drawn(self, index: int) -> tuple[random.Random, str]:
        # Of a text, so that neighbours among seeds and places have nothing in common.
        draw = random.Random(f"{self._seed} {index}")
        return draw, draw.choice(self._changes)
