"""Zero-shot evaluation: accuracy of a model on a task's test set through its class texts.

The classifier is the mean of all prompt templates' normalised text features, normalised again, and
the label space is the task's own (task-incremental, as the MTIL benchmark of ZSCL does). A
prediction depends on its image alone, so accuracy does not depend on batching or order; no
autocast is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

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


@torch.no_grad()
def count_correct(
    model: VisionLanguageModel, classifier: Tensor, batches: Iterable[Sequence[Tensor]]
) -> tuple[int, int]:
    """Correct top-1 predictions and images seen.

    Args:
        classifier: [C, D].
        batches: of (images [B, 3, H, W], targets [B], ...); a negative target is not counted.
    """
    correct = seen = 0
    for images, target, *_ in batches:
        predicted = (model.encode_images(images) @ classifier.mT).argmax(dim=1)
        correct += int((predicted.cpu() == target).sum())
        seen += int((target >= 0).sum())
    return correct, seen


class Evaluator:
    """Evaluates a model on a list of tasks, as often as asked; texts are tokenized once.

    Args:
        model: evaluated with the weights it has when `accuracy` is called. What is frozen now must
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
        task, model, world = self.tasks[number], self.model, self._world
        model.eval()
        if task.name not in self._inputs:
            prompts = [prompt for of_class in task.prompts() for prompt in of_class]
            self._inputs[task.name] = text_inputs(model, prompts, world)
        classifier = zero_shot_classifier(model, self._inputs[task.name], len(task.classes), world)
        counted = count_correct(model, classifier, self._batches(number))
        correct, seen = world.total(*counted, device=model.device)
        return 100 * correct / seen, seen

    def _batches(self, number: int) -> Iterator[Sequence[Tensor]]:
        # The rows that a process repeats to fill its part of a batch are not counted.
        loader = self._loaders[number]
        for (images, target, _), count in zip(loader, batch_sizes(loader), strict=True):
            target[self._world.distinct(count) :] = -1
            yield images, target
