"""What a task is learned from and with, as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mulki.clip.models import VisionLanguageModel
from mulki.data.reference import ReferenceSet
from mulki.data.replay import ReplayImages
from mulki.data.task import Task
from mulki.distributed.world import ALONE, World
from mulki.methods import Method
from mulki.train.config.precision import Precision, as_tested
from mulki.train.config.run_config import RunConfig
from mulki.train.config.tasks import needs_of
from mulki.train.learning.anchor_texts import Anchors
from mulki.train.learning.memory import MicroBatch
from mulki.train.learning.teacher_cache import TeacherCache


@dataclass(frozen=True, kw_only=True)
class Training:
    """The student and how it is trained; the same for all tasks of a run.

    Args:
        config: options of the run.
        method: what is trained: its losses, and parameters of its own.
        model: the student; its trainable parameters move.
        transform: of the training images, and of those of the reference set.
        precision: how the encoders compute, and the device of this process.
        world: the processes that learn together, each with `config.batch_size` images of a batch.
        teacher_cache: features of the original model on disk, if the run has a folder for them.
    """

    config: RunConfig
    method: Method
    model: VisionLanguageModel
    transform: Callable[..., Tensor]
    precision: Precision
    world: World = ALONE
    teacher_cache: TeacherCache | None = None

    @property
    def tested(self) -> VisionLanguageModel:
        """The student as it is tested."""
        return as_tested(self.model, self.config.precision_eval)


@dataclass(frozen=True)
class TaskInputs:
    """A task and what the method needs to learn it.

    Args:
        index: its place in the sequence, from 0.
        task: it.
        frozen: the models behind `method.needs.teachers` (and the original one for prototypes), by
            the names in `mulki.methods`; names may mean the same model.
        reference: images and captions, if `method.needs.reference`.
        anchors: texts, if `method.needs.anchors`.
        replay: images of earlier tasks, if `method.needs.replay` and there are such tasks.
    """

    index: int
    task: Task
    frozen: Mapping[str, VisionLanguageModel]
    reference: ReferenceSet | None = None
    anchors: Anchors | None = None
    replay: ReplayImages | None = None

    @property
    def prompts(self) -> list[str]:
        """[C], the first prompt of each class."""
        return [of_class[0] for of_class in self.task.prompts()]

    def check(self, method: Method) -> None:
        """Raise a ValueError for a reference set or anchors without need, or the reverse."""
        needs, name = needs_of(method, self.task), type(method).__name__
        if (self.reference is None) == needs.reference:
            given = "None" if self.reference is None else "a reference set"
            wanted = "one" if needs.reference else "None"
            raise ValueError(f"reference: got {given}, wanted {wanted} for {name}")
        if (self.anchors is None) == bool(needs.anchors):
            given = "None" if self.anchors is None else f"{len(self.anchors)} texts"
            wanted = "those of the task" if needs.anchors else "None"
            raise ValueError(f"anchors: got {given}, wanted {wanted} for {name}")


@dataclass(frozen=True)
class StepReport:
    """What is known of a step after it.

    Args:
        step: its number in the task, from 1.
        losses: its terms by name.
        lr: the learning rate.
        images: images in its batch, those of all processes.
        seconds: since the step before, loading included.
        parts: of these seconds, those that waited for images (`loading`), took the features, the
            losses and their gradients (`gradients`), and moved the weights (`update`). A device
            that works ahead of the host does the last under the name of what comes after it. The
            rest is saves, and the listener of the step before.
    """

    step: int
    losses: Mapping[str, float]
    lr: float
    images: int
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Listeners:
    """Functions that are called while a task is learned.

    Args:
        step: called after every step.
        encoded: called with the number of training images that the teachers have just encoded,
            where they encode them before the first step.
        micro_batch: called at the first step with the micro-batch that fits, which is then measured
            whatever the option says.
    """

    step: Callable[[StepReport], None] = lambda report: None
    encoded: Callable[[int], None] = lambda images: None
    micro_batch: Callable[[MicroBatch], None] | None = None
