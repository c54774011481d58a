"""Text anchors of a task: which texts they are, and which of them a step takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mulki.data.prompts import fill
from mulki.data.task import Task
from mulki.data.vocabulary import TEMPLATE, Vocabulary, key_of
from mulki.methods import SEEN, VOCABULARY


@dataclass(frozen=True)
class AnchorTexts:
    """The texts beyond a task's classes.

    Args:
        seen: the first prompt of each class of the earlier tasks.
        vocabulary: the words of a vocabulary, each in a prompt.
        left_out: how many were left out, since they are a class of the task, or are there already.
    """

    seen: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    left_out: int = 0


def anchor_texts(
    groups: Collection[str], tasks: Sequence[Task], index: int, vocabulary: Vocabulary | None
) -> AnchorTexts:
    """The anchors of a task.

    Args:
        groups: of `SEEN` and `VOCABULARY`.
        tasks: of the sequence.
        index: place of the task in the sequence, from 0.
        vocabulary: needed for the group `VOCABULARY`.
    """
    known = {key_of(name) for name in tasks[index].classes}
    seen: list[str] = []
    words: list[str] = []
    left_out = 0
    if SEEN in groups:
        for task in tasks[:index]:
            for name, prompts in zip(task.classes, task.prompts(), strict=True):
                # A class of two tasks is one anchor: two alike would halve its probability.
                if key_of(name) in known:
                    left_out += 1
                else:
                    seen.append(prompts[0])
                    known.add(key_of(name))
    if VOCABULARY in groups:
        assert vocabulary is not None
        words = [fill(TEMPLATE, word) for word in vocabulary.words if key_of(word) not in known]
        left_out += len(vocabulary.words) - len(words)
    return AnchorTexts(tuple(seen), tuple(words), left_out)


@dataclass(frozen=True)
class AnchorBatch:
    """The M anchors of a step, those of the group `SEEN` first.

    Args:
        inputs: [M, ...] for `VisionLanguageModel.encode_texts`.
        seen: how many belong to the group `SEEN`.
        places: [M] their places among all anchors of the task, on the CPU; None for all of them.
    """

    inputs: Tensor
    seen: int
    places: Tensor | None


class Anchors:
    """The anchors of one task, all of them or some drawn for each step.

    Args:
        texts: of the task.
        inputs: from prompts to the inputs of `VisionLanguageModel.encode_texts`.
        per_step: how many are drawn for a step, without repetition; None for all. Half of them are
            of the group `SEEN`, which is the smaller one, or all of that group if it has fewer.
        seed: of the draws.
    """

    def __init__(
        self,
        texts: AnchorTexts,
        inputs: Callable[[Sequence[str]], Tensor],
        per_step: int | None,
        seed: int,
    ):
        #: Of all anchors, those of the group `SEEN` first.
        self.prompts = (*texts.seen, *texts.vocabulary)
        self._seen = len(texts.seen)
        self._inputs = inputs
        self._per_step = per_step
        self._generator = torch.Generator().manual_seed(seed)
        self._all: AnchorBatch | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def state(self) -> Tensor:
        """The state of the draws."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Set what `state` returned."""
        self._generator.set_state(state)

    def draw(self) -> AnchorBatch | None:
        """The anchors of the next step; None if the task has none."""
        if not self.prompts:
            return None
        if self._per_step is None or self._per_step >= len(self):
            self._all = self._all or AnchorBatch(self._inputs(self.prompts), self._seen, None)
            return self._all
        words = len(self) - self._seen
        # An odd number is rounded up and down by turns of chance, so that 1 draws of both groups.
        odd_one = int(torch.randint(2, (), generator=self._generator))
        half = (self._per_step + odd_one) // 2
        of_seen = min(self._seen, max(half, self._per_step - words))
        places = torch.cat(
            [
                self._drawn(self._seen, of_seen),
                self._drawn(words, self._per_step - of_seen) + self._seen,
            ]
        )
        prompts = [self.prompts[place] for place in places.tolist()]
        return AnchorBatch(self._inputs(prompts), of_seen, places)

    def _drawn(self, size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=self._generator)[:count].sort().values
