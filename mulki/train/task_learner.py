"""The models and texts that the tasks of a run share, and the learning of one task with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mulki.clip.models import VisionLanguageModel
from mulki.clip.models.adapters import Level
from mulki.clip.texts import TextInputs
from mulki.data import Task
from mulki.data.replay import ReplayImages, kept_places
from mulki.methods import PREVIOUS, ZERO_SHOT, Needs
from mulki.train import sharding
from mulki.train.config.run_config import RunConfig
from mulki.train.config.tasks import needs_of, teachers_of
from mulki.train.learning.anchor_texts import Anchors, anchor_texts
from mulki.train.learning.inputs import Listeners, TaskInputs
from mulki.train.learning.learn import learn_task
from mulki.train.saving.recovery import Saves
from mulki.train.start.setup import Setup

# Anchors of a step where encoding them costs about as much as encoding the images does: through a
# text tower, and through its projection alone.
_ENCODED_ANCHORS = 256
_PROJECTED_ANCHORS = 2**15


class TaskLearner:
    """Learns the tasks of a run; shards and compiles its models when it is made.

    Args:
        setup: of the run.

    Attributes:
        frozen: the models behind the method's needs, by the names in `mulki.methods`.
        text_inputs: of texts beyond the classes of a task.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self.text_inputs = TextInputs(setup.model, setup.world)
        self.frozen = _frozen_models(setup)
        for each in {id(m.clip): m for m in (setup.model, *self.frozen.values())}.values():
            if setup.config.fsdp:
                sharding.shard(each, setup.precision.device)
            if setup.config.torchcompile:
                each.compile()

    def learn(
        self,
        index: int,
        task: Task,
        listeners: Listeners,
        *,
        config: RunConfig | None = None,
        saves: Saves | None = None,
        saved: Mapping[str, Any] | None = None,
    ) -> int:
        """Learn one task, see `mulki.train.learning.learn.learn_task`.

        Args:
            index: its place in the sequence, from 0.
            task: it, or a smaller one with its classes.
            config: another one than the run's, of how many steps there are and of what size.
        """
        setup, frozen = self._setup, self.frozen
        needs = needs_of(setup.method, task)
        first = index == 0 and setup.original is None
        if first and ZERO_SHOT in frozen:
            frozen = dict.fromkeys(frozen, frozen[ZERO_SHOT])
        if saved is None:
            self._start(index, first)
        reference = setup.reference_of(task) if needs.reference else None
        replay = self._replay(index, task, needs)
        inputs = TaskInputs(index, task, frozen, reference, self._anchors(index, needs), replay)
        training = setup if config is None else replace(setup, config=config)
        return learn_task(training, inputs, listeners, saves, saved)

    def _start(self, index: int, first: bool) -> None:
        # The previous model is the student as it is now.
        adapters, config = self._setup.model.adapters, self._setup.config
        if adapters is not None:
            adapters.start_task(config.seed + index, keep=index > 0)
        elif not first and PREVIOUS in self.frozen:
            self.frozen[PREVIOUS].copy_from(self._setup.model)

    def _replay(self, index: int, task: Task, needs: Needs) -> ReplayImages | None:
        setup, replay = self._setup, needs.replay
        earlier = [each for each in setup.tasks[:index] if each.classes]
        if replay is None or not earlier:
            return None
        targets = [each.train.targets for each in earlier]
        places = kept_places(targets, replay.size, replay.choice, setup.config.seed)
        return ReplayImages([*earlier, task], places, replay.batch_size)

    def _anchors(self, index: int, needs: Needs) -> Anchors | None:
        setup = self._setup
        if not needs.anchors:
            return None
        texts = anchor_texts(needs.anchors, setup.tasks, index, setup.vocabulary)
        seed = setup.config.seed + index
        return Anchors(texts, self.text_inputs, anchors_per_step(setup, needs), seed)


def anchors_per_step(setup: Setup, needs: Needs) -> int | None:
    """How many text anchors are drawn for a step; None for all of them."""
    if setup.config.anchors_per_step is not None or not needs.student_anchors:
        return setup.config.anchors_per_step
    return _ENCODED_ANCHORS if setup.model.trains_texts else _PROJECTED_ANCHORS


def _frozen_models(setup: Setup) -> dict[str, VisionLanguageModel]:
    # Copied once and given new weights before each task: a sharded model cannot be copied.
    needed, model = teachers_of(setup.method, setup.tasks), setup.model
    frozen = {}

    def earlier(level: Level) -> VisionLanguageModel:
        return model.frozen_copy() if model.adapters is None else model.teacher(level)

    if ZERO_SHOT in needed:
        frozen[ZERO_SHOT] = setup.original or earlier("original")
    if PREVIOUS in needed:
        # With a single task, the previous model is always the start model.
        single = len(setup.tasks) == 1 and setup.original is None
        original = frozen.get(ZERO_SHOT) if single else None
        frozen[PREVIOUS] = original or earlier("previous")
    return frozen
