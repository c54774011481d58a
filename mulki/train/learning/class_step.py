"""One training step: features of student and teachers, the losses, gradients, the update."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mulki.clip.features import Features, of_reference
from mulki.clip.texts import text_inputs
from mulki.distributed.launch import processes_here
from mulki.distributed.parts import set_whole
from mulki.methods import Method
from mulki.train.config.run_config import AUTO
from mulki.train.learning import memory
from mulki.train.learning.anchor_texts import AnchorBatch
from mulki.train.learning.batches import Batch, PairBatch
from mulki.train.learning.inputs import TaskInputs, Training
from mulki.train.learning.optimizer import SHARE, clip_gradients, make_optimizer
from mulki.train.learning.task_teachers import TaskTeachers
from mulki.train.microbatch import Encoder, backward

_log = logging.getLogger(__name__)

Listen = Callable[[memory.MicroBatch], None] | None


class Step(ABC):
    """Trains a model batch by batch on one task; a subclass for each kind of batch.

    Args:
        training: the student and how it is trained.
        inputs: the task, with its anchors if the method needs any.
        teachers: of the task.
        listen: as `Listeners.micro_batch`.
    """

    def __init__(
        self, training: Training, inputs: TaskInputs, teachers: TaskTeachers, listen: Listen
    ):
        self._model = training.model
        self._method = training.method
        self._teachers = teachers
        self._config = training.config
        self._precision = training.precision
        self._world = training.world
        self._listen = listen
        self._parameters = [*self._model.trainable().values(), *self._method.parameters()]
        self._optimizer = make_optimizer(self._model, self._method, self._config)
        self._micro_batch: int | None = None

    @abstractmethod
    def gradients(self, batch: Any) -> dict[str, float]:
        """Set the gradients of one batch, averaged over all processes.

        Args:
            batch: from `mulki.train.learning.batches.task_batches`.

        Returns:
            The terms of the loss.
        """

    def state(self) -> dict[str, Any]:
        """What the step keeps from one batch to the next, beside what it is made of."""
        known = self._optimizer.state
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return {
            "optimizer": [dict(known[p]) if p in known else {} for p in parameters],
            "micro_batch": self._micro_batch,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        known = {}
        for place, (parameter, of_one) in enumerate(
            zip(parameters, state["optimizer"], strict=True)
        ):
            known[place] = dict(of_one)
            for name, value in of_one.items():
                if value.shape == parameter.shape:
                    # Sharded, and laid out in memory, as the parameter: the fused update goes
                    # through both in one order.
                    known[place][name] = torch.empty_like(parameter, dtype=value.dtype)
                    set_whole(known[place][name], value)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": known, "param_groups": groups})
        self._micro_batch = state["micro_batch"]

    def update(self, lr: float) -> None:
        """Move the parameters along their gradients.

        Args:
            lr: the learning rate of this step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group[SHARE]
        scaler, largest = self._precision.scaler, self._config.grad_clip_norm
        hooked = type(self._method).before_step is not Method.before_step
        if hooked or largest is not None:
            scaler.unscale_(self._optimizer)
        if hooked:
            self._method.before_step(self._model.trainable())
        if largest is not None:
            clip_gradients([group["params"] for group in self._optimizer.param_groups], largest)
        scaler.step(self._optimizer)
        scaler.update()

    def _encode_images(self, images: Tensor) -> Tensor:
        with self._precision.autocast():
            return self._model.encode_images(images)

    def _encode_texts(self, inputs: Tensor) -> Tensor:
        with self._precision.autocast():
            return self._model.encode_texts(inputs)

    def _encode_pairs(self, images: Tensor, *captions: Tensor) -> tuple[Tensor, ...]:
        return self._encode_images(images), *map(self._encode_texts, captions)

    def _chosen_micro_batch(
        self, images: Tensor, encode: Callable[[Tensor], Tensor], texts: Tensor | None = None
    ) -> int:
        """Images to encode at a time.

        Args:
            images: this process's part of a batch.
            encode: from images to features, with gradients; their graph is that of a micro-batch.
            texts: inputs that are all encoded at a time, and whose graph stays for all images.
        """
        config, device, world = self._config, self._model.device, self._world
        given = len(images)
        if config.micro_batch is not None and config.micro_batch != AUTO:
            given = min(int(config.micro_batch), given)
        if config.micro_batch != AUTO and self._listen is None:
            return given
        free = memory.free_memory(device)
        if free is not None and device.type == "cpu":
            free //= processes_here()
        fit = memory.fitting_micro_batch(
            encode,
            images,
            self._parameters,
            free,
            beside=0 if texts is None else memory.graph_bytes(self._encode_texts, texts),
            # A process without memory left would leave the others waiting in a sharded encoder.
            tried=device.type != "cpu" and not config.fsdp,
            smallest=lambda number: world.smallest(number, device),
        )
        if self._listen is not None:
            self._listen(fit)
        if config.micro_batch != AUTO:
            return given
        _log.info("--micro-batch auto: %d of %d images at a time (%s)", fit.size, len(images), fit)
        return fit.size

    def _derive(
        self, losses: Callable[..., Mapping[str, Tensor]], encoders: Sequence[Encoder]
    ) -> dict[str, float]:
        # The terms, and their gradients.
        for parameter in self._parameters:
            parameter.grad = None
        terms = backward(
            losses,
            *encoders,
            micro_batch=self._micro_batch,
            scaler=self._precision.scaler,
        )
        assert isinstance(terms, Mapping)
        self._world.average(self._parameters)
        # One read from the device for all terms of a step.
        values = torch.stack([term.reshape(()) for term in terms.values()])
        return dict(zip(terms, values.tolist(), strict=True))


