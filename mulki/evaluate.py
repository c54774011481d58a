"""Zero-shot evaluation: accuracy of a model on a task's test set through its class texts.

The classifier is the mean of all prompt templates' normalised text features, normalised again, and
the label space is the task's own (task-incremental, as the MTIL benchmark of ZSCL does). A
prediction depends on its image alone, so accuracy does not depend on batching or order; no
autocast is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.data.task import Task
from mulki.models import TEXT_BATCH, VisionLanguageModel

Prepare = Callable[[VisionLanguageModel, Sequence[str]], Tensor]
Encode = Callable[[VisionLanguageModel, Tensor], Tensor]
Count = Callable[[int, int], tuple[int, int]]


def encode_all_texts(model: VisionLanguageModel, inputs: Tensor) -> Tensor:
    """Features [n, D] of `model.text_inputs` of n prompts, in batches."""
    return torch.cat([model.encode_texts(part) for part in inputs.split(TEXT_BATCH)])


@torch.no_grad()
def zero_shot_classifier(
    model: VisionLanguageModel,
    inputs: Tensor,
    num_classes: int,
    encode: Encode = encode_all_texts,
) -> Tensor:
    """Class weights [C, D], unit rows.

    Args:
        inputs: `model.text_inputs` of C x T prompts, class by class.
        num_classes: C.
        encode: from model and inputs to features [C x T, D].
    """
    texts = encode(model, inputs)
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
    """Evaluates a model on a list of tasks again and again, keeping what does not change.

    Args:
        model: evaluated as it is at the time; what of it is frozen has to stay so.
        tasks: what to evaluate on.
        loaders: a re-iterable of test batches per task.
        prepare: from model and prompts to its `text_inputs`.
        encode: see `zero_shot_classifier`.
        total: from correct predictions and images seen here to those of all processes.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tasks: Sequence[Task],
        loaders: Sequence[Iterable[Sequence[Tensor]]],
        *,
        prepare: Prepare = VisionLanguageModel.text_inputs,
        encode: Encode = encode_all_texts,
        total: Count = lambda correct, seen: (correct, seen),
    ):
        self.model = model
        self.tasks = tasks
        self._loaders = loaders
        self._prepare = prepare
        self._encode = encode
        self._total = total
        self._inputs: dict[str, Tensor] = {}

    def accuracy(self, number: int) -> tuple[float, int]:
        """Top-1 accuracy in percent on task `number` (from 0), and the number of test images."""
        task, model = self.tasks[number], self.model
        model.eval()
        if task.name not in self._inputs:
            prompts = [prompt for of_class in task.prompts() for prompt in of_class]
            self._inputs[task.name] = self._prepare(model, prompts)
        inputs = self._inputs[task.name]
        classifier = zero_shot_classifier(model, inputs, len(task.classes), self._encode)
        correct, seen = self._total(*count_correct(model, classifier, self._loaders[number]))
        return 100 * correct / seen, seen
