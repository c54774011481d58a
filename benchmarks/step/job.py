"""What both loops compute: a model, a task of the bundled pack, an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import Cell
from mulki.clip import models
from mulki.clip.features import Features
from mulki.clip.models import VisionLanguageModel
from mulki.data import load_sequence
from mulki.data.subset import limited
from mulki.data.task import Task
from mulki.data.transforms import train_transform
from mulki.errors import InputError, nearest
from mulki.functional import teacher_kl
from mulki.methods.mulki import MulKI
from mulki.similarity import Similarity
from mulki.train.config.precision import Precision
from mulki.train.config.presets import RELATIONS
from mulki.train.config.run_config import RunConfig, resolve

CAPTION_TEMPERATURE = 2.0


@dataclass(frozen=True, eq=False)
class Job:
    """One comparison.

    Args:
        config, options: of `mulki run` and of its method `mulki`, every stage switched on.
        start: the model both students start from, its locked parts frozen.
        teachers: the original model and the one after the previous task; two models, as from the
            second task on.
        task: of the bundled pack, with few images.
        transform: of the training images.
        captions: sentences that belong to no task; the original model's features of them take part
            in a further term, as in ZSCL. None by default.
    """

    config: RunConfig
    options: MulKI.Options
    start: VisionLanguageModel
    teachers: tuple[VisionLanguageModel, VisionLanguageModel]
    task: Task
    transform: Callable[..., Tensor]
    captions: Sequence[str]

    @property
    def device(self) -> torch.device:
        return self.start.device

    @property
    def prompts(self) -> list[str]:
        """One per class."""
        return [of_class[0] for of_class in self.task.prompts()]

    @property
    def warm_up(self) -> int:
        """Steps before the timed ones: an epoch, so that what is kept is kept, and two at least."""
        return max(2, len(self.task.train) // self.config.batch_size)

    def columns(self) -> dict[str, Cell]:
        """What tells it from other jobs."""
        c = self.config
        return {
            "model": c.model,
            "task": self.task.name,
            "classes": len(self.task.classes),
            "captions": len(self.captions),
            "batch_size": c.batch_size,
            "precision": c.precision,
            "lock_text": c.lock_text,
            "augment": c.augment,
            "torchcompile": c.torchcompile,
            "workers": c.workers,
            "train_images": len(self.task.train),
        }

    def described(self) -> str:
        """The same in words."""
        c = self.config
        parts = [c.model, f"{self.task.name} ({len(self.task.classes)} classes)"]
        parts += [f"{len(self.captions)} captions"] if self.captions else []
        parts += [f"batch {c.batch_size}", c.precision]
        parts += ["text locked"] if c.lock_text else []
        parts += [f"augment {c.augment}"] if c.augment != "none" else []
        parts += ["torch.compile"] if c.torchcompile else []
        return ", ".join(parts)

    def precision(self) -> Precision:
        """Anew, since a gradient scaler belongs to one loop."""
        return Precision(self.config.precision, self.device)

    def student(self) -> VisionLanguageModel:
        """Beside the start model, so that no loss of the first step is 0; it trains the same."""
        trains = set(self.start.trainable())
        copy = _moved(self.start, 0.99)
        for name, parameter in copy.clip.named_parameters():
            parameter.requires_grad_(name in trains)
        copy.split = None
        return copy


def prepare(*, task: str, captions: int, rounds: int, lock_text: bool | None, **given: Any) -> Job:
    """Load everything.

    Args:
        captions: how many.
        rounds: steps that are timed.
        lock_text: by default what the preset of the model says.
        given: further options of `mulki run`.

    Raises:
        InputError: naming the option.
    """
    # Plain loops of this family have no anchors; benchmarks.step.anchors has them.
    given |= {"method": "mulki", "lr_scheduler": "const", "anchors": "none"}
    # They distil on the task's images, with a gate and a running mean.
    given |= RELATIONS | {"gate": "label", "we_every": 10, "l2": 0.0}
    if lock_text is not None:
        given["lock_text"] = lock_text
    settings = resolve(given)
    config = settings.run
    tasks = {t.name: t for t in load_sequence(("embedded",), "I")}
    if task not in tasks:
        raise InputError(
            f"--task: got {task!r}{nearest(task, tasks)}, wanted one of {', '.join(tasks)}"
        )
    torch.manual_seed(0)
    device = torch.device(config.device)
    start = models.load(config.model, config.pretrained, device=device)
    start.lock(text=config.lock_text)
    Precision(config.precision, device).convert(start)
    visual: Any = start.clip.visual
    assert isinstance(settings.method, MulKI.Options)
    job = Job(
        config,
        settings.method,
        start,
        (start.frozen_copy(), _moved(start, 1.01)),
        limited(tasks[task], config.limit_images or config.batch_size),
        train_transform(
            start.preprocess, config.augment, start.image_size, visual.image_mean, visual.image_std
        ),
        [f"sentence {i} of a set that has nothing to do with the task" for i in range(captions)],
    )
    # On an accelerator the parts are timed in rounds of their own, since that waits for it.
    timed = rounds if device.type == "cpu" else 2 * rounds
    return replace(job, config=replace(config, iterations=job.warm_up + timed))


@torch.no_grad()
def _moved(start: VisionLanguageModel, factor: float) -> VisionLanguageModel:
    # Another model than the original, so that both have to be asked.
    own = start.trainable()
    copy = start.frozen_copy()
    for name, parameter in copy.clip.named_parameters():
        if name in own:
            parameter.mul_(factor)
    return copy


class WithCaptions(MulKI):
    """MulKI and, if there are captions, ZSCL's distillation on them in both directions.

    Args:
        captions: [n, D] the original model's features.
        scale: its logit scale.
    """

    def __init__(self, options: MulKI.Options, captions: Tensor, scale: Tensor):
        super().__init__(options)
        self._captions = captions
        self._scale = scale

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        terms = super().losses(student, teachers, target)
        if len(self._captions):
            own = Similarity(student.images, self._captions, self._scale)
            said = Similarity(teachers[0].images, self._captions, self._scale)
            terms["caption_loss"] = sum(
                teacher_kl(a, [b], temperature=CAPTION_TEMPERATURE)
                for a, b in ((own, said), (own.T, said.T))
            )
        return terms
