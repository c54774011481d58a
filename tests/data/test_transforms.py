from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms as tv

from mulki.data import register_transform, transform_names, transforms
from mulki.data.transforms import is_deterministic, train_transform
from mulki.errors import InputError
from tests.data.data_helpers import picture

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
OURS = ("none", "crop", "flip", "color", "randaugment", "trivialaugment")
FIXED = [tv.Resize(8), tv.CenterCrop(8), tv.ToTensor(), tv.Normalize(MEAN, STD)]


class Wobbly(tv.Resize):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    "transform, answer",
    [
        (tv.Compose(FIXED), True),
        (tv.Compose([tv.Compose(FIXED[:2]), *FIXED[2:]]), True),
        (tv.Compose([]), True),
        (tv.Resize(8), True),
        (tv.Compose([tv.RandomResizedCrop(8), *FIXED[2:]]), False),
        (tv.Compose([tv.Compose([tv.RandomHorizontalFlip()]), *FIXED]), False),
        (tv.Compose([tv.Lambda(lambda x: x), *FIXED]), False),
        (tv.Compose([tv.ColorJitter(0.1), *FIXED]), False),
        (Wobbly(8), False),
        (lambda x: x, False),
        (None, False),
    ],
)
def test_is_deterministic(transform: Any, answer: bool) -> None:
    assert is_deterministic(transform) is answer


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_open_clip_transforms(mode: str) -> None:
    image_transform = pytest.importorskip("open_clip").image_transform
    assert is_deterministic(image_transform(8, False, resize_mode=mode))
    assert not is_deterministic(image_transform(8, True))


def test_open_clip_steps_of_older_versions_and_random_resizing() -> None:
    steps = pytest.importorskip("open_clip.transform")
    assert is_deterministic(tv.Compose([steps._convert_to_rgb, *FIXED]))
    assert not is_deterministic(steps.ResizeKeepRatio(8, random_scale_prob=0.5))
    assert not is_deterministic(steps.ResizeKeepRatio(8, random_aspect_prob=0.5))


def test_none_is_the_evaluation_transform_itself() -> None:
    evaluation = tv.Compose(FIXED)
    assert train_transform(evaluation, "none", 8, MEAN, STD) is evaluation


