"""Zero-shot accuracy of a start model, by default the shipped one, on the pack's test pictures.

    python -m benchmarks.embedded.zero_shot --json benchmarks/embedded/zero_shot.json

Model, tasks and evaluation are those of ``mulki run``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mulki.clip import models
from mulki.clip.evaluation import Evaluator
from mulki.data import load_sequence
from mulki.data.loader import batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=models.BUNDLED, help="as mulki run takes it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = models.load(options.model)
    tasks = load_sequence(["embedded"])
    loaders = [batches(task.test, model.preprocess, 256, shuffle=False, seed=0) for task in tasks]
    evaluator = Evaluator(model, tasks, loaders)
    figures: dict[str, dict[str, float]] = {}
    print("| task | classes | test images | zero-shot, % | chance, % |")
    print("|---|---|---|---|---|")
    for number, task in enumerate(tasks):
        accuracy, images = evaluator.accuracy(number)
        classes = len(task.classes)
        figures[task.name] = {
            "accuracy": round(accuracy, 2),
            "chance": round(100 / classes, 2),
            "images": images,
            "classes": classes,
        }
        print(f"| {task.name} | {classes} | {images} | {accuracy:.1f} | {100 / classes:.1f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
