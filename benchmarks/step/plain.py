"""The same step as code of the ZSCL family writes it.

Both teachers and their class texts, and the captions, are encoded anew at every step; so are the
student's class texts, from the tokens on. Images are decoded anew too. Logits are stored in full,
the divergence is `F.kl_div`, AdamW is torch's default, tensors lie in the default layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step.job import CAPTION_TEMPERATURE, Job
from benchmarks.step.stopwatch import Stopwatch
from mulki.clip.features import Features
from mulki.clip.models import VisionLanguageModel
from mulki.clip.prototypes import Prototypes, class_means
from mulki.data.loader import batches, cycle
from mulki.methods.mulki import MulKI
from mulki.stages.connecting import RunningMean
from mulki.stages.distinguishing import class_weights


class PlainLoop:
    """The loop, a step at a time.

    Args:
        job: of whose start model and teachers this makes copies.
        watch: counts its steps; on optimisers see `benchmarks.step.ours.watched_optimizer`.
    """

    def __init__(self, job: Job, watch: Stopwatch) -> None:
        self._job = job
        self._watch = watch
        self._precision = job.precision()
        self._student = job.student()
        self._teachers = [teacher.frozen_copy() for teacher in job.teachers]
        for model in (self._student, *self._teachers):
            model.clip.to(memory_format=torch.contiguous_format)
        tokenizer = self._student.tokenizer
        self._tokens = tokenizer(job.prompts).to(job.device)
        self._captions = tokenizer(list(job.captions)).to(job.device) if job.captions else None
        self._prototypes = [self._class_means(teacher) for teacher in self._teachers]
        self._own_prototypes = Prototypes(
            self._prototypes[0], momentum=job.options.prototype_momentum
        )
        weights = self._student.trainable()
        config = job.config
        self._optimizer = torch.optim.AdamW(
            weights.values(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=0.0
        )
        self._weights = weights
        self._mean = RunningMean(weights, job.options.we_every)
        self._steps = 0
        loader = batches(
            job.task.train,
            job.transform,
            config.batch_size,
            shuffle=True,
            seed=config.seed + 7919,  # that of our loop in the second task
            workers=config.workers,
            drop_last=True,
            pin_memory=job.device.type == "cuda",
        )
        self._batches = cycle(loader)
        self._student.train()

    @torch.no_grad()
    def _class_means(self, teacher: VisionLanguageModel) -> Tensor:
        images = self._job.task.train
        loader = batches(images, self._job.start.preprocess, 64, shuffle=False, seed=0)
        with self._precision.autocast():
            features = [
                self._normalised(teacher.clip.encode_image(batch.to(self._job.device)))
                for batch, *_ in loader
            ]
        target = torch.as_tensor(list(images.targets), device=self._job.device)
        return class_means(torch.cat(features), target, len(self._job.task.classes))

    def _normalised(self, features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=-1)

    def step(self) -> float:
        """Take a step and return its loss."""
        watch, clip = self._watch, self._student.clip
        images, target, _ = next(self._batches)
        images, target = images.to(self._job.device), target.to(self._job.device)
        watch.lap("data")
        with torch.no_grad(), self._precision.autocast():
            teachers = [
                Features(
                    self._normalised(teacher.clip.encode_image(images)),
                    self._normalised(teacher.clip.encode_text(self._tokens)),
                    teacher.logit_scale,
                    prototypes,
                )
                for teacher, prototypes in zip(self._teachers, self._prototypes, strict=True)
            ]
            captions = None
            if self._captions is not None:
                captions = self._normalised(self._teachers[0].clip.encode_text(self._captions))
        watch.lap("teachers")
        with self._precision.autocast():
            student = Features(
                watch.end_loss_at(self._normalised(clip.encode_image(images))),
                watch.end_loss_at(self._normalised(clip.encode_text(self._tokens))),
                self._student.logit_scale,
                self._own_prototypes(),
            )
        watch.lap("forward")
        loss = objective(student, teachers, captions, target, self._job.options)
        self._own_prototypes.observe(student.images.detach(), target)
        watch.lap("loss")
        self._optimizer.zero_grad()
        scaler = self._precision.scaler
        scaler.scale(loss).backward()
        scaler.step(self._optimizer)
        scaler.update()
        self._steps += 1
        self._mean.observe(self._weights, self._steps)
        return loss.item()


def objective(
    student: Features,
    teachers: list[Features],
    captions: Tensor | None,
    target: Tensor,
    o: MulKI.Options,
) -> Tensor:
    """The objective of `mulki.stages.objective` and `WithCaptions`, with the gate "label"."""
    temperature = o.temperature
    logits = student.scale * student.images @ student.texts.T
    said = [t.scale * t.images @ t.texts.T for t in teachers]
    true = torch.stack(
        [F.log_softmax(z / temperature, 1).gather(1, target[:, None])[:, 0] for z in said], 1
    )
    weights = F.softmax(true / o.gate_temperature, dim=1)
    per_class = class_weights(weights, target, len(student.texts))

    def kl(own: Tensor, of_teachers: list[Tensor], rows: Tensor) -> Tensor:
        log_q = F.log_softmax(own / temperature, dim=1)
        parts = [
            rows[:, k] * F.kl_div(log_q, F.softmax(z / temperature, 1), reduction="none").sum(1)
            for k, z in enumerate(of_teachers)
        ]
        return temperature**2 * torch.stack(parts).sum(0).mean()

    def diagonal(z: Tensor) -> Tensor:
        classes = torch.arange(len(z), device=z.device)
        return (F.cross_entropy(z, classes) + F.cross_entropy(z.T, classes)) / 2

    prototypes = student.prototypes
    assert prototypes is not None
    loss = F.cross_entropy(logits, target, label_smoothing=o.label_smoothing)
    loss = loss + o.alignment * diagonal(student.scale * prototypes @ student.texts.T)
    loss = loss + o.image_text * kl(logits, said, weights)
    for share, rows, left, right in (
        (o.image_image, weights, "images", "prototypes"),
        (o.text_image, per_class, "texts", "prototypes"),
        (o.text_text, per_class, "texts", "texts"),
    ):
        own, *others = (
            m.scale * getattr(m, left) @ getattr(m, right).T for m in (student, *teachers)
        )
        loss = loss + share * kl(own, others, rows)
    for k, t in enumerate(teachers):
        distance = (student.images - t.images).square().sum(1)
        loss = loss + o.feature * (weights[:, k] * distance).mean()
    if captions is not None:
        own = teachers[0].scale * student.images @ captions.T / CAPTION_TEMPERATURE
        other = teachers[0].scale * teachers[0].images @ captions.T / CAPTION_TEMPERATURE
        for z, of_teacher in ((own, other), (own.T, other.T)):
            divergence = F.kl_div(
                F.log_softmax(z, 1), F.softmax(of_teacher, 1), reduction="batchmean"
            )
            loss = loss + CAPTION_TEMPERATURE**2 * divergence
    return loss
