"""Near duplicates: pictures whose 16 x 16 colour thumbnails hardly differ.

The distance is the root mean square difference of thumbnail values in 0..255. The limit was set by
looking at pairs on both sides of it: below lie copies, rescaled copies and one flag in two
renderings; above it pictures begin to differ in what they show. Silhouettes, which differ from
each other in their outline only, are compared as ``render.silhouette`` frames them, with limits of
their own.
"""

from __future__ import annotations

import numpy as np

NEAR = 7.0
# Of silhouettes: at the first limit two are taken for copies and tied together, at the second a
# training picture too like a test picture is left out.
NEAR_SHAPE, NEAR_PICTURE = 34.0, 48.0


def thumbnails(images: np.ndarray) -> np.ndarray:
    """``[N, S, S, 3]`` uint8, S a multiple of 16 -> ``[N, 768]``: means over a 16 x 16 grid."""
    count, size = images.shape[:2]
    cell = size // 16
    grid = images.reshape(count, 16, cell, 16, cell, 3).astype(np.float32)
    return grid.mean(axis=(2, 4)).reshape(count, -1)


def mirrored(thumbs: np.ndarray) -> np.ndarray:
    """The thumbnails ``[N, 768]`` of the pictures' mirror images."""
    return thumbs.reshape(-1, 16, 16, 3)[:, :, ::-1].reshape(len(thumbs), -1)


def near_pairs(
    left: np.ndarray, right: np.ndarray | None = None, limit: float = NEAR
) -> np.ndarray:
    """Index pairs ``[M, 2]`` of thumbnails nearer than ``limit``.

    Without ``right``, pairs within ``left``, each in both orders and none with itself.
    """
    other = left if right is None else right
    norms = (other**2).sum(1)
    found = [np.zeros((0, 2), int)]
    for start in range(0, len(left), 1024):
        part = left[start : start + 1024]
        square = (part**2).sum(1)[:, None] + norms[None] - 2 * part @ other.T
        rows, columns = np.nonzero(square < limit**2 * left.shape[1])
        found.append(np.stack([rows + start, columns], axis=1))
    pairs = np.concatenate(found)
    return pairs[pairs[:, 0] != pairs[:, 1]] if right is None else pairs


def drop_repeats(train: list, test: list) -> tuple[list, list]:
    """Keep one of each set of near duplicates and none where their labels disagree.

    ``train`` and ``test`` hold objects with ``image`` ``[S, S, 3]`` and ``label``. The test side
    is kept in preference, so that its size does not depend on what the training side repeats.
    """
    samples = [*test, *train]
    thumbs = thumbnails(np.stack([sample.image for sample in samples]))
    labels = np.array([sample.label for sample in samples])
    pairs = near_pairs(thumbs)
    keep = np.ones(len(samples), bool)
    disagree = labels[pairs[:, 0]] != labels[pairs[:, 1]]
    keep[pairs[disagree].ravel()] = False
    for first, second in sorted(map(tuple, pairs[~disagree])):
        if first < second and keep[first]:
            keep[second] = False
    count = len(test)
    return (
        [sample for sample, kept in zip(train, keep[count:], strict=True) if kept],
        [sample for sample, kept in zip(test, keep[:count], strict=True) if kept],
    )
