from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mulki.data.made_images import CHANGES, DEFAULT_CHANGES, MadeImages, check_changes
from mulki.errors import InputError


class Pictures:
    """Images of 8 x 6 pixels, each pixel another colour."""

    def __init__(self, count: int):
        self.targets = list(range(count))
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.targets)

    def pixels(self, index: int) -> np.ndarray:
        generator = np.random.default_rng(index)
        return generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)

    def load(self, index: int) -> Image.Image:
        self.asked.append(index)
        return Image.fromarray(self.pixels(index))

    def name(self, index: int) -> str:
        return f"picture {index}"

    def fingerprint(self) -> str:
        return f"pictures {len(self)}"


def made(change: str, seed: int = 0, count: int = 5) -> tuple[Pictures, np.ndarray, np.ndarray]:
    """The set, image 2 of it, and what is made of it."""
    pictures = Pictures(count)
    image = MadeImages(pictures, [change], seed).load(2)
    assert image.mode == "RGB" and image.size == (8, 6)
    return pictures, pictures.pixels(2).astype(int), np.asarray(image).astype(int)


def test_inverted() -> None:
    _, before, after = made("invert")
    assert (before + after == 255).all()


def test_channels_are_never_in_their_order() -> None:
    orders = set()
    for seed in range(40):
        _, before, after = made("channels", seed)
        found = tuple(
            next(c for c in range(3) if (before[..., c] == after[..., k]).all()) for k in range(3)
        )
        orders.add(found)
    assert len(orders) == 5 and (0, 1, 2) not in orders


def test_the_mean_with_another_image() -> None:
    partners = set()
    for seed in range(40):
        pictures, before, after = made("average", seed)
        (other,) = set(pictures.asked) - {2}
        assert np.abs(after - (before + pictures.pixels(other)) / 2).max() <= 1
        partners.add(other)
    assert partners == {0, 1, 3, 4}


def test_a_single_image_is_averaged_with_itself() -> None:
    pictures = Pictures(1)
    image = MadeImages(pictures, ["average"], 0).load(0)
    assert (np.asarray(image) == pictures.pixels(0)).all()


def test_the_middle_is_enlarged() -> None:
    plain = np.zeros((64, 64, 3), dtype=np.uint8)
    plain[16:48, 16:48] = 200

    class Square(Pictures):
        def load(self, index: int) -> Image.Image:
            return Image.fromarray(plain)

    image = np.asarray(MadeImages(Square(1), ["enlarge"], 0).load(0))
    assert (image[4:-4, 4:-4] == 200).all()


def test_a_rectangle_of_another_image() -> None:
    pictures, before, after = made("cutmix")
    kept = (before == after).all(axis=2).mean()
    assert 0.3 < kept < 0.7 and len(set(pictures.asked)) == 2


def test_quarters_change_their_places() -> None:
    _, before, after = made("blocks")
    quarters = [(slice(3 * y, 3 * y + 3), slice(4 * x, 4 * x + 4)) for y in (0, 1) for x in (0, 1)]
    found = [
        next(i for i, of in enumerate(quarters) if (before[of] == after[to]).all())
        for to in quarters
    ]
    assert sorted(found) == [0, 1, 2, 3] and found != [0, 1, 2, 3]


def test_a_part_is_enlarged() -> None:
    _, before, after = made("crop")
    assert (before != after).any() and before.min() <= after.min() and after.max() <= 255


def test_noise_has_nothing_of_the_image() -> None:
    first, second = (MadeImages(Pictures(n), ["noise"], 3).load(2) for n in (4, 5))
    assert (np.asarray(first) == np.asarray(second)).all() and np.asarray(first).std() > 50


def test_an_image_is_the_same_every_time_and_seeds_differ() -> None:
    pictures = Pictures(30)
    one, again = (MadeImages(pictures, DEFAULT_CHANGES, 7) for _ in range(2))
    backwards = [np.asarray(again.load(i)) for i in reversed(range(30))][::-1]
    assert all((np.asarray(one.load(i)) == backwards[i]).all() for i in range(30))
    names = [one.name(i) for i in range(30)]
    assert names[0].startswith("picture 0 (")
    assert {name.partition("(")[2].rstrip(")") for name in names} == set(DEFAULT_CHANGES)
    other = MadeImages(pictures, DEFAULT_CHANGES, 8)
    assert names != [other.name(i) for i in range(30)]
    prints = {
        made.fingerprint()
        for made in (
            one,
            other,
            MadeImages(pictures, tuple(CHANGES), 7),
            MadeImages(Pictures(3), DEFAULT_CHANGES, 7),
        )
    }
    assert len(prints) == 4 and one.fingerprint() == again.fingerprint()
    assert one.targets == pictures.targets and len(one) == one.sample_of == 30


@pytest.mark.parametrize("width", [1, 2, 3])
def test_small_images_keep_their_size(width: int) -> None:
    class Small(Pictures):
        def load(self, index: int) -> Image.Image:
            return Image.new("RGB", (width, 1), (index, 0, 0))

    for change in CHANGES:
        assert MadeImages(Small(2), [change], 0).load(0).size == (width, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "got no name, wanted some of invert"),
        (("invret",), "got .invret. .did you mean .invert.... wanted some of"),
        (("invert", "noise", "invert"), "invert comes twice"),
    ],
)
def test_names_that_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"^--reference-changes: {message}"):
        check_changes(names)
