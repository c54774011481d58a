from __future__ import annotations

import pytest

from mulki.data import Task
from mulki.train.learning.inputs import TaskInputs
from tests.train.learn_helpers import method_named


def test_a_reference_set_has_to_fit_the_method(task: Task) -> None:
    TaskInputs(0, task, {}).check(method_named("finetune"))
    with pytest.raises(ValueError, match="reference: got None, wanted one for ZSCL"):
        TaskInputs(0, task, {}).check(method_named("zscl"))


def test_prompts_are_the_first_of_each_class(task: Task) -> None:
    prompts = TaskInputs(0, task, {}).prompts
    assert prompts == [of_class[0] for of_class in task.prompts()] and len(prompts) == 3
