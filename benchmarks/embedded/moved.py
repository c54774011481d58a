"""How far a run moves the model, and what class statistics of earlier tasks are worth afterwards.

    python -m benchmarks.embedded.moved --orders III IV

Two runs for each order, fine-tuning and MulKI at the presets that they had before `studies.again`,
tested on training images that were held out. A line of `moved.jsonl` holds of each:

    moved   mean of 1 - cosine between the features of the model before a task and after it, on the
            task's own images, on images made of them by each change, and on those of the other
            tasks. A kind of images that does not move in fine-tuning has nothing to hold.
    kept    accuracy in percent among all classes learned so far: of texts alone, and of the head
            with statistics as they were kept; computed anew by the present model; and kept ones
            moved along by a linear map between the features of two models, or by the shift of
            means (`--head-drift sdc`), fitted on the task's own and made images.
    grid    of the head after the last task, by shrinkage and weight: the mean over the tasks of the
            accuracy among their own classes, and the accuracy among all classes.

A run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.embedded import studies
from benchmarks.embedded.bounds import read_lines
from benchmarks.embedded.compare import FOLDER, SHARED, fingerprint
from benchmarks.embedded.holdout import held_out
from mulki.clip.evaluation import zero_shot_classifier
from mulki.clip.head import ClassStatistics, Head, Moments
from mulki.clip.models import VisionLanguageModel, load
from mulki.clip.texts import text_inputs
from mulki.data import Task
from mulki.data.loader import batches
from mulki.data.made_images import CHANGES, MadeImages
from mulki.data.task import ImageSet
from mulki.train.config.run_config import resolve
from mulki.train.config.tasks import load_tasks
from mulki.train.learning.training_set import sample
from mulki.train.saving.checkpoints import load_checkpoint
from mulki.train.sequence import run

_LINES = FOLDER / "moved.jsonl"
_METHODS = ("finetune", "mulki")
_SHRINKAGES = (0.01, 0.03, 0.1, 0.3)
_WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0)
_SHRINKAGE, _WEIGHT = 0.1, 0.25
_RIDGE = 1e-3  # of the linear map, times the mean square of a feature


@torch.no_grad()
def features(model: VisionLanguageModel, images: ImageSet) -> Tensor:
    """Unit rows [N, D] in the order of the images."""
    loader = batches(images, model.preprocess, 256, shuffle=False, seed=0)
    return torch.cat([model.encode_images(pixels) for pixels, *_ in loader])


def movement(
    before: VisionLanguageModel, after: VisionLanguageModel, task: Task, others: Sequence[Task]
) -> dict[str, float]:
    """`moved` of one task, by the kind of images."""
    own, _ = sample(task)
    kinds = {"own": [own]} | {name: [MadeImages(own, [name], seed=0)] for name in CHANGES}
    kinds["other tasks"] = [sample(other)[0] for other in others]
    return {
        kind: round(
            mean(
                float((1 - (features(before, of) * features(after, of)).sum(dim=1)).mean())
                for of in images
            ),
            5,
        )
        for kind, images in kinds.items()
    }


def mapped(statistics: ClassStatistics, before: Tensor, after: Tensor) -> ClassStatistics:
    """The statistics after the linear map that takes the rows of `before` to those of `after`.

    Args:
        before, after: [N, D] features of the same images by two models.
    """
    x, y = before.double(), after.double()
    products = x.mT @ x
    ridge = _RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=x.dtype)
    linear = torch.linalg.solve(products + ridge, x.mT @ y).float()
    assert statistics.scatter is not None
    return ClassStatistics(
        tuple(replace(each, means=each.means @ linear) for each in statistics.tasks),
        linear.mT @ statistics.scatter @ linear,
    )


class Tested:
    """The tests of a model on some tasks.

    Args:
        model: the model.
        tasks: those learned so far.
    """

    def __init__(self, model: VisionLanguageModel, tasks: Sequence[Task]):
        self._scale, self._tasks = float(model.logit_scale.detach()), tasks
        self._targets = [torch.as_tensor(list(task.test.targets)) for task in tasks]
        texts = []
        for task in tasks:
            prompts = [text for of_class in task.prompts() for text in of_class]
            inputs = text_inputs(model, prompts)
            texts.append(zero_shot_classifier(model, inputs, len(task.classes)))
        self._features = [features(model, task.test) for task in tasks]
        self._cosines = [
            {number: of @ text.mT for number, text in enumerate(texts)} for of in self._features
        ]

    def accuracies(
        self,
        statistics: ClassStatistics,
        shrinkage: float = _SHRINKAGE,
        weight: float = _WEIGHT,
    ) -> tuple[float, float]:
        """Percent: mean over the tasks among their own classes, and among the classes of all."""
        head = Head(statistics, self._tasks, self._scale, shrinkage, weight)
        numbers, start, own, every = range(len(self._tasks)), 0, [], []
        for number in numbers:
            target = self._targets[number]
            given = self._features[number], self._cosines[number]
            right = head.scores(*given, [number]).argmax(dim=1) == target
            own.append(float(right.float().mean()))
            every.append(head.scores(*given, numbers).argmax(dim=1) == target + start)
            start += len(self._tasks[number].classes)
        return round(100 * mean(own), 3), round(100 * float(torch.cat(every).float().mean()), 3)


def moments(model: VisionLanguageModel, task: Task) -> Any:
    """Class means and scatter of a task's training images, see `mulki.clip.head`."""
    found = Moments(len(task.classes))
    found.add(features(model, task.train), torch.as_tensor(list(task.train.targets)))
    return found.of(task)


