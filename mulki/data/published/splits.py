"""Random splits, the same as those of the code that published them."""

from __future__ import annotations

from mulki.data.subset import Subset, permutation
from mulki.data.task import ImageSet

SEED = 42


def four_fifths(images: ImageSet) -> tuple[Subset, Subset]:
    """80 % of a set to train on and the rest to test on, as ZSCL's code draws them with seed 42.

    ZSCL takes them from ``torch.utils.data.random_split``, which draws them as `permutation` does.
    """
    order = permutation(len(images), SEED)
    cut = int(0.8 * len(images))
    return Subset(images, order[:cut]), Subset(images, order[cut:])
