from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass

import pytest
from PIL import Image
from torchvision.transforms import Compose, ToTensor

from mulki.data import CaptionedImages, CaptionTask, Task
from mulki.data.loader import Images
from mulki.data.subset import Subset, few_shot, held_back, limited, permutation, sampled
from mulki.errors import InputError


@dataclass(frozen=True)
class Grey:
    """Pictures whose grey value is their place."""

    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (2, 2), (index,) * 3)

    def name(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return str(self.targets)


def task(train: tuple[int, ...], test: tuple[int, ...] = (0, 1, 2), classes: int = 3) -> Task:
    names = tuple(f"class {i}" for i in range(classes))
    return Task("t", names, ("a {}.",), Grey(train), Grey(test), skipped=("bad.png",))


def test_classes_take_turns() -> None:
    small = limited(task((0, 0, 0, 0, 1, 1, 1, 2)), 5)
    assert isinstance(small.train, Subset)
    assert small.train.indices == (0, 1, 4, 5, 7)
    assert list(small.train.targets) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_class_keeps_an_image(count: int) -> None:
    small = limited(task((2, 2, 1, 0, 0), (1, 1, 2, 0)), count)
    assert sorted(small.train.targets) == sorted(small.test.targets) == [0, 1, 2]


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7])
def test_count_is_kept_in_both_splits(count: int) -> None:
    small = limited(task((0, 1, 2) * 3, (0, 1, 2) * 2), count)
    assert (len(small.train), len(small.test)) == (count, min(count, 6))
    numbers = [list(small.train.targets).count(c) for c in range(3)]
    assert max(numbers) - min(numbers) <= 1


def test_classes_are_counted_from_the_first_one() -> None:
    whole = Grey((0, 1, 2, 2))
    part = Subset(whole, (2, 3, 1), first_class=1)
    assert part.targets == [1, 1, 0]
    assert part.fingerprint() != Subset(whole, (2, 3, 1)).fingerprint()


def test_larger_limit_changes_nothing_but_the_fingerprint() -> None:
    whole = task((0, 1, 2, 0))
    same = limited(whole, 100)
    assert same.train.targets == [0, 1, 2, 0]
    assert (same.name, same.classes, same.templates, same.skipped) == (
        whole.name,
        whole.classes,
        whole.templates,
        whole.skipped,
    )


def test_images_and_names_are_those_of_the_whole_set() -> None:
    subset = Subset(Grey((0, 1, 0, 1)), [3, 1])
    assert len(subset) == 2
    assert [subset.load(i).getpixel((0, 0)) for i in range(2)] == [(3, 3, 3), (1, 1, 1)]
    assert [subset.name(i) for i in range(2)] == ["image 3", "image 1"]
    assert subset.targets == [1, 1]


def test_fingerprint_tells_subsets_and_sets_apart() -> None:
    one, other = Grey((0, 1, 0, 1)), Grey((0, 1, 1, 0))
    prints = {
        s.fingerprint()
        for s in (Subset(one, [0, 1]), Subset(one, [0, 2]), Subset(one, [1, 0]), Subset(other, [0]))
    }
    assert len(prints) == 4
    assert Subset(one, (0, 1)).fingerprint() == Subset(Grey((0, 1, 0, 1)), [0, 1]).fingerprint()


def test_pickles_for_workers() -> None:
    again = pickle.loads(pickle.dumps(Subset(Grey((0, 1, 1)), [2, 0])))
    assert again.name(0) == "image 2" and again.targets == [1, 0]


def test_few_shot_keeps_so_many_images_of_each_class() -> None:
    whole = task((0, 0, 0, 0, 1, 1, 1, 2) * 5, (0, 1, 2, 0))
    small = few_shot(whole, 3, seed=0)
    assert sorted(small.train.targets) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert small.test is whole.test
    assert isinstance(small.train, Subset)
    assert list(small.train.indices) == sorted(set(small.train.indices))
    # A class with fewer images keeps all.
    assert sorted(few_shot(whole, 18, seed=0).train.targets) == [0] * 18 + [1] * 15 + [2] * 5


