"""Rank the pack's pictures by how much they resemble one of the start model's training pairs.

    python -m benchmarks.embedded.pack.shared_drawings --pack mulki/data/embedded --pairs PAIRS \\
        --sheets SHEETS

Whether two pictures are one drawing is for the eye to say, so this prints the pairs below a limit,
the nearest first, and writes them side by side: the pack's picture above, the training pair's
below. ``shared_drawings.txt`` holds what was found in this way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.embedded.pack import render
from benchmarks.embedded.pack.make_pack import SPLITS, sources
from benchmarks.embedded.pack.similar import NEAR_SHAPE, mirrored, nearest, thumbnails
from mulki.data.shards import open_pack

# Plain letters and figures coincide with anything round or straight.
LIMITS = {"animals": NEAR_SHAPE, "digits": 8.0, "letters": 8.0, "clipart": 16.0}
LIMIT = 10.0
COLUMNS, ROWS = 20, 8


def looks(images: np.ndarray, task: str) -> np.ndarray:
    """RGBA ``[N, 64, 64, 4]`` as the task would show them: thumbnails ``[N, 768]``."""
    if task == "animals":
        shapes = [render.silhouette(alpha > 100) for alpha in images[..., 3]]
        return thumbnails(np.stack(shapes))
    if task == "digits":
        white = np.concatenate([np.full_like(images[..., :3], 255), images[..., 3:]], axis=-1)
        return thumbnails(render.flatten(white, (0, 0, 0)))
    return thumbnails(render.flatten(images))


def own_look(images: np.ndarray, task: str) -> np.ndarray:
    """Pictures of the pack ``[N, 64, 64, 3]``, comparable with ``looks``."""
    if task == "animals":
        return thumbnails(np.stack([render.silhouette(image[..., 0] > 100) for image in images]))
    return thumbnails(images)


def closest(
    images: np.ndarray, task: str, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to, index of and mirroring of the nearest of ``pairs``, each ``[N]``."""
    own = own_look(images, task)
    flipped = mirrored(own)
    distance = np.full(len(own), np.inf)
    index = np.zeros(len(own), int)
    mirror = np.zeros(len(own), bool)
    for start in range(0, len(pairs), 8192):
        other = looks(np.asarray(pairs[start : start + 8192]), task)
        for turned, thumbs in ((False, own), (True, flipped)):
            found, at = nearest(thumbs, other)
            nearer = found < distance
            distance[nearer], index[nearer] = found[nearer], at[nearer] + start
            mirror[nearer] = turned
    return distance, index, mirror


def sheets(pairs: list[tuple[str, np.ndarray, np.ndarray]], file: Path) -> None:
    """Captioned couples ``(text, [64, 64, 3], [64, 64, 3])`` as pictures ``FILE-0.png``, ..."""
    page = COLUMNS * ROWS
    for start in range(0, len(pairs), page):
        sheet = Image.new("RGB", (COLUMNS * 68, ROWS * 146), (160, 170, 200))
        draw = ImageDraw.Draw(sheet)
        for place, (text, upper, lower) in enumerate(pairs[start : start + page]):
            left, top = place % COLUMNS * 68, place // COLUMNS * 146
            sheet.paste(Image.fromarray(upper), (left, top))
            sheet.paste(Image.fromarray(lower), (left, top + 65))
            draw.text((left, top + 131), text, fill=(0, 0, 0))
        sheet.save(file.with_name(f"{file.name}-{start // page}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pack", required=True, type=Path, help="folder of the pack")
    parser.add_argument("--pairs", required=True, type=Path, help="folder of training pictures")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--only", nargs="*", help="names of tasks")
    options = parser.parse_args()
    pictures = np.load(options.pairs / "images.npy", mmap_mode="r")
    table = json.loads((options.pairs / "pairs.json").read_text())
    pack = open_pack(options.pack)
    for name, entry in pack.tasks.items():
        if options.only and name not in options.only:
            continue
        task = pack.task(name)
        images, labels = [], []
        for split, side in zip(SPLITS, (task.train, task.test), strict=True):
            images += [np.asarray(side.load(index)) for index in range(len(side))]
            labels += [f"{split} {s}" for s in sources(options.pack / entry[split]["file"])]
        distance, index, mirror = closest(np.stack(images), name, pictures)
        order = np.argsort(distance)
        order = order[distance[order] < LIMITS.get(name, LIMIT)]
        couples = []
        for rank, at in enumerate(order):
            pair = table["pairs"][index[at]]
            shown = f"{pair['source']}: {table['texts'][pair['captions'][0][0]]}"
            turned = "mirrored" if mirror[at] else ""
            print(f"{name} {rank} {distance[at]:.1f} {turned}\t{labels[at]}\t{shown}", flush=True)
            lower = render.flatten(np.asarray(pictures[index[at]]))
            couples.append((f"{rank} {distance[at]:.1f}", images[at], lower))
        if options.sheets:
            options.sheets.mkdir(parents=True, exist_ok=True)
            sheets(couples, options.sheets / name)


if __name__ == "__main__":
    main()
