"""What is measured: one training step of a model with the whole objective of MulKI."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.clip import models
from mulki.clip.features import Features
from mulki.losses import MulKILoss
from mulki.train.config.precision import Name, Precision
from mulki.train.microbatch import Encoder, backward

CLASSES = 32


@dataclass(frozen=True)
class Setting:
    """Of all points of a run.

    Args:
        model: an open_clip model, with random weights, or mulki-mini.
        precision: as `mulki run` names it.
        device: where it runs.
        threads: on the CPU; 0 for those torch takes.
    """

    model: str
    precision: Name
    device: str
    threads: int


class Workload:
    """A student whose text tower is locked, two teachers whose features are known, random images.

    The text tower is locked so that nothing but the image tower keeps activations: what it keeps
    does not depend on the batch and would make a growth look smaller.
    """

    def __init__(self, setting: Setting) -> None:
        if setting.threads:
            torch.set_num_threads(setting.threads)
        torch.manual_seed(0)
        device = torch.device(setting.device)
        self.model = models.load(setting.model, device=device)
        self.model.lock(text=True)
        self.precision = Precision(setting.precision, device)
        self.precision.convert(self.model)
        self.model.train()
        texts = self.model.text_inputs([f"a picture of thing {i}." for i in range(CLASSES)])
        with torch.no_grad():
            width = self.model.encode_texts(texts).shape[1]
        self.texts = texts
        self._width = width
        self._constants = [self._unit(CLASSES) for _ in range(5)]
        self.loss = MulKILoss(gate="label")
        self.weights = [*self.model.trainable().values()]
        # A step must not move the weights far: sizes are compared at the same ones.
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-7, fused=device.type != "mps")

    def _unit(self, rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, self._width, device=self.model.device), dim=1)

    def batch(self, size: int) -> Batch:
        """A batch of that many images, in the host's memory, with what the teachers say of them."""
        side = self.model.image_size
        images = torch.randn(size, 3, side, side)
        target = torch.randint(CLASSES, (size,), device=self.model.device)
        texts, prototypes = self._constants[:2], self._constants[2:4]
        teachers = [Features(self._unit(size), texts[i], 100.0, prototypes[i]) for i in range(2)]
        return Batch(images, target, tuple(teachers))

    def gradients(self, batch: Batch, micro_batch: int | None) -> Mapping[str, Tensor]:
        """The losses; gradients are in ``.grad``."""

        def encode_images(part: Tensor) -> Tensor:
            with self.precision.autocast():
                return self.model.encode_images(part)

        def encode_texts(part: Tensor) -> Tensor:
            with self.precision.autocast():
                return self.model.encode_texts(part)

        def losses(images: Tensor, texts: Tensor) -> Mapping[str, Tensor]:
            student = Features(images, texts, self.model.logit_scale, self._constants[4])
            return self.loss(student, batch.teachers, batch.target, output_dict=True)

        self.optimizer.zero_grad()
        terms = backward(
            losses,
            Encoder(encode_images, (batch.images,)),
            Encoder(encode_texts, (self.texts,), split=False),
            micro_batch=micro_batch,
            scaler=self.precision.scaler,
        )
        assert isinstance(terms, Mapping)
        return terms

    def step(self, batch: Batch, micro_batch: int | None) -> float:
        """Take a step and return its seconds."""
        started = self._now()
        self.gradients(batch, micro_batch)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        return self._now() - started

    def _now(self) -> float:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)
        return time.perf_counter()

    def state_bytes(self) -> int:
        """Of all weights and of the optimiser's state, without gradients."""
        held = [*self.model.clip.parameters(), *self.model.clip.buffers()]
        held += [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.nbytes for t in held)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images, their classes and what the teachers say of them."""

    images: Tensor
    target: Tensor
    teachers: tuple[Features, ...]

    def tensors(self) -> list[Tensor]:
        """Those with a row per image."""
        return [self.images, self.target, *(t.images for t in self.teachers)]

    def head(self, size: int) -> Batch:
        """Its first images."""
        teachers = tuple(replace(t, images=t.images[:size]) for t in self.teachers)
        return Batch(self.images[:size], self.target[:size], teachers)

    def bytes(self) -> int:
        """Of images, classes and teachers' features."""
        return sum(t.nbytes for t in self.tensors())
