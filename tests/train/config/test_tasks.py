from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mulki import methods
from mulki.data import ImageSet, caption_task, folder_task
from mulki.errors import InputError
from mulki.train.config.run_config import resolve
from mulki.train.config.tasks import (
    check_captions,
    check_options_of_classes,
    load_tasks,
    needs_of,
    warn_of_equal_names,
)
from tests.train.run_helpers import Run, weights
from tests.train_helpers import COLOURS, same_state, write_pairs, write_split, write_task


def test_few_shots_of_a_task_class_by_class(tmp_path: Path) -> None:
    shades = {name: (32 * i, 32 * i, 32 * i) for i, name in enumerate("abcdef")}
    folder = str(write_task(tmp_path / "shades", shades))
    options = {"scenario": "cil", "increments": "2", "base_classes": "2", "shots": "2"}
    config = resolve({"tasks": [folder], "seed": 5, **options}).run
    tasks = load_tasks(config)
    assert [task.name for task in tasks] == ["shades-1", "shades-2", "shades-3"]
    for task in tasks:
        assert sorted(task.train.targets) == [0, 0, 1, 1]
    again = load_tasks(config)
    assert [t.fingerprint() for t in tasks] == [t.fingerprint() for t in again]
    with pytest.raises(InputError, match="^--scenario cil: got 2 tasks"):
        load_tasks(replace(config, tasks=(folder, "embedded:digits")))


def test_rates_belong_to_tasks_or_published_data_sets(task_folders: tuple[str, str]) -> None:
    config = resolve({"tasks": task_folders, "lr_of": ["colours=1", "mnist=1"]}).run
    assert len(load_tasks(config)) == 2
    with pytest.raises(InputError, match='^--lr-of: .*shade, .*"shades"'):
        load_tasks(replace(config, lr_of=("shade=1",)))


def test_a_limit_below_the_number_of_classes_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_task(tmp_path / "shades", dict.fromkeys("abc", (32, 32, 32)))
    config = resolve({"tasks": [str(folder)], "limit_images": "2"}).run
    (task,) = load_tasks(config)
    assert len(task.train) == 3
    assert "--limit-images 2: task shades keeps an image of each of its 3" in caplog.text


def test_classes_that_a_tokenizer_cannot_tell_apart_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_task(tmp_path / "pets", dict.fromkeys(("Cat", "cat", "dog"), (32, 32, 32)))
    (task,) = load_tasks(resolve({"tasks": [str(folder)]}).run)

    def tokens(texts: list[str], lower: bool = True) -> torch.Tensor:
        return torch.tensor([[*(text.lower() if lower else text).encode()] for text in texts])

    warn_of_equal_names([task], lambda texts: tokens(texts, lower=False))
    assert not caplog.text
    warn_of_equal_names([task], tokens)
    assert 'task pets: the classes "Cat" and "cat" are the same' in caplog.text


def test_options_of_classes_are_refused_beside_captions(tmp_path: Path) -> None:
    word = f"captions:{write_pairs(tmp_path / 'flags')}"
    for options in ({"shots": "2"}, {"scenario": "cil", "increments": "2"}):
        with pytest.raises(InputError, match="^--s.*: task flags "):
            load_tasks(resolve({"tasks": [word], **options}).run)
    (task,) = load_tasks(resolve({"tasks": [word], "limit_images": "4"}).run)
    assert (len(task.train), len(task.test)) == (4, 4)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("mulki", {"label_space": "all"}, "--label-space all: about"),
        ("mulki", {"vocabulary": "words.txt"}, "--vocabulary words.txt: about"),
        ("mulki", {"anchors_per_step": 7, "eliciting": False, "image_anchor": 1.5},
         "--anchors-per-step 7, --no-eliciting, --image-anchor 1.5: about"),
        ("mulki", {"image_text": 0.7}, "--image-text 0.7: about"),
        ("mulki", {"reference": "current", "reference_batch_size": 4},
         "--reference current, --reference-batch-size 4: about"),
        ("mulki", {"reference_changes": "noise"}, "--reference-changes noise: about"),
        ("finetune", {"label_smoothing": 0.2}, "--label-smoothing 0.2: about"),
        ("wise_ft", {"label_smoothing": 0.1}, "--label-smoothing 0.1: about"),
        ("zero_shot", {"label_space": "seen"}, "--label-space seen: about"),
        # As the default, or the preset of the bundled model, has it.
        ("mulki", {"text_text": 0, "label_smoothing": 0, "label_space": "task"}, ""),
        ("mulki", {"model": "ViT-B-32", "text_text": 0}, "--text-text 0.0: about"),
        ("mulki", {"preset": "mulki-mtil"}, ""),
        ("mulki", {"image_caption": 0.7, "feature_original": 0.1, "temperature": 3, "l2": 0}, ""),
        # A gate that looks at the label is for the task's own images.
        ("mulki", {"gate": "label", "hold_on": "task"}, ""),
    ],
)  # fmt: skip
def test_options_of_classes_have_no_effect_on_captions(
    tmp_path: Path, method: str, options: dict[str, Any], said: str
) -> None:
    task = caption_task(write_pairs(tmp_path / "flags"))
    settings = resolve({"method": method, **options})
    with pytest.raises(InputError) if said else contextlib.nullcontext() as info:
        check_options_of_classes(settings, [task])
    assert info is None or said in str(info.value)
    # What was saved of a run is given whole to the next one.
    again = resolve(settings.to_dict())
    with pytest.raises(InputError) if said else contextlib.nullcontext():
        check_options_of_classes(again, [task, task])
    (classes,) = load_tasks(resolve({"tasks": ["embedded:flags"]}).run)
    check_options_of_classes(settings, [task, classes])


