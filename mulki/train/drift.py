"""How far the student has moved, on a sample of the test images of every data set.

Two numbers by data set, of the student after a task:

    word_agreement   percent of the images whose nearest word is the same to the student and to the
                     original model: to this no label is needed, and no class need be learned
    mean_distance    of a task with class statistics: mean over its classes of 1 - cosine between
                     the mean that is kept and the mean of the sample's features. It grows while
                     features leave the means that `mulki.clip.head` goes by.

Source: ZAF (Gao et al., NeurIPS 2024) found that a change of zero-shot predictions on other data
predicts forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.clip.evaluation import Loader
from mulki.clip.head import ClassStatistics
from mulki.clip.models import VisionLanguageModel
from mulki.clip.prototypes import class_sums
from mulki.clip.texts import text_features, text_inputs
from mulki.data import Task
from mulki.data.loader import batch_sizes
from mulki.data.vocabulary import TEMPLATE
from mulki.distributed.world import ALONE, World
from mulki.runs.metrics import MEAN_DISTANCE, WORD_AGREEMENT

#: Test images of a data set, at most, if it has no more classes.
IMAGES = 128
_WORDS = 256


class Drift:
    """Compares a student with its original model, as often as asked.

    Args:
        student: compared with the weights it has when `of` is called.
        original: frozen; None for `mean_distance` alone.
        tasks: the data sets; those of captions are passed over.
        loaders: batches of the sample of each that has test images, from
            `mulki.data.loader.batches`; for several processes with ``part=world.rows``.
        words: of which at most 256 are taken, at even distances.
        world: the processes that compare together.
    """

    def __init__(
        self,
        student: VisionLanguageModel,
        original: VisionLanguageModel | None,
        tasks: Sequence[Task],
        loaders: Sequence[Loader],
        words: Sequence[str],
        world: World = ALONE,
    ):
        self._student, self._original, self._world = student, original, world
        self._tasks, self._loaders = tasks, loaders
        count = min(_WORDS, len(words))
        self._prompts = [TEMPLATE.format(words[i * len(words) // count]) for i in range(count)]
        self._inputs: Tensor | None = None
        # Of the original model, by the number of the task.
        self._words: dict[int, Tensor] = {}

    @torch.no_grad()
    def of(self, statistics: ClassStatistics) -> dict[str, dict[str, tuple[float, int]]]:
        """By data set and metric, the value and the number of images it is of."""
        student, original = self._student, self._original
        student.eval()
        tested = [i for i, task in enumerate(self._tasks) if task.classes and len(task.test)]
        if original is not None:
            if self._inputs is None:
                inputs = text_inputs(original, self._prompts, self._world)
                texts = text_features(original, inputs, self._world)
                for number, features, _ in self._encoded(original, tested):
                    self._words[number] = (features @ texts.mT).argmax(dim=1)
                self._inputs = text_inputs(student, self._prompts, self._world)
            texts = text_features(student, self._inputs, self._world)
        means = {each.task: each.means for each in statistics.tasks}
        found: dict[str, dict[str, tuple[float, int]]] = {}
        # Those of which there is something to compare.
        numbers = [i for i in tested if original is not None or self._tasks[i].name in means]
        for number, features, target in self._encoded(student, numbers):
            values = {}
            if original is not None:
                same = (features @ texts.mT).argmax(dim=1) == self._words[number]
                values[WORD_AGREEMENT] = 100 * float(same.cpu().double().mean()), len(same)
            if (kept := means.get(self._tasks[number].name)) is not None:
                sums, counts = class_sums(features, target, len(kept))
                cosines = F.cosine_similarity(sums, kept.to(sums))[counts > 0]
                values[MEAN_DISTANCE] = 1 - float(cosines.cpu().double().mean()), len(features)
            found[self._tasks[number].name] = values
        return found

    def _encoded(
        self, model: VisionLanguageModel, numbers: Sequence[int]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        # Numbers of tasks, with the features of their images and the targets.
        world = self._world
        for number in numbers:
            loader = self._loaders[number]
            parts: list[tuple[Tensor, Tensor]] = []
            for (images, target, _), count in zip(loader, batch_sizes(loader), strict=True):
                features = world.gather(model.encode_images(images), count)
                parts.append((features, world.gather(target.to(features.device), count)))
            features, target = (torch.cat(column) for column in zip(*parts, strict=True))
            yield number, features, target
