"""Batches of transformed images, the same for the same seed whatever the number of workers.

The main process draws, for each sample, its place in the epoch and a seed for its augmentation, and
the dataset applies that seed around the transform. So neither the number of workers nor the state
of the global generators has a say, and a run can go on from any step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mulki.data.captioned_shards import Loadable
from mulki.data.decoding import BadImage, pixel_limit
from mulki.data.task import ImageSet
from mulki.data.transforms import is_deterministic
from mulki.data.workers import start_worker, watched

Batch = list[Tensor]


class Images(Dataset[tuple[Tensor, int, int]]):
    """Transformed images of a set: `(image, target, index)` each.

    An item is asked for by `index`, or by `(index, seed)`, which also fixes what a random transform
    does, without touching the global generators.

    Args:
        image_set: the images.
        transform: from an RGB PIL image to a tensor.
        cached: keep the tensors in memory from first use on, if the transform is deterministic and
            all of them fit in `cache_mb`; the attribute `cached` tells whether they are kept.
        cache_mb: MiB.
    """

    def __init__(
        self,
        image_set: ImageSet,
        transform: Callable[[Any], Tensor],
        *,
        cached: bool = False,
        cache_mb: float = 512,
    ) -> None:
        self.image_set = image_set
        self.transform = transform
        self.deterministic = is_deterministic(transform)
        self._cache: Tensor | None = None
        self._filled = [False] * len(image_set)
        if cached and self.deterministic:
            first = self._transformed(0)
            count = getattr(image_set, "sample_of", len(image_set))
            if count * first.numel() * first.element_size() <= cache_mb * 2**20:
                self._cache = torch.empty((len(image_set), *first.shape), dtype=first.dtype)

    @property
    def cached(self) -> bool:
        return self._cache is not None

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        target = self.image_set.targets[index]
        if self._cache is not None:
            if not self._filled[index]:
                self._cache[index] = self._transformed(index)
                self._filled[index] = True
            return self._cache[index], target, index
        if seed is None or self.deterministic:
            return self._transformed(index), target, index
        with _seeded(seed):
            return self._transformed(index), target, index

    def _transformed(self, index: int) -> Tensor:
        return self.transform(self.image_set.load(index))


def batches(
    image_set: ImageSet,
    transform: Callable[[Any], Tensor],
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    cached: bool = False,
    cache_mb: float = 512,
    pin_memory: bool = False,
    part: Callable[[int], Sequence[int]] | None = None,
    balanced: bool = False,
) -> DataLoader[tuple[Tensor, int, int]]:
    """A DataLoader of `[images [B, ...], targets [B], indices [B]]`, targets and indices int64.

    Each pass over it is another epoch, with a shuffle and augmentations of its own, drawn from
    `seed` and the number of the epoch.

    Args:
        image_set, transform, cached, cache_mb: see `Images`.
        batch_size: images in a batch; a smaller set makes one batch of all its images.
        shuffle: whether epochs are permuted.
        seed: fixes order and augmentation, with any number of workers.
        workers: processes that load. None are started when the cache is in use, since each of them
            would hold its own.
        drop_last: leave out a smaller last batch, unless it is the only one.
        pin_memory: for copies to a GPU that do not block.
        part: from the number of images in a batch to the places in it that this process loads,
            where several processes divide each batch among them; all by default.
        balanced: draw the images of a shuffled epoch with repetition, each class equally often on
            the average; an epoch still has as many images as the set.

    Raises:
        ValueError: `batch_size` below 1 or an empty set.
        BadImage: when an image cannot be decoded; on iteration, also from workers.
    """
    if batch_size < 1 or len(image_set) == 0:
        raise ValueError(f"{len(image_set)} images in batches of {batch_size}; both must be >= 1")
    images = Images(image_set, transform, cached=cached, cache_mb=cache_mb)
    workers = 0 if images.cached else workers
    batch_sampler = _Batches(
        len(images),
        batch_size,
        shuffle=shuffle,
        seed=seed,
        targets=image_set.targets if balanced else None,
        drop_last=drop_last and len(images) >= batch_size,
        part=part or range,
    )
    return _Loader(
        images,
        batch_sampler=batch_sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        # Restarting workers costs more than an epoch of a small set; evaluation passes are rare.
        persistent_workers=workers > 0 and shuffle,
        worker_init_fn=partial(start_worker, pixel_limit()),
        # Without one, each pass would draw from the global generator and shift a run's randomness.
        generator=torch.Generator().manual_seed(seed),
    )


class _Readable(Dataset[Tensor | BadImage]):
    def __init__(self, images: Loadable, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | BadImage:
        try:
            return self.transform(self.images.load(index))
        except BadImage as error:
            return error


def readable_batches(
    images: Loadable, transform: Callable[[Any], Tensor], batch_size: int, workers: int = 0
) -> Iterator[list[Tensor | BadImage]]:
    """Transformed images [3, H, W] in their order, with the error in place of an unreadable one.

    Args:
        images: without labels.
        transform: a deterministic one.
        batch_size: images in a batch, at least 1.
        workers: processes that load.
    """
    loader = DataLoader(
        _Readable(images, transform),
        batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=partial(start_worker, pixel_limit()),
        generator=torch.Generator(),  # as in `batches`: the global one is the caller's
    )
    return watched(loader.__iter__, workers)


class _Loader(DataLoader[tuple[Tensor, int, int]]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return watched(super().__iter__, self.num_workers)


def batch_sizes(loader: DataLoader[tuple[Tensor, int, int]]) -> list[int]:
    """Images in each batch of an epoch, those of other processes included.

    Args:
        loader: from `batches`.
    """
    sampler = loader.batch_sampler
    assert isinstance(sampler, _Batches)
    return sampler.sizes


def cycle(loader: DataLoader[tuple[Tensor, int, int]], start: int = 0) -> Iterator[Batch]:
    """Endless batches of a loader made by `batches`, epoch after epoch.

    Args:
        loader: from `batches`.
        start: batch to begin with, as if those before had been taken; none of them is loaded.
    """
    sampler = loader.batch_sampler
    assert isinstance(sampler, _Batches)
    epoch, done = divmod(start, len(loader))
    sampler.go_to(epoch, done)

    def endless() -> Iterator[Batch]:
        while True:
            yield from loader

    return endless()


class _Batches(Sampler[list[tuple[int, int]]]):
    """This process's part of each batch of an epoch; each iteration is the next epoch.

    A batch has the index and the augmentation seed of each sample.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        targets: Sequence[int] | None,
        drop_last: bool,
        part: Callable[[int], Sequence[int]],
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.chances: Tensor | None = None
        if targets is not None:
            of_each = torch.as_tensor(list(targets))
            self.chances = 1 / torch.bincount(of_each)[of_each].double()
        self.shuffle = shuffle
        self.seed = seed
        self.part = part
        whole, rest = divmod(count, batch_size)
        self.sizes = [batch_size] * whole + ([rest] if rest and not drop_last else [])
        self.go_to(epoch=0, batch=0)

    def go_to(self, epoch: int, batch: int) -> None:
        """Make the next iteration that of `epoch`, without its first batches."""
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        mixed = np.random.SeedSequence([self.seed % 2**64, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        order = torch.arange(self.count)
        if self.shuffle and self.chances is not None:
            order = self.chances.multinomial(self.count, replacement=True, generator=generator)
        elif self.shuffle:
            order = torch.randperm(self.count, generator=generator)
        seeds = torch.randint(2**32, (self.count,), generator=generator)
        samples = list(zip(order.tolist(), seeds.tolist(), strict=True))
        starts = range(0, sum(self.sizes), self.batch_size)[self.batch :]
        self.go_to(self.epoch + 1, batch=0)
        for start in starts:
            batch = samples[start : start + self.batch_size]
            yield [batch[place] for place in self.part(len(batch))]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, NumPy and Python for a while."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # torch.manual_seed would seed the GPUs too.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