def test_what_cannot_be_learned_from_captions(tmp_path: Path) -> None:
    task = caption_task(write_pairs(tmp_path / "flags"))
    pairs = len(task.train)
    for name in ("finetune", "mulki", "wise_ft"):
        check_captions([task], methods.get(name), pairs, 1)
        for batch, processes in ((pairs + 1, 1), (pairs // 2 + 1, 2), (1, 1)):
            with pytest.raises(
                InputError, match=f"--batch-size: got .*flags has {pairs}; wanted 2"
            ):
                check_captions([task], methods.get(name), batch, processes)
    check_captions([task], methods.get("zero_shot"), pairs + 1, 1)
    with pytest.raises(InputError) as info:
        check_captions([task], methods.get("lwf"), 4, 1)
    assert str(info.value) == (
        "--method: task flags has captions and no classes, from which lwf does not learn; choose "
        "from finetune, mulki, wise_ft, zero_shot"
    )


def test_a_task_of_captions_needs_the_teachers_alone(
    tmp_path: Path, task_folders: tuple[str, str]
) -> None:
    cls = methods.get("mulki")
    method = cls(cls.Options())
    needs = needs_of(method, caption_task(write_pairs(tmp_path / "flags")))
    assert needs.teachers == method.needs.teachers == ("zero_shot", "previous")
    assert (needs.prototypes, needs.anchors, needs.uses) == (False, (), ())
    assert needs_of(method, folder_task(task_folders[0])) == method.needs


def test_a_data_set_of_hugging_face_is_learned_as_the_folder_of_its_images_is(
    run: Run, task_folders: tuple[str, str], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    task = folder_task(task_folders[0])
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.classes))}

    def split(images: ImageSet) -> Any:
        files = [Path(images.name(i)).read_bytes() for i in range(len(images))]
        cells = [{"bytes": content, "path": None} for content in files]
        rows = {"image": cells, "label": list(images.targets)}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))

    copied = tmp_path / "colours"
    datasets.DatasetDict(train=split(task.train), test=split(task.test)).save_to_disk(copied)
    folder = run("folder", method="mulki")
    same = run("same", method="mulki", tasks=(str(copied), task_folders[1]), workers=2)
    for name in ("matrix.csv", "tasks.json"):
        assert (same.path / name).read_text() == (folder.path / name).read_text()
    assert same_state(weights(same), weights(folder))


def test_a_share_of_tasks_without_a_split_has_nothing_to_do_with_the_seed(tmp_path: Path) -> None:
    write_split(tmp_path / "colours", COLOURS, 5)
    config = resolve({"tasks": [str(tmp_path / "colours")], "test_fraction": "0.4"}).run
    (task,) = load_tasks(config)
    assert (len(task.train), len(task.test)) == (9, 6)
    (other,) = load_tasks(replace(config, seed=7))
    assert other.fingerprint() == task.fingerprint()
    (few,) = load_tasks(replace(config, shots=1))
    assert len(few.train) == 3 and few.test.fingerprint() == task.test.fingerprint()
    with pytest.raises(InputError, match="^--test-fraction 0.4: "):
        load_tasks(replace(config, tasks=("embedded",)))
    for wrong in ("0", "1", "1.5", "-1", "nan", "half"):
        with pytest.raises(InputError, match="^--test-fraction: got "):
            resolve({"test_fraction": wrong})
