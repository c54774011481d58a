from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from mulki.data.caption_task import CaptionedImages, CaptionTask, same_text
from mulki.errors import InputError
from tests.data.data_helpers import Blank

TEXTS = (("a red flag",), ("a cat", "a tabby"), ("a red flag", "a dog"))


def images(*captions: tuple[str, ...]) -> CaptionedImages:
    return CaptionedImages(Blank((0,) * len(captions)), captions)


TRAIN = images(("one",), ("two",))


def test_captions_are_counted_once() -> None:
    test = images(*TEXTS)
    assert test.texts() == ("a red flag", "a cat", "a tabby", "a dog")
    assert (len(test), test.sample_of, list(test.targets)) == (3, 3, [0, 0, 0])
    assert pickle.loads(pickle.dumps(test)).captions == TEXTS


def test_capitals_and_white_space_make_no_other_text() -> None:
    assert same_text(" A  caf\u00e9\n") == same_text("a Cafe\u0301") != same_text("a cafe")
    test = images(("A red flag", "a dog"), ("a  red FLAG",), ("a dog.",))
    assert test.texts() == ("A red flag", "a dog", "a dog.")
    assert test.captions_of("1") == {"a red flag"}
    with pytest.raises(InputError, match='test split .*"One"'):
        CaptionTask("pets", TRAIN, images(("One",), ("one ",)))
    # What was written stays what identifies the split.
    assert images(("One",), ("two",)).fingerprint() != TRAIN.fingerprint()


def test_a_fingerprint_knows_images_and_captions() -> None:
    one = images(*TEXTS)
    assert one.fingerprint() == images(*TEXTS).fingerprint()
    others = (
        images(*TEXTS[:2], ("a red flag", "a dug")),
        images(*TEXTS[:2], ("a red flag a dog",)),
        replace(one, images=Blank((0, 0, 0), key="other")),
    )
    assert len({one.fingerprint(), *(each.fingerprint() for each in others)}) == 4


def test_a_task_has_no_classes() -> None:
    task = CaptionTask("pets", TRAIN, images(*TEXTS))
    assert (task.classes, task.templates, task.prompts()) == ((), (), [])
    assert replace(task, name="others").test is task.test
    other = replace(task, test=images(*TEXTS[:2]))
    assert task.fingerprint() != other.fingerprint()
    assert task.splits_fingerprint() != other.splits_fingerprint()


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (images(), TRAIN, "train split"),
        (TRAIN, images(), "test split"),
        (TRAIN, images(("one",), ()), "test split has 2 images and 1 of"),
        (TRAIN, replace(TRAIN, captions=(("one",),)), "has 2 images and 1 of"),
        (images(("one",), (" ",)), TRAIN, "a caption in its train split is empty"),
        (images(("one",), ("one",)), TRAIN, 'its train split have the caption "one"'),
        (images(("one",)), TRAIN, "its train split has one image"),
        (images(*TEXTS), TRAIN, "an image of its train split has several captions"),
    ],
)
def test_what_is_no_task(train: CaptionedImages, test: CaptionedImages, said: str) -> None:
    with pytest.raises(InputError, match=said) as info:
        CaptionTask("pets", train, test)
    assert "\n" not in str(info.value)
    with pytest.raises(InputError, match="empty name"):
        CaptionTask("", TRAIN, TRAIN)