def test_crop_varies_normalises_and_keeps_most_of_the_image() -> None:
    crop = train_transform(tv.Compose(FIXED), "crop", 8, MEAN, STD)
    assert not is_deterministic(crop)
    outputs = torch.stack([crop(picture(0, 32)) for _ in range(4)])
    assert outputs.shape == (4, 3, 8, 8) and outputs.dtype == torch.float32
    assert not torch.equal(outputs[0], outputs[1])
    # A crop of a flat image is flat, so its values show the normalisation exactly.
    flat = crop(picture(0, 32).resize((1, 1)).resize((32, 32)))
    pixel = torch.tensor(np.asarray(picture(0, 32).resize((1, 1)))[0, 0] / 255)
    wanted = (pixel - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(flat, wanted.float()[:, None, None].expand(3, 8, 8), atol=1e-6)


def drawn(augment: str, count: int = 12) -> torch.Tensor:
    torch.manual_seed(0)
    built = train_transform(tv.Compose(FIXED), augment, 8, MEAN, STD)
    assert not is_deterministic(built) and pickle.loads(pickle.dumps(built)) is not None
    return torch.stack([built(picture(0, 32)) for _ in range(count)])


@pytest.mark.parametrize("augment", [*OURS[2:], "crop+flip", "flip+color+crop", "randaugment+crop"])
def test_random_changes_repeat_with_their_seed(augment: str) -> None:
    first = drawn(augment)
    assert first.shape == (12, 3, 8, 8) and torch.equal(first, drawn(augment))
    assert not all(torch.equal(first[0], other) for other in first)


def test_a_flip_is_the_mirror_image_of_every_second_one() -> None:
    fixed = tv.Compose(FIXED)(picture(0, 32))
    found = drawn("flip", 40)
    same = [torch.equal(each, fixed) for each in found]
    mirrored = [torch.equal(each, fixed.flip(2)) for each in found]
    assert [one != other for one, other in zip(same, mirrored, strict=True)] == [True] * 40
    assert 10 <= sum(same) <= 30


def test_several_changes_come_in_their_order() -> None:
    built = train_transform(tv.Compose(FIXED), "crop+flip", 8, MEAN, STD)
    assert isinstance(built, tv.Compose) and isinstance(built.transforms[0], tv.RandomResizedCrop)
    inner = built.transforms[1].transforms
    assert type(inner[0]).__name__ == "RandomHorizontalFlip" and inner[1].transforms == FIXED
    # Their values are normalised once.
    assert float(drawn("crop+flip").min()) >= min(-m / s for m, s in zip(MEAN, STD, strict=True))


def test_crop_takes_at_least_nine_tenths_bicubically() -> None:
    step = train_transform(None, "crop", 8, MEAN, STD).transforms[0]
    assert step.interpolation is tv.InterpolationMode.BICUBIC
    areas = [
        h * w
        for _, _, h, w in (
            step.get_params(picture(0, 200), step.scale, step.ratio) for _ in range(50)
        )
    ]
    assert min(areas) >= 0.89 * 200 * 200 and len(set(areas)) > 10


def test_a_builder_that_fails_is_named(own: None) -> None:
    @register_transform("broken")
    def broken(preprocess: Any, size: Any, mean: Any, std: Any) -> Any:
        return size["height"]

    said = r'^augment "broken": its function \(.*test_transforms.py, line \d+\) failed \(TypeError'
    with pytest.raises(InputError, match=said):
        train_transform(None, "broken", 8, MEAN, STD)


def test_unknown_augmentation() -> None:
    with pytest.raises(InputError, match='"crops".*none, crop'):
        train_transform(tv.Compose(FIXED), "crops", 8, MEAN, STD)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_BUILDERS", dict(transforms._BUILDERS))


def test_a_registered_transform_is_built_from_what_the_model_wants(own: None) -> None:
    assert transform_names() == OURS
    seen: list[Any] = []

    @register_transform("grey")
    def grey(*given: Any) -> Any:
        seen.append(given)
        return tv.Compose([tv.Grayscale(3), given[0]])

    evaluation = tv.Compose(FIXED)
    built = train_transform(evaluation, "grey", 8, MEAN, STD)
    assert seen == [(evaluation, 8, MEAN, STD)] and built(picture(0)).shape == (3, 8, 8)
    assert is_deterministic(built)  # so teachers are cached
    assert transform_names() == (*OURS, "grey")


def test_a_crop_comes_before_a_registered_transform_that_is_deterministic(own: None) -> None:
    register_transform("gray")(lambda *given: tv.Compose([tv.Grayscale(3), given[0]]))
    mean, std = (0.5,) * 3, (0.2,) * 3  # so that gray channels stay alike
    evaluation = tv.Compose([*FIXED[:3], tv.Normalize(mean, std)])
    for augment in ("crop+gray", "gray+crop"):
        built = train_transform(evaluation, augment, 8, mean, std)
        first, other = (built(picture(0, 32)) for _ in range(2))
        assert torch.equal(first[0], first[1]) and not torch.equal(first, other)


def test_names_of_transforms_are_taken_once(own: None) -> None:
    def again(*given: Any) -> Any:
        raise AssertionError("not called")

    with pytest.raises(InputError, match='"crop": '):
        register_transform("crop")(again)
    with pytest.raises(InputError, match="got the name ''"):
        register_transform("")(again)


def test_a_builder_has_to_return_a_transform(own: None) -> None:
    register_transform("lost")(lambda *given: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match='"lost": .*NoneType'):
        train_transform(tv.Compose(FIXED), "lost", 8, MEAN, STD)
