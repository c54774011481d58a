"""What the start of a task costs as its images grow in number: processor time and memory.

    python -m benchmarks.step.growth --output benchmarks/step/growth.csv

PNG files in class folders, and members of one tar shard (half of them images, half their classes),
are written into a temporary folder, and read and checked as `mulki run` does. Each is read in a
process of its own that has read a small one before. Processor time and memory are little changed by
other programs on the machine.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import process_time

from PIL import Image

from benchmarks.step.many_images import CLASSES, write_images
from benchmarks.tables import Row, machine_line, parser_with_output, show
from mulki.bench.call_cost import PeakMemory
from mulki.data import folder_task
from mulki.data.shard_tasks import shard_task

FILES, MEMBERS = "files in class folders", "members of a shard"
COUNTS = {FILES: (1_000, 10_000, 100_000), MEMBERS: (10_000, 100_000, 1_000_000)}
COLUMNS = {
    "of": "what",
    "count": "how many:,",
    "megabytes": "MB on disk:.0f",
    "cpu": "processor time, s:.2f",
    "cpu_each": "of one, µs:.0f",
    "memory": "peak memory, MB:.0f",
    "memory_each": "of one, bytes:.0f",
}


def write_shard(root: Path, count: int) -> None:
    """So many members in one shard, two for each image."""
    image = io.BytesIO()
    Image.new("RGB", (4, 4), "teal").save(image, "PNG")
    (root / "classes.txt").write_text("".join(f"class {c}\n" for c in range(CLASSES)))
    with tarfile.open(root / "all.tar", "w") as tar:
        for number in range(count // 2):
            target = str(number % CLASSES).encode()
            for suffix, content in (("png", image.getvalue()), ("cls", target)):
                entry = tarfile.TarInfo(f"{number:07d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
                tar.members.clear()


def read(of: str, root: Path) -> int:
    """Read the task that was written; the number of its images."""
    task = folder_task(root) if of == FILES else shard_task(root, test_fraction=0.2)
    task.fingerprint()
    return len(task.train) + len(task.test)


def cost_of_reading(of: str, small: Path, root: Path) -> tuple[int, float, int | None]:
    """Images, seconds of processor time in all threads, and bytes by which memory grew."""
    read(of, small)
    peak, before = PeakMemory("cpu"), process_time()
    images = read(of, root)
    return images, process_time() - before, peak.growth()


def measure(of: str, count: int, place: Path) -> Row:
    """Write so many files or members, and read them in another process.

    Args:
        of: a key of `COUNTS`.
        count: at least four for each class, and even.
        place: an empty folder.
    """
    small, root = place / "small", place / "task"
    for folder, number in ((small, 4 * CLASSES), (root, count)):
        folder.mkdir()
        if of == FILES:
            write_images(folder, number)
        else:
            write_shard(folder, number)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        images, cpu, memory = pool.submit(cost_of_reading, of, small, root).result()
    if images != (count if of == FILES else count // 2):
        raise RuntimeError(f"{count} {of} were written, {images} images found")
    return {
        "of": of,
        "count": count,
        "megabytes": sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) / 1e6,
        "cpu": cpu,
        "cpu_each": cpu / count * 1e6,
        "memory": None if memory is None else memory / 1e6,
        "memory_each": None if memory is None else memory / count,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument("--most", type=int, default=sys.maxsize, help="leave out larger ones")
    parser.add_argument("--folder", help="where files are written; the system's if left out")
    a = parser.parse_args(argv)
    print(machine_line("cpu"), flush=True)
    rows = []
    for of, counts in COUNTS.items():
        for count in counts:
            if count <= a.most:
                with tempfile.TemporaryDirectory(dir=a.folder) as folder:
                    rows.append(measure(of, count, Path(folder)))
    show(rows, COLUMNS, a.output, "cpu")


if __name__ == "__main__":
    main()
