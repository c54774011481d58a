"""What a step of a large model needs, measured on the CPU and counted for cards.

    python -m benchmarks.step.large --output benchmarks/step/large.csv

Each line is a process of its own, with random weights: MulKI with its two teachers takes two steps
of a task of the bundled pack, and the memory of the process is compared with what
`mulki plan --card-gb` counts. Models that would take hours on a CPU are counted alone. What a card
holds is the largest micro-batch on it; memory is little changed by other programs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.tables import Row, machine_line, markdown, write_csv
from mulki.bench.call_cost import PeakMemory

# The model, and images in a global batch; None where it is counted alone.
MODELS: dict[str, int | None] = {"ViT-B-16": 64, "ViT-L-14": 16, "ViT-H-14": None}
FORMS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, --grad-checkpointing": {"grad_checkpointing": True},
    "--lora-rank 16": {"lora_rank": 16},
    "--lora-rank 16 --grad-checkpointing": {"lora_rank": 16, "grad_checkpointing": True},
}
CARDS = (8, 16, 24, 40, 80)
MICRO_BATCH = 8
COLUMNS = {
    "model": "model",
    "form": "form",
    "batch": "images a step",
    "measured": "measured, MiB:.0f",
    "counted": "counted, MiB:.0f",
    "models": "models, MiB:.0f",
    "optimizer": "optimiser, MiB:.0f",
    "step": "one image, MiB:.0f",
    "image": "more, MiB:.1f",
    **{f"on_{card}": f"{card} GB:d" for card in CARDS},
}


def measure(model: str, form: str, batch: int | None) -> Row:
    """Count a step, and take two where there is a batch."""
    from mulki.data.subset import sampled
    from mulki.train.card import ways
    from mulki.train.config.presets import RELATIONS
    from mulki.train.config.run_config import resolve
    from mulki.train.learning.inputs import Listeners
    from mulki.train.start.setup import prepared
    from mulki.train.task_learner import TaskLearner

    given: dict[str, Any] = {
        "tasks": ("embedded:digits", "embedded:animals"),
        "model": model,
        "pretrained": "none",
        "method": "mulki",
        **RELATIONS,
        "precision": "amp_bf16",
        "batch_size": batch or MICRO_BATCH,
        "micro_batch": str(MICRO_BATCH),
        "iterations": 2,
    }
    peak = PeakMemory("cpu")
    with prepared(resolve(given | FORMS[form]), write=False) as setup:
        way = next(ways(setup))
        measured = None
        if batch is not None:
            small = sampled(setup.tasks[0], batch)
            TaskLearner(setup).learn(0, small, Listeners())
            measured = peak.growth()
    mib = {
        "measured": measured,
        "counted": way.models + way.optimizer + way.step(MICRO_BATCH),
        "models": way.models,
        "optimizer": way.optimizer,
        "step": way.step(1),
        "image": way.image,
    }
    return {
        "model": model,
        "form": form,
        "batch": batch,
        **{name: None if value is None else value / 2**20 for name, value in mib.items()},
        **{f"on_{card}": way.images(card * 10**9) for card in CARDS},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="some of them")
    parser.add_argument("--output", help="a CSV file to write; one that exists grows")
    a = parser.parse_args(argv)
    print(machine_line("cpu"), flush=True)
    rows = []
    for model in a.models:
        for form in FORMS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(measure, model, form, MODELS.get(model)).result())
            print(rows[-1], flush=True)
    print(markdown(rows, COLUMNS))
    if a.output:
        write_csv(a.output, rows, "cpu")


if __name__ == "__main__":
    main()
