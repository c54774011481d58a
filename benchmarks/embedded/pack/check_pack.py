"""Check the bundled pack: counts, checksums, every image, classes, repeats across the split, size.

python -m benchmarks.embedded.pack.check_pack mulki/data/embedded
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.embedded.pack.similar import near_pairs, thumbnails
from mulki.data import BadImage
from mulki.data.shards import ShardImages, open_shard
from mulki.errors import InputError

TASKS = ["digits", "animals", "letters", "clipart", "emoji", "flags"]
LARGEST_BYTES = 20_000_000
LARGEST_MODEL_BYTES = 12_000_000
FEWEST_TEST = 300


def _read(shard: ShardImages) -> tuple[np.ndarray, list[str]]:
    """Images ``[N, 64, 64, 3]`` and what is wrong with single ones."""
    images, wrong = [], []
    for index in range(len(shard)):
        try:
            image = shard.load(index)
        except BadImage as error:
            wrong.append(str(error))
            continue
        if image.size != (64, 64):
            wrong.append(f"{shard.name(index)} is {image.size}")
            continue
        images.append(np.asarray(image))
    return np.stack(images) if images else np.zeros((0, 64, 64, 3), np.uint8), wrong


def _check_task(folder: Path, name: str, task: dict) -> list[str]:
    problems = []
    sides = {}
    count = len(task["classes"])
    for split in ("train", "test"):
        entry = task[split]
        try:
            shard = open_shard(folder / entry["file"], sha256=entry["sha256"], count=entry["count"])
        except InputError as error:
            return [f"{name}: {error}"]
        images, wrong = _read(shard)
        problems += wrong
        if set(shard.targets) != set(range(count)):
            found = len(set(shard.targets))
            problems.append(f"{name} {split}: {found} of {count} classes have images")
        sides[split] = images
    if len(sides["test"]) < FEWEST_TEST:
        problems.append(f"{name}: only {len(sides['test'])} test images")
    if len(set(task["classes"])) != count:
        problems.append(f"{name}: two classes have one name")
    if not all("{}" in template for template in task["templates"]):
        problems.append(f"{name}: a template has no place for the class name")
    # One matrix over both sides finds exact copies too: their distance is zero.
    thumbs = thumbnails(np.concatenate([sides["train"], sides["test"]]))
    pairs = near_pairs(thumbs)
    border = len(sides["train"])
    across = int(((pairs[:, 0] < border) & (pairs[:, 1] >= border)).sum())
    within = int((pairs[:, 0] < pairs[:, 1]).sum()) - across
    if across:
        problems.append(f"{name}: {across} near duplicates across train and test")
    if within:
        problems.append(f"{name}: {within} near duplicates within one side")
    return problems


def check(folder: str | Path) -> list[str]:
    """Everything wrong with the pack in ``folder``, a line each; an empty list is a good pack.

    The start model is checked for size only, and only where it is present.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"tasks.json cannot be read: {error}"]
    problems = []
    if list(index["tasks"]) != TASKS:
        problems.append(f"tasks are {list(index['tasks'])}")
    for order, names in index["orders"].items():
        if sorted(names) != sorted(TASKS):
            problems.append(f"order {order} is not a permutation of the tasks")
    for name, task in index["tasks"].items():
        problems += _check_task(folder, name, task)
    if not (folder / "LICENSES.md").exists():
        problems.append("LICENSES.md is missing")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LARGEST_BYTES:
        problems.append(f"the folder holds {size / 1e6:.1f} MB")
    weights = folder / "mulki-mini" / "open_clip_model.safetensors"
    if weights.exists() and weights.stat().st_size > LARGEST_MODEL_BYTES:
        problems.append(f"the start model holds {weights.stat().st_size / 1e6:.1f} MB")
    return problems


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.embedded.pack.check_pack FOLDER", file=sys.stderr)
        return 2
    problems = check(sys.argv[1])
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        print(f"pack check failed: {problems[0]}{more}", file=sys.stderr)
        return 1
    print("pack check passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
