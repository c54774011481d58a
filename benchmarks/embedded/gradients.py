"""How much each term of MulKI's objective moves each tower: gradient norms while tasks are learned.

    python -m benchmarks.embedded.gradients                            # the preset
    python -m benchmarks.embedded.gradients --prototype-update batch   # any option of the method
    python -m benchmarks.embedded.gradients --json FILE                # every norm as well

A norm is that of the term's gradient with respect to all trainable weights of a tower, its
coefficient included. The table has the mean over the tasks and over steps spread over each task.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from mulki.clip.features import Features
from mulki.methods import TaskStart
from mulki.methods.mulki import MulKI
from mulki.train.config.run_config import resolve
from mulki.train.sequence import run

# Measured steps of a task: the first, where the student is its previous model, and some later ones.
MEASURED = 4


def measured(notes: list[dict[str, Any]]) -> type[MulKI]:
    """A method that is MulKI and notes the gradient norms of its terms at some steps.

    It is made when it is asked for, since a method that exists is offered by every run.
    """

    class MeasuredMulKI(MulKI):
        name = "mulki_gradients"
        summary = "MulKI with the gradient norms of its terms"

        def start_task(self, task: TaskStart) -> None:
            super().start_task(task)
            self._task = task
            self._step = 0

        def losses(
            self, student: Features, teachers: tuple[Features, ...], target: Tensor
        ) -> dict[str, Tensor]:
            terms = super().losses(student, teachers, target)
            every = max(1, self._task.steps // MEASURED)
            if self._step % every == 0:
                for term, value in terms.items():
                    norms = gradient_norms(value, self._task.weights)
                    place = {"task": self._task.index, "step": self._step + 1}
                    notes.append(place | {"term": term.removesuffix("_loss")} | norms)
            self._step += 1
            return terms

    return MeasuredMulKI


def gradient_norms(term: Tensor, weights: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Norms of a term's gradient by tower, ``image`` and ``text``; 0 where there is none."""
    norms = {"image": 0.0, "text": 0.0}
    if term.requires_grad:
        grads = torch.autograd.grad(
            term, list(weights.values()), retain_graph=True, allow_unused=True
        )
        for name, grad in zip(weights, grads, strict=True):
            if grad is not None:
                tower = "image" if name.startswith("visual.") else "text"
                norms[tower] += float(grad.square().sum())
    return {tower: square**0.5 for tower, square in norms.items()}


def table(notes: list[dict[str, Any]]) -> str:
    """Mean norms by term as a Markdown table."""
    lines = ["| term | image tower | text tower |", "|---|---|---|"]
    for term in dict.fromkeys(note["term"] for note in notes):
        of = [note for note in notes if note["term"] == term]
        means = (mean(note[tower] for note in of) for tower in ("image", "text"))
        lines.append(f"| {term} | {' | '.join(f'{value:.4f}' for value in means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["embedded"])
    parser.add_argument("--order", default="III")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--json", type=Path, help="also write every norm here")
    known, rest = parser.parse_known_args()
    names = [flag.removeprefix("--").replace("-", "_") for flag in rest[::2]]
    given = {
        "tasks": tuple(known.tasks),
        "order": known.order,
        "preset": known.preset,
        "save_checkpoints": False,
    } | dict(zip(names, rest[1::2], strict=True))
    # The preset is that of MulKI, whose options these are.
    settings = resolve(given | {"method": MulKI.name})
    if settings.run.micro_batch is not None:
        parser.error("--micro-batch: the norms are of whole batches; leave it out")
    notes: list[dict[str, Any]] = []
    method = measured(notes)
    options = asdict(settings.run) | asdict(settings.method) | {"method": method.name}
    if settings.run.epochs is not None:
        del options["iterations"]
    with tempfile.TemporaryDirectory() as logs:
        run(resolve(options | {"logs": logs}))
    print(table(notes))
    if known.json is not None:
        known.json.write_text(json.dumps(notes, indent=1) + "\n")


if __name__ == "__main__":
    main()
