"""Random splits that stay the same, whatever libraries are installed."""

from __future__ import annotations

import numpy as np

from mulki.data.subset import Subset
from mulki.data.task import ImageSet

SEED = 42


def four_fifths(images: ImageSet) -> tuple[Subset, Subset]:
    """80 % of a set to train on and the rest to test on, as ZSCL's code draws them with seed 42.

    ZSCL takes them from ``torch.utils.data.random_split``, whose generator may change; the indices
    are computed here, so they cannot.
    """
    order = permutation(len(images), SEED)
    cut = int(0.8 * len(images))
    return Subset(images, order[:cut]), Subset(images, order[cut:])


def permutation(count: int, seed: int) -> list[int]:
    """``torch.randperm(count)`` of a CPU generator with that seed."""
    # Fisher and Yates' shuffle on the 32-bit numbers of the Mersenne Twister. NumPy keeps the
    # stream of RandomState as it is for good.
    drawn = np.random.RandomState(seed).randint(0, 2**32, size=count, dtype=np.uint32).tolist()
    order = list(range(count))
    for i in range(count - 1):
        j = i + drawn[i] % (count - i)
        order[i], order[j] = order[j], order[i]
    return order
