"""A method that distils on a reference set, in one file, as a user would write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.clip.features import Features
from mulki.functional import prototype_cross_entropy
from mulki.methods import PREVIOUS, ZERO_SHOT, Method, Needs


class OnReference(Method):
    """Cross-entropy, and the similarities of the reference batch kept near two teachers."""

    # Without a `name` of its own it is not registered; the tests that need it there set one.
    summary = "cross-entropy and distillation on a reference set"

    def __init__(self, options: Method.Options):
        super().__init__(options)
        self.needs = Needs(teachers=(ZERO_SHOT, PREVIOUS), reference=True)
        self.seen: list[tuple[Features, tuple[Features, ...]]] = []

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        self.seen.append((student, teachers))
        terms = {"ce_loss": prototype_cross_entropy(student.image_text(), target)}
        for place, teacher in enumerate(teachers):
            terms[f"reference_{place}_loss"] = 5 * distance(student, teacher)
        return terms


def distance(student: Features, teacher: Features) -> Tensor:
    """Divergence of the similarities of the pairs, over captions and over images."""
    assert student.reference is not None and teacher.reference is not None
    ours = student.reference.image_text().materialize()
    with torch.no_grad():
        theirs = teacher.reference.image_text().materialize()
    return sum(
        F.kl_div(ours.log_softmax(dim), theirs.softmax(dim), reduction="batchmean")
        for dim in (0, 1)
    )
