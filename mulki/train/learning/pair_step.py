"""One training step on a task of captions: all pairs of a batch against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mulki.clip.features import of_reference
from mulki.clip.texts import TextInputs
from mulki.data.caption_task import CaptionTask
from mulki.train.learning.batches import PairBatch
from mulki.train.learning.class_step import Listen, Step
from mulki.train.learning.inputs import TaskInputs, Training
from mulki.train.learning.task_teachers import TaskTeachers
from mulki.train.microbatch import Encoder


class PairStep(Step):
    """Steps on a task of captions, each image with one; arguments as of `Step`."""

    def __init__(
        self, training: Training, inputs: TaskInputs, teachers: TaskTeachers, listen: Listen
    ):
        super().__init__(training, inputs, teachers, listen)
        assert isinstance(inputs.task, CaptionTask)
        self._pairs = inputs.task.train
        self._texts = TextInputs(self._model, self._world)

    def state(self) -> dict[str, Any]:
        return super().state() | {"texts": self._texts.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._texts.restore(state["texts"])

    def gradients(self, batch: PairBatch) -> dict[str, float]:
        captions = self._inputs(batch)
        if self._micro_batch is None:

            def encode(part: Tensor) -> Tensor:
                return torch.cat(self._encode_pairs(part, captions[: len(part)]))

            self._micro_batch = self._chosen_micro_batch(batch.images, encode)
        if self._micro_batch == len(batch.images):
            images = batch.images.to(self._model.device, non_blocking=True)
            batch = replace(batch, images=images)
        teachers = self._teachers.of_pairs(batch, self._micro_batch)
        method, world, scale = self._method, self._world, self._model.logit_scale

        def losses(pairs: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
            images, texts = (world.gather(rows, len(batch.places)) for rows in pairs)
            student = of_reference(images, texts, scale)
            terms = method.pair_losses(student, teachers, batch.distinct)
            return {**terms, **method.penalties()}

        return self._derive(losses, [Encoder(self._encode_pairs, (batch.images, captions))])

    def _inputs(self, batch: PairBatch) -> Tensor:
        # Of this process's captions. What a frozen part of the text tower computes is kept, while
        # tokens are made as fast as they are looked up.
        if self._model.trains_texts:
            return self._model.text_inputs(batch.captions)
        captions = [self._pairs.captions[place][0] for place in batch.places.tolist()]
        return self._world.part(self._texts(captions))
