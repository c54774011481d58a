"""Zero-shot evaluation: the answers of a model on a task's test set through its class texts.

The classifier is the mean of all prompt templates' normalised text features, normalised again. The
label space is the task's own (task-incremental, as the MTIL benchmark of ZSCL does); beside it,
that of all tasks learned so far (class-incremental: one head). A prediction depends on its image
alone, so accuracy does not depend on batching or order; no autocast is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mulki.answers import Answers
from mulki.data.loader import batch_sizes
from mulki.data.task import Task
from mulki.models import VisionLanguageModel
from mulki.texts import text_features, text_inputs
from mulki.world import ALONE, World

# Images [B, 3, H, W], targets [B] and their indices in the set, as `mulki.data.loader.batches`.
Loader = DataLoader[tuple[Tensor, int, int]]


@torch.no_grad()
def zero_shot_classifier(
    model: VisionLanguageModel, inputs: Tensor, num_classes: int, world: World = ALONE
) -> Tensor:
    """Class weights [C, D], unit rows.

    Args:
        inputs: `model.text_inputs` of C x T prompts, class by class.
        num_classes: C.
        world: the processes among which the texts are divided.
    """
    texts = text_features(model, inputs, world)
    return F.normalize(texts.unflatten(0, (num_classes, -1)).mean(dim=1), dim=-1)


class Evaluator:
    """Evaluates a model on a list of tasks, as often as asked; texts are tokenized once.

    Args:
        model: evaluated with the weights it has when a method is called. What is frozen now must
            stay frozen.
        tasks: what to evaluate on.
        loaders: the test batches of each task, from `mulki.data.loader.batches`; for several
            processes with ``part=world.rows``.
        world: the processes that evaluate together.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tasks: Sequence[Task],
        loaders: Sequence[Loader],
        world: World = ALONE,
    ):
        self.model = model
        self.tasks = tasks
        self._loaders = loaders
        self._world = world
        self._inputs: dict[str, Tensor] = {}

    def accuracy(self, number: int) -> tuple[float, int]:
        """Top-1 accuracy in percent on task `number` (from 0), and the number of test images."""
        (answers,) = self.answers(number, {number: self.classifier(number)}, [0])
        return answers.accuracy, len(answers.own)

    def classifier(self, number: int) -> Tensor:
        """Class weights of task `number`, [C, D], see `zero_shot_classifier`."""
        task, model, world = self.tasks[number], self.model, self._world
        model.eval()
        if task.name not in self._inputs:
            prompts = [prompt for of_class in task.prompts() for prompt in of_class]
            self._inputs[task.name] = text_inputs(model, prompts, world)
        return zero_shot_classifier(model, self._inputs[task.name], len(task.classes), world)

    @torch.no_grad()
    def answers(
        self, number: int, classifiers: Mapping[int, Tensor], learned: Sequence[int]
    ) -> list[Answers]:
        """Which test images of a task the model gets right; each image is encoded once.

        Classes of two tasks with the same prompts are one class: no image could tell them apart.

        Args:
            number: of the task, from 0.
            classifiers: `classifier` of this task and of those that were learned, by number.
            learned: numbers of learned tasks, counted from the first one. For each of them that
                covers this task, it is also classified among the classes of all these tasks.

        Returns:
            The answers for each entry of `learned`.
        """
        self.model.eval()
        seen = [count for count in learned if count > number]
        heads = [range(number, number + 1), *map(range, seen)]
        same = [self._first_alike(head) for head in heads]
        # 0 in places of other processes, so that the sum over processes is the whole.
        right = torch.zeros(len(heads), sum(batch_sizes(self._loaders[number])), dtype=torch.int64)
        for images, target, places in self._batches(number):
            features = self.model.encode_images(images)
            # A product for each task: one over all classes would round a class by its place.
            logits = {
                task: features @ classifiers[task].mT for task in {i for h in heads for i in h}
            }
            for row, head, first_alike in zip(right, heads, same, strict=True):
                predicted = torch.cat([logits[i] for i in head], dim=1).argmax(dim=1).cpu()
                before = sum(len(classifiers[i]) for i in head if i < number)
                found = first_alike[predicted[: len(places)]]
                row[places] = (found == first_alike[target + before]).long()
        summed = self._world.total(*right.flatten().tolist(), device=self.model.device)
        own, *rest = np.asarray(summed, dtype=bool).reshape(right.shape)
        by_count = dict(zip(seen, rest, strict=True))
        return [Answers(own, by_count.get(count)) for count in learned]

    def _first_alike(self, head: range) -> Tensor:
        # By place among the classes of some tasks, the first place with the same prompts.
        prompts = [tuple(of_class) for i in head for of_class in self.tasks[i].prompts()]
        firsts: dict[tuple[str, ...], int] = {}
        return torch.tensor([firsts.setdefault(p, place) for place, p in enumerate(prompts)])

    def _batches(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # The rows that a process repeats to fill its part of a batch are not counted.
        loader = self._loaders[number]
        for (images, target, places), count in zip(loader, batch_sizes(loader), strict=True):
            distinct = self._world.distinct(count)
            yield images, target[:distinct], places[:distinct]
