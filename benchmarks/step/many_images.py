"""The start of a task of many small images: listing, the check of each, and the bar that shows it.

    python -m benchmarks.step.many_images --output benchmarks/step/many_images.csv

PNG files of about 1 KB are written into class folders of a temporary folder, and read as
`mulki run` reads a folder of images, with its bar drawn for a terminal. The files have just been
written, so they come from memory: a disk adds its own time. CPU time is what other programs on the
machine change least.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.tables import Row, machine_line, parser_with_output, show
from mulki.data import folder_task
from mulki.data.image_files import checks_reported
from mulki.train.display.progress import checking

CLASSES, SIDE = 100, 18
COLUMNS = {
    "images": "images:d",
    "bytes": "bytes of one:d",
    "start": "start, s:.1f",
    "cpu": "CPU time of it, s:.1f",
    "listing": "before the first check, s:.1f",
    "longest": "longest without a check, s:.2f",
    "positions": "positions of the bar:d",
}


def write_images(root: Path, count: int) -> int:
    """`count` noisy pictures in the class folders of two splits; the bytes of one."""
    random = np.random.default_rng(0)
    contents = []
    for _ in range(CLASSES):
        file = io.BytesIO()
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        contents.append(file.getvalue())
    folders = [root / s / f"class_{c:03d}" for s in ("train", "test") for c in range(CLASSES)]
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(count):
        folder = folders[number % len(folders)]
        (folder / f"{number}.png").write_bytes(contents[number % CLASSES])
    return len(contents[0])


def measure(count: int, root: Path) -> Row:
    """Write images and read the task: its seconds, and what the bar showed.

    Args:
        count: of images, at least one for each class of both splits.
    """
    size = write_images(root, count)
    terminal = io.StringIO()
    checked: list[float] = []
    began, cpu = perf_counter(), process_time()
    with checking(Console(file=terminal, force_terminal=True, width=80)) as show:

        def told(done: int, total: int) -> None:
            checked.append(perf_counter())
            show(done, total)

        with checks_reported(told):
            task = folder_task(root)
    task.fingerprint()
    ended = perf_counter()
    found = len(task.train) + len(task.test)
    if not len(checked) == found == count:
        raise RuntimeError(f"{count} images were written, {found} found, {len(checked)} checked")
    return {
        "images": count,
        "bytes": size,
        "start": ended - began,
        "cpu": process_time() - cpu,
        "listing": checked[0] - began,
        "longest": max(after - before for before, after in pairwise([*checked, ended])),
        "positions": len(set(re.findall(rf"(\d+)/{count}", terminal.getvalue()))),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="how many")
    parser.add_argument("--folder", help="where files are written; the system's if left out")
    a = parser.parse_args(argv)
    print(machine_line("cpu"), flush=True)
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        rows = [measure(a.images, Path(folder))]
    show(rows, COLUMNS, a.output, "cpu")


if __name__ == "__main__":
    main()
