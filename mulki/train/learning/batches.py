"""Batches of a task and of a reference set, each divided among the processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mulki.data.caption_task import CaptionedImages, CaptionTask, same_text
from mulki.data.loader import batch_sizes, batches, cycle
from mulki.data.reference import ReferenceSet
from mulki.data.task import ImageSet, Task
from mulki.data.transforms import is_deterministic
from mulki.distributed.world import World
from mulki.train.learning.inputs import TaskInputs, Training

# Differences of the seeds of two tasks, and of a task and its reference set.
_TASK_SEEDS = 7919
_REFERENCE_SEEDS = 104729
_REPLAY_SEEDS = 15485863


@dataclass(frozen=True)
class Batch:
    """A batch of B images.

    Args:
        images: [b, 3, H, W], this process's part; in the host's memory when it is loaded.
        target: [B] int64 classes of the whole batch, on the device.
        places: [B] int64 places of the whole batch in its set, on the CPU.
        replay: images of earlier tasks that come with it, if there are any.
        reference: those of the reference set that come with it, if there is one.
        inputs: [b, 3, H, W], made of `images` by the method, if it makes any.
    """

    images: Tensor
    target: Tensor
    places: Tensor
    replay: Batch | None = None
    reference: PairBatch | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True)
class PairBatch:
    """A batch of R images with captions.

    Args:
        images: [r, 3, H, W], this process's part; in the host's memory when it is loaded.
        captions: [r], this process's part; none where the set has none.
        places: [R] int64 places of the whole batch in its set, on the CPU.
        distinct: of a task of captions, the rows of the whole batch whose image and caption have
            not come before in it, on the CPU; None if all are such.
    """

    images: Tensor
    captions: tuple[str, ...]
    places: Tensor
    distinct: Tensor | None = None


def task_batches(
    training: Training, inputs: TaskInputs, start: int = 0
) -> Iterator[Batch | PairBatch]:
    """Endless shuffled batches of a task; those of a task of captions are pairs.

    Args:
        start: batches to leave out, as if they had been taken.
    """
    config, world, task = training.config, training.world, inputs.task
    reference, replay = inputs.reference, inputs.replay
    seed = config.seed + _TASK_SEEDS * inputs.index
    size = config.batch_size
    balanced = config.sampling == "balanced" and bool(task.classes)
    shuffled = _batches(training, task.train, size, seed, start, balanced)
    if isinstance(task, CaptionTask):
        return (_pairs(batch, task.train, world) for batch in shuffled)
    if replay is not None:
        shown = _batches(training, replay, replay.batch_size or size, seed + _REPLAY_SEEDS, start)
        shuffled = map(lambda new, old: replace(new, replay=old), shuffled, shown)
    if reference is not None:
        size = config.reference_batch_size or size
        others = _batches(training, reference.images, size, seed + _REFERENCE_SEEDS, start)
        pairs = (_with_captions(batch, reference, world) for batch in others)
        shuffled = map(lambda new, pair: replace(new, reference=pair), shuffled, pairs)
    return shuffled


def kept_samples(
    training: Training, task: Task, reference: ReferenceSet | None, steps: int
) -> tuple[int | None, int | None]:
    """How many training images and pairs of image and caption to keep teacher features of.

    A random transform changes the features each time, so none can be kept. Those of the reference
    set are kept if its samples come up more than once in the steps of the task.

    Returns:
        The number of training images or None, and that of the pairs, which are those of the
        reference set or of a task of captions, or None.
    """
    config = training.config
    if not is_deterministic(training.transform):
        return None, None
    if isinstance(task, CaptionTask):
        return None, len(task.train)
    size = (config.reference_batch_size or config.batch_size) * training.world.size
    if reference is None or steps * size <= len(reference):
        return len(task.train), None
    return len(task.train), len(reference)


def _batches(
    training: Training,
    images: ImageSet,
    batch_size: int,
    seed: int,
    start: int,
    balanced: bool = False,
) -> Iterator[Batch]:
    world, device = training.world, training.precision.device
    loader = batches(
        images,
        training.transform,
        batch_size * world.size,
        shuffle=True,
        seed=seed,
        workers=training.config.workers,
        drop_last=True,
        cached=is_deterministic(training.transform),
        pin_memory=device.type == "cuda",
        part=world.rows,
        balanced=balanced,
    )
    count = batch_sizes(loader)[0]
    for part, target, places in cycle(loader, start):
        if world.size == 1:
            yield Batch(part, target.to(device, non_blocking=True), places)
        else:
            both = world.gather(torch.stack([target, places], dim=1).to(device), count)
            yield Batch(part, both[:, 0].contiguous(), both[:, 1].cpu())


def _pairs(batch: Batch, pairs: CaptionedImages, world: World) -> PairBatch:
    # Two images of a batch may have the same caption. It is right for both, so no image may be
    # trained away from it: only the first of such pairs counts.
    captions = [pairs.captions[place][0] for place in batch.places.tolist()]
    kept: set[str] = set()
    right: set[str] = set()
    rows = []
    for row, (place, caption) in enumerate(zip(batch.places.tolist(), captions, strict=True)):
        own, text = pairs.captions_of(pairs.name(place)), same_text(caption)
        if text not in right and not own & kept:
            rows.append(row)
            kept.add(text)
            right |= own
    distinct = None if len(rows) == len(captions) else torch.tensor(rows)
    here = tuple(captions[row] for row in world.rows(len(captions)))
    return PairBatch(batch.images, here, batch.places, distinct)


def _with_captions(batch: Batch, reference: ReferenceSet, world: World) -> PairBatch:
    captions: tuple[str, ...] = ()
    if reference.captions is not None:
        places = batch.places.tolist()
        captions = tuple(reference.captions[places[row]] for row in world.rows(len(places)))
    return PairBatch(batch.images, captions, batch.places)
