from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch
from torchvision.transforms import ToTensor

from mulki.data import CaptionedImages, CaptionTask, Task
from mulki.distributed.world import ALONE
from mulki.train.learning.batches import PairBatch, kept_samples, task_batches
from tests.data.data_helpers import Blank
from tests.train.learn_helpers import CONFIG, Load, learn


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
    config = replace(CONFIG, batch_size=4)
    given = (task, None, blank, config, torch.device("cpu"), ALONE)
    (batch, other), *_ = islice(task_batches(*given, index=0), 3)
    assert isinstance(batch, PairBatch) and other is None
    assert batch.distinct is None and len(batch.images) == 4
    assert batch.captions == tuple("uvwxyz"[place] for place in batch.places)

    # One image has two captions, and one caption is of three images.
    repeated = pairs("AABCDE", "uvwxxx")
    for batch, _ in islice(task_batches(repeated, *given[1:], index=0), 20):
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
    given = (task, None, blank, replace(CONFIG, batch_size=2), torch.device("cpu"), ALONE)
    seen = set()
    for batch, _ in islice(task_batches(*given, index=0), 40):
        assert isinstance(batch, PairBatch)
        two = frozenset(batch.places.tolist())
        seen.add(two)
        assert (batch.distinct is None) == (3 in two)
        assert batch.distinct is None or batch.distinct.tolist() == [0]
    assert {frozenset((0, 2)), frozenset((0, 1)), frozenset((1, 2))} <= seen


def test_a_caption_in_other_capitals_is_no_other_caption() -> None:
    task = pairs("ABC", "xXz")
    given = (task, None, blank, replace(CONFIG, batch_size=3), torch.device("cpu"), ALONE)
    for batch, _ in islice(task_batches(*given, index=0), 10):
        assert isinstance(batch, PairBatch) and batch.distinct is not None
        assert sorted(batch.distinct.tolist()) == [
            row
            for row in range(3)
            if batch.captions[row].lower() not in [text.lower() for text in batch.captions[:row]]
        ]


def test_features_of_pairs_are_kept_where_images_do_not_change() -> None:
    task = pairs("ABCDEF", "uvwxyz")
    assert kept_samples(task, None, ToTensor(), CONFIG, 1, ALONE) == (None, 6)
    assert kept_samples(task, None, blank, CONFIG, 1, ALONE) == (None, None)
