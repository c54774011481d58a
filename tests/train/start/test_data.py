from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mulki import methods
from mulki.data import folder_task
from mulki.errors import InputError
from mulki.methods import VOCABULARY, Method
from mulki.train.config.run_config import CURRENT, MADE, RunConfig, resolve
from mulki.train.start.data import check_reference, check_unused, load_data, needs_beyond_tasks


def of(**options: Any) -> tuple[RunConfig, Method]:
    settings = resolve(options)
    return settings.run, methods.get(settings.run.method)(settings.method)


@pytest.mark.parametrize(
    ("options", "flag", "what"),
    [
        ({"method": "finetune", "vocabulary": "words.txt"}, "--vocabulary", "vocabulary"),
        (
            {"method": "mulki", "anchors": "seen", "vocabulary": "words.txt"},
            "--vocabulary",
            "vocabulary",
        ),
        (
            {"method": "mulki", "anchors": "none", "anchors_per_step": 5},
            "--anchors-per-step",
            "text anchors",
        ),
        ({"method": "lwf", "reference": "folder"}, "--reference", "reference set"),
        (
            {"method": "mulki", "hold_on": "task", "reference": "folder"},
            "--reference",
            "reference set",
        ),
        (
            {"method": "snd", "reference": "current", "reference_changes": ("invert", "noise")},
            "--reference-changes",
            "made images",
        ),
        (
            {"method": "lwf", "reference_batch_size": 5},
            "--reference-batch-size",
            "reference set",
        ),
    ],
)
def test_data_that_a_method_does_not_use(options: dict[str, Any], flag: str, what: str) -> None:
    with pytest.raises(InputError, match=f"^{flag}: got .* uses no {what}; leave it out"):
        check_unused(*of(**options))


def test_a_reference_set_that_is_missing() -> None:
    for method, needed in (("zscl", "images with captions"), ("snd", "reference images")):
        with pytest.raises(InputError, match=f"^--reference: method {method} .* {needed}"):
            check_reference(*of(method=method, reference=None))
    check_reference(*of(method="zscl", reference="folder"))
    check_unused(*of(method="zscl", reference="folder"))


def test_the_tasks_own_images_are_no_reference_set() -> None:
    given = of(method="zscl", reference="folder")
    assert needs_beyond_tasks(*given).reference and not needs_beyond_tasks(*given).anchors
    for reference in (CURRENT, MADE):
        needs = needs_beyond_tasks(*of(method="zscl", reference=reference))
        assert not needs.reference and needs.anchors == (VOCABULARY,)


def test_tasks_from_python_are_reduced_as_the_options_say(task_folders: tuple[str, str]) -> None:
    settings = resolve({"method": "finetune", "shots": 2})
    method = methods.get("finetune")(settings.method)
    task = folder_task(task_folders[0])
    (found,) = load_data(settings, method, 1, [task]).tasks
    assert sorted(found.train.targets) == sorted(2 * [*range(len(task.classes))])
    lacking = replace(task, classes=(*task.classes, "beige"))
    with pytest.raises(InputError, match="^tasks: colours has no training image of class beige"):
        load_data(settings, method, 1, [lacking])


def test_data_without_need_is_not_loaded(task_folders: tuple[str, str]) -> None:
    settings = resolve({"tasks": task_folders, "method": "finetune"})
    data = load_data(settings, methods.get("finetune")(settings.method), 1)
    assert [task.name for task in data.tasks] == ["colours", "shades"]
    assert data.reference is None and data.vocabulary is None
