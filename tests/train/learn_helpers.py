"""Learning one task with tiny models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mulki import methods
from mulki.clip.models import VisionLanguageModel
from mulki.data import Task
from mulki.data.reference import ReferenceSet
from mulki.data.transforms import train_transform
from mulki.methods import PREVIOUS, ZERO_SHOT, Method
from mulki.train.config.precision import Precision
from mulki.train.config.presets import RELATIONS
from mulki.train.config.run_config import RunConfig
from mulki.train.learning.anchor_texts import Anchors
from mulki.train.learning.inputs import Listeners, StepReport, TaskInputs, Training
from mulki.train.learning.learn import learn_task
from mulki.train.learning.teacher_cache import TeacherCache

Load = Callable[..., VisionLanguageModel]


# An epsilon well above rounding noise, so that AdamW does not blow it up to whole steps.
CONFIG = RunConfig(iterations=6, batch_size=6, batch_size_eval=7, lr=1e-3, eps=1e-4)


BOTH = "mulki"


def method_named(name: str, **options: Any) -> Method:
    """A method with these options.

    mulki has its relations on the task's own images, without text anchors: a test would have to
    bring these, and made images.
    """
    cls = methods.get(name)
    without = RELATIONS | {"gate": "uniform", "anchors": "none"} if name == "mulki" else {}
    return cls(cls.Options(**without | options))


def training_of(model: VisionLanguageModel | None = None, **others: Any) -> Training:
    """What is not given is as in `learn`; batches need no model."""
    usual = {
        "config": CONFIG,
        "method": method_named("finetune"),
        "transform": model and model.preprocess,
        "precision": Precision("fp32", torch.device("cpu")),
    }
    return Training(model=model, **usual | others)  # type: ignore[arg-type]


def learn(
    model: VisionLanguageModel,
    task: Task,
    method: str | Method = "finetune",
    frozen: Mapping[str, VisionLanguageModel] | None = None,
    *,
    config: RunConfig = CONFIG,
    transform: Callable[..., Any] | None = None,
    index: int = 0,
    precision: str = "fp32",
    anchors: Anchors | None = None,
    reference: ReferenceSet | None = None,
    teacher_cache: TeacherCache | None = None,
    hear: Callable[[StepReport], None] = lambda report: None,
) -> list[StepReport]:
    if frozen is None:
        original = model.frozen_copy()
        frozen = {ZERO_SHOT: original, PREVIOUS: original}
    reports: list[StepReport] = []

    def listen(report: StepReport) -> None:
        reports.append(report)
        hear(report)

    training = training_of(
        model,
        config=config,
        method=method_named(method) if isinstance(method, str) else method,
        transform=transform or model.preprocess,
        precision=Precision(precision, torch.device("cpu")),  # type: ignore[arg-type]
        teacher_cache=teacher_cache,
    )
    inputs = TaskInputs(index, task, frozen, reference, anchors)
    steps = learn_task(training, inputs, Listeners(listen))
    assert steps == len(reports)
    return reports


def two_teachers(load: Load) -> dict[str, VisionLanguageModel]:
    return {ZERO_SHOT: load(seed=1).frozen_copy(), PREVIOUS: load(seed=2).frozen_copy()}


def crop(model: VisionLanguageModel) -> Callable[..., Any]:
    visual = model.clip.visual
    return train_transform(
        model.preprocess, "crop", model.image_size, visual.image_mean, visual.image_std
    )