def line_of(method: str, order: str) -> dict[str, Any]:
    """A line of the results."""
    moved, kept = {}, {}
    with tempfile.TemporaryDirectory() as logs:
        given = {"order": order, "seed": studies.TUNING_SEEDS[0], "save_every": 0}
        given |= {"method": method, "logs": logs, "name": "run"}
        settings = resolve(SHARED | given | studies.BEFORE_AGAIN.get(method, {}))
        tasks = [held_out(task) for task in load_tasks(settings.run)]
        folder = run(settings, tasks=tasks)
        assert folder is not None and settings.run.model is not None
        checkpoints = folder.path / "checkpoints"
        before = load(settings.run.model)
        ways = {"kept": ClassStatistics()}
        for count, task in enumerate(tasks, start=1):
            after = load_checkpoint(checkpoints / f"task_{count:02d}_{task.name}.safetensors")
            moved[task.name] = movement(
                before, after, task, [other for other in tasks if other is not task]
            )
            sets = sample(task)
            pair = [torch.cat([features(model, of) for of in sets]) for model in (before, after)]
            new = moments(after, task)
            old = ways
            ways = {"kept": old["kept"].with_task(*new)}
            for name, move in (("mapped", mapped), ("shifted", ClassStatistics.shifted)):
                way = move(old[name], *pair) if count > 1 else ClassStatistics()
                ways[name] = way.with_task(*new)
            anew = ClassStatistics()
            for each in tasks[:count]:
                anew = anew.with_task(*moments(after, each))
            tested = Tested(after, tasks[:count])
            kept[task.name] = {"texts": tested.accuracies(anew, weight=0.0)[1]} | {
                name: tested.accuracies(way)[1] for name, way in {**ways, "anew": anew}.items()
            }
            before = after
        grid = {
            f"{shrinkage:g} {weight:g}": tested.accuracies(ways["kept"], shrinkage, weight)
            for shrinkage, weight in itertools.product(_SHRINKAGES, _WEIGHTS)
        }
    found = {"moved": moved, "kept": kept, "grid": grid}
    return {"pack": fingerprint(), "method": method, "order": order} | found


def table(columns: Sequence[str], rows: dict[str, list[float]], digits: int) -> str:
    """Markdown."""
    lines = [f"| | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, values in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.{digits}f}' for value in values)} |")
    return "\n".join(lines)


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """What each of them says, the mean over orders; of movement also that over tasks."""
    parts = []
    for method in _METHODS:
        of = [line for line in lines if line["method"] == method]
        if not of:
            continue
        kinds = [*of[0]["moved"][next(iter(of[0]["moved"]))]]
        moved = {
            kind: [mean(task[kind] for line in of for task in line["moved"].values())]
            for kind in kinds
        }
        names = [*of[0]["kept"][next(iter(of[0]["kept"]))]]
        places = range(1, 1 + len(of[0]["kept"]))
        kept = {
            name: [
                mean([*line["kept"].values()][place - 1][name] for line in of) for place in places
            ]
            for name in names
        }
        grid = {
            f"{shrinkage:g}": [
                mean(line["grid"][f"{shrinkage:g} {weight:g}"][column] for line in of)
                for column in (0, 1)
                for weight in _WEIGHTS
            ]
            for shrinkage in _SHRINKAGES
        }
        weights = [f"{kind}, {weight:g}" for kind in ("own", "all") for weight in _WEIGHTS]
        parts += [
            f"{method}, orders {', '.join(line['order'] for line in of)}",
            table(["1 - cosine"], moved, 4),
            table([f"after {place}" for place in places], kept, 2),
            table(weights, grid, 2),
        ]
    return "\n\n".join(parts)


def main() -> None:
    """Run what has no line yet, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--orders", nargs="+", default=list(studies.FORM_ORDERS))
    orders = parser.parse_args().orders
    for order, method in itertools.product(orders, _METHODS):
        if not any((x["method"], x["order"]) == (method, order) for x in read_lines(_LINES)):
            with _LINES.open("a") as stream:
                stream.write(json.dumps(line_of(method, order)) + "\n")
    print(tables(read_lines(_LINES)))


if __name__ == "__main__":
    main()
