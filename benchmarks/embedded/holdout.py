"""Training images held out for tuning, so that no test image has a say in what is tuned."""

from __future__ import annotations

import dataclasses
import json
import random
import tarfile
from pathlib import Path

from mulki.data.shards import ShardImages
from mulki.data.subset import Subset
from mulki.data.task import Task

SHARE = 0.2
SEED = 100


def held_out(task: Task) -> Task:
    """The task with a share of its training images as test images, and without its own test images.

    Whole groups (fonts, clusters of near duplicates, ...) move, as when the pack was split, until
    each class has given its share.

    Raises:
        ValueError: a class has a single group, so that nothing of it can be held out.
    """
    assert isinstance(task.train, ShardImages)
    groups = _groups(task.train.path)
    members: dict[str, list[int]] = {}
    for index, name in enumerate(task.train.members):
        members.setdefault(groups[Path(name).stem], []).append(index)
    order = sorted(members)
    random.Random(SEED).shuffle(order)
    targets = task.train.targets
    wanted = {c: max(1, round(SHARE * targets.count(c))) for c in set(targets)}
    moved: set[int] = set()
    for group in order:
        classes = [targets[i] for i in members[group]]
        # A group goes if every class in it still lacks images; fonts hold all letters at once.
        if all(wanted[c] > 0 for c in classes):
            moved.update(members[group])
            for c in classes:
                wanted[c] -= 1
    rest = [i for i in range(len(targets)) if i not in moved]
    for indices in (moved, rest):
        if {targets[i] for i in indices} != set(targets):
            raise ValueError(f"task {task.name}: a class has too few groups to hold some out")
    test = Subset(task.train, sorted(moved))
    return dataclasses.replace(task, train=Subset(task.train, rest), test=test)


def _groups(shard: Path) -> dict[str, str]:
    # By sample key, from the `.json` members that the package's own reader has no use for.
    with tarfile.open(shard) as tar:
        return {
            Path(member.name).stem: str(json.load(content)["group"])
            for member in tar
            if member.name.endswith(".json") and (content := tar.extractfile(member)) is not None
        }
