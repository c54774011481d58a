"""Check the bundled pack: counts, checksums, every image, classes, repeats across the split.

python -m benchmarks.embedded.pack.check_pack mulki/data/embedded
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.embedded.pack.similar import near_pairs, thumbnails
from mulki.data.shards import open_pack


def check(folder: Path) -> list[str]:
    """What is wrong with the pack in ``folder``, a line each; an empty list is a good pack.

    Raises:
        InputError: a file is not what the index says.
        BadImage: a picture cannot be read.
    """
    problems = []
    pack = open_pack(folder)
    for name in pack.tasks:
        task = pack.task(name)
        sides = {"train": task.train, "test": task.test}
        pictures = []
        for split, side in sides.items():
            pictures += [np.asarray(side.load(index)) for index in range(len(side))]
            if missing := set(range(len(task.classes))) - set(side.targets):
                problems.append(f"{name} {split}: {len(missing)} classes have no images")
        sizes = {picture.shape for picture in pictures}
        if sizes != {(64, 64, 3)}:
            problems.append(f"{name}: pictures of the shapes {sizes}")
            continue
        # One matrix over both sides finds exact copies too: their distance is zero.
        pairs = near_pairs(thumbnails(np.stack(pictures)))
        border = len(task.train)
        across = int(((pairs[:, 0] < border) & (pairs[:, 1] >= border)).sum())
        within = int((pairs[:, 0] < pairs[:, 1]).sum()) - across
        for count, where in ((across, "across train and test"), (within, "within one side")):
            if count:
                problems.append(f"{name}: {count} near duplicates {where}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="of the pack")
    if problems := check(parser.parse_args().folder):
        raise SystemExit("pack check failed: " + "; ".join(problems))
    print("pack check passed")


if __name__ == "__main__":
    main()
