"""The models and texts that the tasks of a run share, and the learning of one task with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mulki.clip.models import VisionLanguageModel
from mulki.clip.models.adapters import Level
from mulki.clip.texts import TextInputs
from mulki.data import Task
from mulki.data.replay import ReplayImages, kept_places
from mulki.distributed.parts import set_whole
from mulki.methods import PREVIOUS, ZERO_SHOT, Needs
from mulki.train import sharding
from mulki.train.config.run_config import RunConfig
from mulki.train.config.tasks import needs_of, teachers_of
from mulki.train.learning.anchor_texts import Anchors, anchor_texts
from mulki.train.learning.inputs import Listeners, TaskInputs
from mulki.train.learning.learn import learn_task
from mulki.train.randomness import random_state, set_random_state
from mulki.train.saving.recovery import STUDENT, Saves, State, restore_method
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
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self._text_inputs = TextInputs(setup.model, setup.world)
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

    def state(self, in_task: State | None) -> State:
        """What a save holds, but for what was learned. All processes have to call this.

        Args:
            in_task: the state within the task that comes next, None between two tasks.
        """
        setup, model, previous = self._setup, self._setup.model, self.frozen.get(PREVIOUS)
        if in_task is not None:
            weights = None
            if previous is not None and model.adapters is None:
                weights = self._weights(previous)
            in_task = in_task | {"previous": weights}
        return {
            "processes": setup.world.size,
            STUDENT: self._weights(model) if model.adapters is None else model.adapters.state(),
            "method": setup.method.state_dict(),
            "texts": self._text_inputs.state(),
            "scaler": setup.precision.scaler.state_dict(),
            "random": setup.world.each(random_state(model.device)),
            "in_task": in_task,
        }

    def restore(self, saved: State) -> State | None:
        """Set what `state` returned, into a run that is at its start.

        Returns:
            The state within a task, with that of the random generators; None between two tasks.
        """
        setup, model = self._setup, self._setup.model
        if model.adapters is None:
            self._set_weights(model, saved[STUDENT])
        else:
            model.adapters.restore(saved[STUDENT])
        restore_method(setup.method, saved["method"])
        self._text_inputs.restore(saved["texts"])
        setup.precision.scaler.load_state_dict(saved["scaler"])
        random = saved["random"][setup.world.rank]
        set_random_state(random, model.device)
        in_task: State | None = saved["in_task"]
        if in_task is None:
            return None
        if in_task["previous"] is not None:
            self._set_weights(self.frozen[PREVIOUS], in_task["previous"])
        return in_task | {"random": random}

    def _weights(self, model: VisionLanguageModel) -> dict[str, Tensor]:
        # Those that train in the student; the others are the start model's.
        found = model.clip.state_dict()
        return {name: found[name] for name in self._setup.model.trainable()}

    def _set_weights(self, model: VisionLanguageModel, weights: Mapping[str, Tensor]) -> None:
        for name, value in self._weights(model).items():
            set_whole(value, weights[name])

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
        return Anchors(texts, self._text_inputs, anchors_per_step(setup, needs), seed)


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