def test_few_shot_repeats_with_its_seed() -> None:
    whole = task((0, 1, 2) * 30)
    drawn = [few_shot(whole, 2, seed).train for seed in (0, 0, 1)]
    assert drawn[0].fingerprint() == drawn[1].fingerprint() != drawn[2].fingerprint()
    # More shots of the same seed add to the fewer.
    more, fewer = (few_shot(whole, shots, 0).train for shots in (5, 2))
    assert isinstance(more, Subset) and isinstance(fewer, Subset)
    assert set(fewer.indices) < set(more.indices)


def test_permutations_stay_what_they_are() -> None:
    """Published splits, and few-shot runs, are drawn with them."""
    assert permutation(1, 7) == [0] and permutation(10, 42) == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    drawn = hashlib.sha256(str(permutation(8677, 42)).encode()).hexdigest()
    assert drawn.startswith("2408c11e8716f417")


def test_a_sample_is_cached_where_the_whole_would_be() -> None:
    whole = task((0, 1) * 8, (0, 1) * 8)
    to_tensor = Compose([ToTensor()])
    size = to_tensor(whole.train.load(0)).nbytes / 2**20  # MiB of an image
    for of, count in ((limited(whole, 4), 4), (sampled(whole, 4), 16)):
        assert len(of.train) == 4
        for room, cached in ((count, True), (count - 1, False)):
            images = Images(of.train, to_tensor, cached=True, cache_mb=room * size)
            assert images.cached == cached


def test_a_task_of_captions_keeps_different_captions() -> None:
    captions = (("a dog",), *[("A dog",)] * 7, ("a cat",), ("a cow",))
    images = CaptionedImages(Grey((0,) * 10), captions)
    small = limited(CaptionTask("pets", images, images), 3)
    assert isinstance(small, CaptionTask)
    assert small.train.captions == (("a dog",), ("a cat",), ("a cow",))
    assert len(limited(CaptionTask("pets", images, images), 1).test) == 2


def test_a_task_of_captions_keeps_different_images() -> None:
    captions = tuple((f"{place // 3} {place % 3}",) for place in range(9))
    images = CaptionedImages(Subset(Grey((0,) * 3), [place // 3 for place in range(9)]), captions)
    small = limited(CaptionTask("greys", images, images), 4)
    assert small.train.captions == (("0 0",), ("0 1",), ("1 0",), ("2 0",))


def test_a_task_of_captions_keeps_its_first_images() -> None:
    def captioned(count: int) -> CaptionedImages:
        return CaptionedImages(Grey((0,) * count), tuple((f"grey {i}",) for i in range(count)))

    whole = CaptionTask("greys", captioned(9), captioned(4))
    small = limited(whole, 3)
    assert isinstance(small, CaptionTask)
    assert small.train.captions == (("grey 0",), ("grey 1",), ("grey 2",))
    assert (len(small.train), len(small.test), small.test.sample_of) == (3, 3, 3)
    assert len(limited(whole, 7).test) == 4
    # A cache that would not hold all of the images does not hold a sample of them.
    few = sampled(whole, 3)
    assert (few.train.sample_of, few.test.sample_of) == (9, 4)  # type: ignore[attr-defined]


def test_a_share_of_each_class_is_held_back() -> None:
    whole = task((0,) * 10 + (1,) * 2 + (2,))
    kept = held_back(whole, 0.3)
    assert kept.val is not None
    assert sorted(kept.val.targets) == [0, 0, 0, 1] and len(kept.train) == 9
    assert isinstance(kept.train, Subset) and isinstance(kept.val, Subset)
    assert sorted(kept.train.indices + kept.val.indices) == list(range(13))
    again = held_back(whole, 0.3)
    assert isinstance(again.val, Subset) and again.val.indices == kept.val.indices
    assert kept.test is whole.test and kept.fingerprint() != whole.fingerprint()
    assert limited(kept, 3).val is not None and len(limited(kept, 3).val or ()) == 3
    with pytest.raises(InputError, match="--val-fraction: task .* one training image of each"):
        held_back(task((0, 1)), 0.5)
