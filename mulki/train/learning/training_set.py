"""The images of a set, encoded once each by frozen models or by the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mulki.clip.head import Moments, TaskMeans
from mulki.clip.models import VisionLanguageModel
from mulki.data.loader import batch_sizes, batches
from mulki.data.made_images import DEFAULT_CHANGES, MadeImages
from mulki.data.subset import Subset
from mulki.data.task import ImageSet, Task
from mulki.train.learning.inputs import Training

# Images of a task by which it is seen how features move.
_SAMPLE = 512


@torch.no_grad()
def training_features(
    models: Sequence[VisionLanguageModel],
    images: ImageSet,
    training: Training,
    encoded: Callable[[int], None],
) -> Iterator[list[Tensor]]:
    """Features [b, D] of each model, batch by batch, in the order of the images.

    One pass for all models, since decoding costs as much as a small encoder; with the evaluation
    transform, whatever the training transform is. All processes get the features of all images.

    Args:
        encoded: called with the number of images after each batch.
    """
    config, precision, world = training.config, training.precision, training.world
    loader = batches(
        images,
        models[0].preprocess,
        config.batch_size_eval * world.size,
        workers=config.workers,
        pin_memory=precision.device.type == "cuda",
        part=world.rows,
    )
    for (part, *_), count in zip(loader, batch_sizes(loader), strict=True):
        with precision.autocast():
            yield [world.gather(model.encode_images(part), count) for model in models]
        encoded(count)


def sample(task: Task) -> tuple[ImageSet, ImageSet]:
    """Images of a task at even distances, and images made of them."""
    size = len(task.train)
    count = min(_SAMPLE, size)
    own = Subset(task.train, [i * size // count for i in range(count)])
    return own, MadeImages(own, DEFAULT_CHANGES, seed=0)


def sample_features(task: Task, training: Training, encoded: Callable[[int], None]) -> Tensor:
    """The student's features [N, D] of the `sample` of a task, on the CPU."""
    training.model.eval()
    parts = [
        features.float().cpu()
        for images in sample(task)
        for (features,) in training_features([training.model], images, training, encoded)
    ]
    return torch.cat(parts)


def class_moments(
    task: Task, training: Training, encoded: Callable[[int], None]
) -> tuple[TaskMeans, Tensor]:
    """Class means and scatter of the student's features of a task; see `mulki.clip.head`."""
    training.model.eval()
    targets = torch.as_tensor(list(task.train.targets))
    moments, start = Moments(len(task.classes)), 0
    for (features,) in training_features([training.model], task.train, training, encoded):
        moments.add(features, targets[start : start + len(features)])
        start += len(features)
    return moments.of(task)
