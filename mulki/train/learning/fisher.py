"""The diagonal of the Fisher information of the student's weights on a task's training images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.data.loader import batches
from mulki.data.subset import Subset, permutation
from mulki.distributed.collectives import sum_of_ranks
from mulki.train.learning.inputs import TaskInputs, Training


def fisher_diagonal(training: Training, inputs: TaskInputs, count: int) -> dict[str, Tensor]:
    """``mean over images x, y ~ p(. | x) of (d log p(y | x) / d theta)^2`` of the task's classes.

    One image at a time, since the square of a mean is no mean of squares, without autocast. Images
    and classes are drawn with the run's seed, the same ones on any number of processes. The model
    is in evaluation mode afterwards.

    Args:
        training: with the weights as they are after the task's steps.
        inputs: of the task.
        count: images, all of the task if it has fewer.

    Returns:
        A tensor of each trainable weight's shape, in float32 at least, by its name.
    """
    config, world, model = training.config, training.world, training.model
    seed = config.seed + inputs.index
    places = sorted(permutation(len(inputs.task.train), seed)[:count])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(places), generator=generator, dtype=torch.float64)
    mine = slice(world.rank, None, world.size)
    model.eval()
    weights = model.trainable()
    sums = {
        name: torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
        for name, value in weights.items()
    }
    texts = model.encode_texts(model.text_inputs(inputs.prompts))
    for image, draw in zip(_images(training, inputs, places[mine]), draws[mine], strict=True):
        logits = (model.logit_scale * model.encode_images(image[None]) @ texts.mT)[0]
        # On the CPU: a GPU has no deterministic sum of this kind, and Metal no float64.
        below = logits.detach().cpu().double().softmax(0).cumsum(0)
        drawn = (below < draw).sum().clamp(max=len(below) - 1).to(logits.device)
        found: Any = torch.autograd.grad(
            F.cross_entropy(logits, drawn),
            list(weights.values()),
            retain_graph=True,  # that of the class texts
            allow_unused=True,
        )
        for total, gradient in zip(sums.values(), found, strict=True):
            if gradient is not None:
                total += gradient.to(total.dtype).square()
    if world.size > 1:
        sums = {name: sum_of_ranks(value) for name, value in sums.items()}
    return {name: value / len(places) for name, value in sums.items()}


def _images(training: Training, inputs: TaskInputs, places: Sequence[int]) -> Iterator[Tensor]:
    if not places:
        return  # more processes than images
    loader = batches(
        Subset(inputs.task.train, places),
        training.model.preprocess,
        training.config.batch_size_eval,
        workers=training.config.workers,
    )
    for images, *_ in loader:
        yield from images
