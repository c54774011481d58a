from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch
from torchvision.transforms import ToTensor

from mulki.data import CaptionedImages, CaptionTask, Task
from mulki.train.learning.batches import PairBatch, kept_samples, task_batches
from mulki.train.learning.inputs import TaskInputs
from tests.data.data_helpers import Blank
from tests.train.learn_helpers import CONFIG, Load, learn, training_of


def test_small_training_set_makes_whole_batches_of_itself(load_tiny: Load, task: Task) -> None:
    reports = learn(load_tiny(), task, config=replace(CONFIG, batch_size=64, iterations=2))
    assert [r.images for r in reports] == [18, 18]


def test_another_task_index_draws_another_order(load_tiny: Load, task: Task) -> None:
    losses = [
        [r.losses["ce_loss"] for r in learn(load_tiny(), task, index=index)] for index in (0, 0, 1)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def blank(image: object) -> torch.Tensor:
    return torch.zeros(3, 2, 2)


def pairs(names: str, captions: str) -> CaptionTask:
    class Named(Blank):
        def name(self, index: int) -> str:
            return names[index]

    train = CaptionedImages(Named((0,) * len(names)), tuple((text,) for text in captions))
    return CaptionTask("pairs", train, train)


def test_an_image_and_a_caption_count_once_in_a_batch() -> None:
    task = pairs("ABCDEF", "uvwxyz")
    training = training_of(transform=blank, config=replace(CONFIG, batch_size=4))
    batch = next(task_batches(training, TaskInputs(0, task, {})))
    assert isinstance(batch, PairBatch)
    assert batch.distinct is None and len(batch.images) == 4
    assert batch.captions == tuple("uvwxyz"[place] for place in batch.places)

    # One image has two captions, and one caption is of three images.
    repeated = pairs("AABCDE", "uvwxxx")
    for batch in islice(task_batches(training, TaskInputs(0, repeated, {})), 20):
        assert isinstance(batch, PairBatch)
        names = ["AABCDE"[place] for place in batch.places]
        first = [
            row
            for row in range(4)
            if names[row] not in names[:row] and batch.captions[row] not in batch.captions[:row]
        ]
        kept = range(4) if batch.distinct is None else batch.distinct.tolist()
        assert list(kept) == first


def test_no_caption_of_an_image_in_the_batch_is_a_wrong_one_for_it() -> None:
    # The caption y is one of A, though A stands in the batch with x.
    task = pairs("AABC", "xyyz")
    training = training_of(transform=blank, config=replace(CONFIG, batch_size=2))
    seen = set()
    for batch in islice(task_batches(training, TaskInputs(0, task, {})), 40):
        assert isinstance(batch, PairBatch)
        two = frozenset(batch.places.tolist())
        seen.add(two)
        assert (batch.distinct is None) == (3 in two)
        assert batch.distinct is None or batch.distinct.tolist() == [0]
    assert {frozenset((0, 2)), frozenset((0, 1)), frozenset((1, 2))} <= seen


def test_a_caption_in_other_capitals_is_no_other_caption() -> None:
    task = pairs("ABC", "xXz")
    training = training_of(transform=blank, config=replace(CONFIG, batch_size=3))
    for batch in islice(task_batches(training, TaskInputs(0, task, {})), 10):
        assert isinstance(batch, PairBatch) and batch.distinct is not None
        assert sorted(batch.distinct.tolist()) == [
            row
            for row in range(3)
            if batch.captions[row].lower() not in [text.lower() for text in batch.captions[:row]]
        ]


def test_features_of_pairs_are_kept_where_images_do_not_change() -> None:
    task = pairs("ABCDEF", "uvwxyz")
    assert kept_samples(training_of(transform=ToTensor()), task, None, 1) == (None, 6)
    assert kept_samples(training_of(transform=blank), task, None, 1) == (None, None)
