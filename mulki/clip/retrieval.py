"""Retrieval: of captions by images, and of images by captions, by cosine.

The candidates are all test images of a task, or all its distinct captions, as
`mulki.data.caption_task.same_text` tells them apart. A caption of several images is right for each
of them, and an image may have several captions: a query is answered when the first candidate is any
right one. Of candidates with equal scores the one that comes first in the set is first, so that a
model which tells nothing apart is right by chance alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mulki.data.caption_task import CaptionedImages, same_text

# Queries that are compared at a time.
_AT_ONCE = 1024


def right_captions(images: CaptionedImages) -> list[list[int]]:
    """Of each image the places of its captions among `images.texts()`, each once."""
    places = {same_text(text): place for place, text in enumerate(images.texts())}
    return [list(dict.fromkeys(places[same_text(t)] for t in each)) for each in images.captions]


def turned(right: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Of each of `count` candidates the queries that it is right for."""
    found: list[list[int]] = [[] for _ in range(count)]
    for query, candidates in enumerate(right):
        for candidate in candidates:
            found[candidate].append(query)
    return found


@torch.no_grad()
def ranks(
    queries: Tensor, candidates: Tensor, right: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Where the first right candidate of each query stands, and which candidate is first.

    Args:
        queries: [Q, D].
        candidates: [C, D].
        right: of each query the places of its right candidates, at least one.

    Returns:
        How many wrong candidates are before the first right one, and the place of the first
        candidate; both [Q] int64 on the CPU.
    """
    found, firsts = [], []
    order = torch.arange(len(candidates), device=queries.device)
    for start in range(0, len(queries), _AT_ONCE):
        scores = queries[start : start + _AT_ONCE] @ candidates.mT
        wanted = right[start : start + _AT_ONCE]
        pairs = [(row, place) for row, places in enumerate(wanted) for place in places]
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[tuple(torch.tensor(pairs, device=scores.device).mT)] = True
        best = scores.masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
        score = scores.gather(1, best)
        before = (scores > score) | ((scores == score) & (order < best))
        found.append(before.sum(dim=1).cpu())
        firsts.append(scores.argmax(dim=1).cpu())
    return torch.cat(found), torch.cat(firsts)
