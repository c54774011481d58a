"""Batches of a task and of a reference set, each divided among the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mulki.data.loader import batch_sizes, batches, cycle
from mulki.data.reference import ReferenceSet
from mulki.data.task import ImageSet
from mulki.data.transforms import is_deterministic
from mulki.engine.config import RunConfig
from mulki.world import World

Transform = Callable[..., Tensor]


@dataclass(frozen=True)
class Batch:
    """A batch of B images.

    Args:
        images: [b, 3, H, W], this process's part; in the host's memory when it is loaded.
        target: [B] int64 classes of the whole batch, on the device.
        places: [B] int64 places of the whole batch in its set, on the CPU.
    """

    images: Tensor
    target: Tensor
    places: Tensor


@dataclass(frozen=True)
class ReferenceBatch:
    """A batch of R images with captions.

    Args:
        images: [r, 3, H, W], this process's part; in the host's memory when it is loaded.
        captions: [r], this process's part.
        places: [R] int64 places of the whole batch in its set, on the CPU.
    """

    images: Tensor
    captions: tuple[str, ...]
    places: Tensor


def training_batches(
    images: ImageSet,
    transform: Transform,
    batch_size: int,
    config: RunConfig,
    device: torch.device,
    world: World,
    *,
    seed: int,
) -> Iterator[Batch]:
    """Endless shuffled batches.

    Args:
        transform: of the images.
        batch_size: images of a batch in each process.
        config: says how many workers load.
        device: of the model.
        world: the processes among which each batch is divided.
        seed: of order and augmentation.
    """
    loader = batches(
        images,
        transform,
        batch_size * world.size,
        shuffle=True,
        seed=seed,
        workers=config.workers,
        drop_last=True,
        cached=is_deterministic(transform),
        pin_memory=device.type == "cuda",
        part=world.rows,
    )
    count = batch_sizes(loader)[0]
    for part, target, places in cycle(loader):
        if world.size == 1:
            yield Batch(part, target.to(device, non_blocking=True), places)
        else:
            both = world.gather(torch.stack([target, places], dim=1).to(device), count)
            yield Batch(part, both[:, 0].contiguous(), both[:, 1].cpu())


def reference_batches(
    reference: ReferenceSet,
    transform: Transform,
    config: RunConfig,
    device: torch.device,
    world: World,
    *,
    seed: int,
) -> Iterator[ReferenceBatch]:
    """Endless shuffled batches, each process with `config.reference_batch_size` images of a batch.

    Args:
        transform, config, device, world, seed: see `training_batches`.
    """
    size = config.reference_batch_size or config.batch_size
    for batch in training_batches(
        reference.images, transform, size, config, device, world, seed=seed
    ):
        places = batch.places.tolist()
        captions = tuple(reference.captions[places[row]] for row in world.rows(len(places)))
        yield ReferenceBatch(batch.images, captions, batch.places)
