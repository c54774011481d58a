"""The bundled tasks without a sequence: all of them learned at once, and each alone.

    python -m benchmarks.embedded.bounds --seeds 0 1 2

Fine-tuning at the preset that it had before `studies.again`. `joint` is one task of the classes of
all, whose batches mix the images of all tasks and whose cross-entropy is over all classes; it takes
as many steps as the six tasks together. `alone` is the mean over the tasks of a model that has
learned nothing else. Neither is a limit: their learning rate is that of a sequence. Every run is a
line of `bounds.jsonl`, and a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.embedded import studies
from benchmarks.embedded.compare import FOLDER, SHARED, fingerprint
from mulki.clip.evaluation import Evaluator
from mulki.clip.models import VisionLanguageModel
from mulki.data import Task, load_sequence
from mulki.data.captioned_shards import Joined
from mulki.data.loader import batches
from mulki.data.task import ImageSet
from mulki.runs.intervals import mean_interval
from mulki.train.config.run_config import resolve
from mulki.train.saving.checkpoints import load_checkpoint
from mulki.train.sequence import run

_LINES = FOLDER / "bounds.jsonl"
_KINDS = ("joint", "alone")


@dataclass(frozen=True)
class OneAfterAnother(Joined[ImageSet]):
    """Image sets one behind another, with the targets of each after those of the ones before it.

    Args:
        counts: of classes, of each set.
    """

    counts: tuple[int, ...]

    @cached_property
    def targets(self) -> list[int]:
        starts = itertools.accumulate(self.counts, initial=0)
        return [
            start + target
            for start, images in zip(starts, self.parts, strict=False)
            for target in images.targets
        ]

    def fingerprint(self) -> str:
        return " ".join(dict.fromkeys(images.fingerprint() for images in self.parts))


def joint(tasks: Sequence[Task]) -> Task:
    """One task of the classes of all, each by its first prompt."""
    classes = tuple(of_class[0] for task in tasks for of_class in task.prompts())
    counts = tuple(len(task.classes) for task in tasks)
    train, test = (
        OneAfterAnother(tuple(getattr(task, split) for task in tasks), counts)
        for split in ("train", "test")
    )
    return Task("joint", classes, ("{}",), train, test)


def learned(tasks: Sequence[Task], seed: int, iterations: int) -> VisionLanguageModel:
    """The start model after fine-tuning on these tasks in their order."""
    with tempfile.TemporaryDirectory() as logs:
        given = {"method": "finetune", "seed": seed, "head": False}
        given |= studies.BEFORE_AGAIN["finetune"]
        here = {"iterations": iterations, "logs": logs, "name": "run", "save_every": 0}
        folder = run(resolve(SHARED | given | here), tasks=tasks)
        assert folder is not None
        return load_checkpoint(folder.path)


def accuracies(model: VisionLanguageModel, tasks: Sequence[Task]) -> list[float]:
    """Top-1 accuracy on each task in percent, among its own classes."""
    loaders = [batches(task.test, model.preprocess, 256, shuffle=False, seed=0) for task in tasks]
    evaluator = Evaluator(model, tasks, loaders)
    return [evaluator.accuracy(number)[0] for number in range(len(tasks))]


def bound(kind: str, seed: int, tasks: Sequence[Task]) -> dict[str, Any]:
    """A line of the results."""
    steps = resolve(SHARED).run.iterations
    if kind == "joint":
        found = accuracies(learned([joint(tasks)], seed, steps * len(tasks)), tasks)
    else:
        found = [accuracies(learned([task], seed, steps), [task])[0] for task in tasks]
    by_task = {task.name: round(value, 4) for task, value in zip(tasks, found, strict=True)}
    return {"pack": fingerprint(), "kind": kind, "seed": seed, "accuracies": by_task}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The mean over seeds by task, and over the tasks with its 95 % interval over seeds."""
    names = [*lines[0]["accuracies"]]
    rows = [f"| | {' | '.join(names)} | mean | seeds |", f"|{'---|' * (len(names) + 3)}"]
    for kind in _KINDS:
        # Of equal runs the last counts.
        by_seed = {line["seed"]: line["accuracies"] for line in lines if line["kind"] == kind}
        of = list(by_seed.values())
        if of:
            cells = [f"{mean(each[name] for each in of):.1f}" for name in names]
            middle, half = mean_interval([mean(each.values()) for each in of])
            whole = f"{middle:.2f}" + ("" if half is None else f" ± {half:.2f}")
            rows.append(f"| {kind} | {' | '.join(cells)} | {whole} | {len(of)} |")
    return "\n".join(rows)


def main() -> None:
    """Run what has no line yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    tasks = load_sequence(("embedded",))
    for seed, kind in itertools.product(seeds, _KINDS):
        lines = read_lines(_LINES)
        if not any((line["kind"], line["seed"]) == (kind, seed) for line in lines):
            with _LINES.open("a") as stream:
                stream.write(json.dumps(bound(kind, seed, tasks)) + "\n")
    print(table(read_lines(_LINES)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the results that are of the present start model and images."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["pack"] == fingerprint()]


if __name__ == "__main__":
    main()