class ClassStep(Step):
    """Steps on a task with classes; arguments as of `Step`."""

    def __init__(
        self, training: Training, inputs: TaskInputs, teachers: TaskTeachers, listen: Listen
    ):
        super().__init__(training, inputs, teachers, listen)
        self._class_texts = text_inputs(self._model, inputs.prompts, self._world)
        self._anchors = inputs.anchors
        earlier = [] if inputs.replay is None else inputs.replay.texts
        self._replay_texts = text_inputs(self._model, earlier, self._world) if earlier else None

    def gradients(self, batch: Batch) -> dict[str, float]:
        captions = None
        needs, reference = self._method.needs, batch.reference
        if reference is not None and needs.captions and needs.student_captions:
            captions = self._model.text_inputs(reference.captions)
        anchors = self._anchors.draw() if self._anchors is not None else None
        texts = self._class_texts
        if anchors is not None and needs.student_anchors:
            texts = torch.cat([texts, anchors.inputs])
        if self._replay_texts is not None:
            texts = torch.cat([texts, self._replay_texts])
        if self._micro_batch is None:
            self._micro_batch = self._fitting(batch, texts, captions)
        if self._micro_batch == len(batch.images):
            images = batch.images.to(self._model.device, non_blocking=True)
            batch = replace(batch, images=images)
        # Otherwise the images stay on the host and each micro-batch is moved when it is encoded, so
        # that the device memory of a step does not grow with its batch.
        teachers = self._teachers.features(batch, self._micro_batch, anchors)
        if needs.inputs:
            batch = replace(batch, inputs=self._inputs(batch, teachers))
            teachers = self._teachers.with_inputs(teachers, batch, self._micro_batch)
        return self._backward(batch, texts, captions, anchors, teachers)

    def _inputs(self, batch: Batch, teachers: tuple[Features, ...]) -> Tensor:
        # What the method makes of the images of `batch`; see `Method.inputs`.
        size, world, method = self._micro_batch, self._world, self._method
        assert size is not None

        # From it `checkpoint` knows whose generator to repeat; the images stay on the host.
        here = torch.empty(0, device=self._model.device)

        def encode(images: Tensor, teacher: int | None = None) -> Tensor:
            model = self._model if teacher is None else self._teachers.teachers[teacher][1]

            def part(some: Tensor, _: Tensor) -> Tensor:
                with self._precision.autocast():
                    return model.encode_images(some)

            if len(images) <= size:
                return part(images, here)
            parts = images.split(size)
            return torch.cat([checkpoint(part, some, here, use_reentrant=False) for some in parts])

        of_part = tuple(replace(of, images=world.part(of.images)) for of in teachers)
        images = batch.images.detach()
        made = method.inputs(images, world.part(batch.target), of_part, encode)
        if (shape := getattr(made, "shape", None)) != images.shape:
            came = type(made).__name__ if shape is None else list(shape)
            raise ValueError(
                f"{type(method).__name__}.inputs: returned {came}, wanted "
                f"{list(images.shape)}, an image for each"
            )
        return made.detach()

    def _fitting(self, batch: Batch, texts: Tensor, captions: Tensor | None) -> int:
        def encode(part: Tensor) -> Tensor:
            # Of a batch that fits as a whole, a step holds the graphs of all kinds of images.
            n = len(part)
            features = [self._encode_images(part)]
            if self._method.needs.inputs:
                features.append(self._encode_images(part))
            if batch.replay is not None:
                features.append(self._encode_images(batch.replay.images[:n]))
            if batch.reference is not None:
                pairs = _pairs(batch.reference, captions)
                features += self._encode_pairs(*(x[:n] for x in pairs))
            return torch.cat(features)

        return self._chosen_micro_batch(batch.images, encode, self._world.part(texts))

    def _backward(
        self,
        batch: Batch,
        texts: Tensor,
        captions: Tensor | None,
        anchors: AnchorBatch | None,
        teachers: tuple[Features, ...],
    ) -> dict[str, float]:
        method, world, scale = self._method, self._world, self._model.logit_scale
        num_texts, num_classes = len(texts), len(self._class_texts)
        num_replayed = 0 if self._replay_texts is None else len(self._replay_texts)

        def size_of(images: Tensor) -> int:
            whole = len(images)
            assert self._micro_batch is not None
            return whole if self._config.micro_batch is None else min(whole, self._micro_batch)

        encoders = {
            "images": Encoder(self._encode_images, (batch.images,)),
            "texts": Encoder(self._encode_texts, (world.part(texts),), split=False),
        }
        reference, replay, inputs = batch.reference, batch.replay, batch.inputs
        if reference is not None:
            pairs = _pairs(reference, captions)
            size = size_of(pairs[0])
            encoders["reference"] = Encoder(self._encode_pairs, pairs, micro_batch=size)
        if replay is not None:
            size = size_of(replay.images)
            encoders["replay"] = Encoder(self._encode_images, (replay.images,), micro_batch=size)
        if inputs is not None:
            encoders["inputs"] = Encoder(self._encode_images, (inputs,))

        def losses(*outputs: Any) -> Mapping[str, Tensor]:
            of, count = dict(zip(encoders, outputs, strict=True)), len(batch.places)
            of_pairs = None
            if reference is not None:
                num_pairs = len(reference.places)
                of_images, *of_captions = (world.gather(x, num_pairs) for x in of["reference"])
                of_pairs = of_reference(of_images, next(iter(of_captions), None), scale)
            texts = world.gather(of["texts"], num_texts)
            student = Features(
                world.gather(of["images"], count),
                texts[:num_classes],
                scale,
                method.prototypes(),
                of_pairs,
                inputs=None if inputs is None else world.gather(of["inputs"], count),
            )
            if anchors is not None and method.needs.student_anchors:
                anchored = texts[: num_classes + len(anchors.inputs)]
                student = replace(student, anchored=anchored, num_seen=anchors.seen)
            if replay is not None:
                old = world.gather(of["replay"], len(replay.places))
                known = torch.cat([texts[:num_classes], texts[num_texts - num_replayed :]])
                student = replace(
                    student, replay=Features(old, known, scale), replay_target=replay.target
                )
            return {**method.losses(student, teachers, batch.target), **method.penalties()}

        return self._derive(losses, [*encoders.values()])


def _pairs(reference: PairBatch, captions: Tensor | None) -> tuple[Tensor, ...]:
    # What the student encodes of a reference batch.
    return (reference.images,) if captions is None else (reference.images, captions)
