"""Random splits that stay the same, whatever libraries are installed."""

from __future__ import annotations

from mulki.data.subset import Subset, permutation
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
