from __future__ import annotations

from pathlib import Path

from mulki.methods import PREVIOUS, ZERO_SHOT
from mulki.train.config.run_config import resolve
from mulki.train.learning.inputs import Listeners
from mulki.train.learning.memory import MicroBatch
from mulki.train.start.setup import prepared
from mulki.train.task_learner import TaskLearner
from tests.train.run_helpers import SHORT
from tests.train_helpers import same_state, state_of


def test_the_previous_model_is_the_student_before_the_task(
    start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path
) -> None:
    given = {"tasks": task_folders, "method": "mulki", "logs": str(tmp_path), "iterations": 2}
    with prepared(resolve({**SHORT, **start_model, **given}), write=False) as setup:
        assert setup.folder is None
        learner, start = TaskLearner(setup), state_of(setup.model)
        assert set(learner.frozen) == {ZERO_SHOT, PREVIOUS}
        fits: list[MicroBatch] = []
        seen: list[int] = []
        for index, task in enumerate(setup.tasks):
            before = state_of(setup.model)
            steps = learner.learn(
                index,
                task,
                Listeners(lambda report: seen.append(report.step), micro_batch=fits.append),
            )
            assert steps == 2 and not same_state(before, state_of(setup.model))
        assert seen == [1, 2, 1, 2]
        # Measured once a task, whatever the option says.
        assert len(fits) == 2 and all(fit.per_sample > 0 for fit in fits)
        assert same_state(state_of(learner.frozen[ZERO_SHOT]), start)
        assert same_state(state_of(learner.frozen[PREVIOUS]), before)
    assert not list(tmp_path.iterdir())


def test_one_task_has_one_teacher(
    start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path
) -> None:
    given = {"tasks": task_folders[:1], "method": "mulki", "logs": str(tmp_path)}
    with prepared(resolve({**SHORT, **start_model, **given}), write=False) as setup:
        frozen = TaskLearner(setup).frozen
    assert frozen[ZERO_SHOT] is frozen[PREVIOUS]


def test_other_methods_have_the_models_that_they_need(
    start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path
) -> None:
    for method, wanted in (("finetune", set()), ("lwf", {PREVIOUS})):
        given = {"tasks": task_folders, "method": method, "logs": str(tmp_path)}
        with prepared(resolve({**SHORT, **start_model, **given}), write=False) as setup:
            assert set(TaskLearner(setup).frozen) == wanted
