"""Zero-shot evaluation: accuracy of a model on a task's test set through its class texts.

The classifier is the mean of all prompt templates' normalised text features, normalised again, and
the label space is the task's own (task-incremental, as the MTIL benchmark of ZSCL does). A
prediction depends on its image alone, so accuracy does not depend on batching or order; no
autocast is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.data.task import Task
from mulki.models import TEXT_BATCH, VisionLanguageModel


@torch.no_grad()
def zero_shot_classifier(model: VisionLanguageModel, inputs: Tensor, num_classes: int) -> Tensor:
    """Class weights [C, D], unit rows.

    Args:
        inputs: `model.text_inputs` of C x T prompts, class by class.
        num_classes: C.
    """
    texts = torch.cat([model.encode_texts(part) for part in inputs.split(TEXT_BATCH)])
    return F.normalize(texts.unflatten(0, (num_classes, -1)).mean(dim=1), dim=-1)


@torch.no_grad()
def count_correct(
    model: VisionLanguageModel, classifier: Tensor, batches: Iterable[Sequence[Tensor]]
) -> tuple[int, int]:
    """Correct top-1 predictions and images seen.

    Args:
        classifier: [C, D].
        batches: of (images [B, 3, H, W], targets [B], ...).
    """
    correct = seen = 0
    for images, target, *_ in batches:
        predicted = (model.encode_images(images) @ classifier.mT).argmax(dim=1)
        correct += int((predicted.cpu() == target).sum())
        seen += len(target)
    return correct, seen


class Evaluator:
    """Evaluates a model on a list of tasks again and again, keeping what does not change.

    Args:
        model: evaluated as it is at the time; what of it is frozen has to stay so.
        tasks: what to evaluate on.
        loaders: a re-iterable of test batches per task.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tasks: Sequence[Task],
        loaders: Sequence[Iterable[Sequence[Tensor]]],
    ):
        self.model = model
        self.tasks = tasks
        self._loaders = loaders
        self._inputs: dict[str, Tensor] = {}

    def accuracy(self, number: int) -> tuple[float, int]:
        """Top-1 accuracy in percent on task `number` (from 0), and the number of test images."""
        task, model = self.tasks[number], self.model
        model.eval()
        if task.name not in self._inputs:
            prompts = [prompt for of_class in task.prompts() for prompt in of_class]
            self._inputs[task.name] = model.text_inputs(prompts)
        classifier = zero_shot_classifier(model, self._inputs[task.name], len(task.classes))
        correct, seen = count_correct(model, classifier, self._loaders[number])
        return 100 * correct / seen, seen
