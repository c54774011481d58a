"""What a step of a large model needs, measured on the CPU and counted for cards.

    python -m benchmarks.step.large --output large.csv

Each line is a process of its own, with random weights: MulKI with its two teachers, as it is by
default, takes two steps of images of the bundled pack, in micro-batches. The memory of the process
is compared with what `mulki plan --card-gb` counts. Of the two largest models steps of 16 images
are measured in place of 64, which take four times as long. Batches that would take hours on a CPU,
and models that do not fit into this machine's memory, are counted alone. What a card holds is the
largest micro-batch on it; memory is little changed by other programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.tables import Row, machine_line, markdown, parser_with_output, write_csv
from mulki.bench.call_cost import PeakMemory
from mulki.clip.models import BUNDLED
from mulki.data.subset import Subset, sampled

MOST = "--lora-rank 16 --grad-checkpointing"
CACHED = "all weights, --teacher-cache"
FORMS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, --grad-checkpointing": {"grad_checkpointing": True},
    CACHED: {},
    "--lora-rank 16": {"lora_rank": 16},
    MOST: {"lora_rank": 16, "grad_checkpointing": True},
}
BATCHES = (64, 1024, 16384)
# By model, the forms and the batches that are measured too.
MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "mulki-mini": {"all weights": (64, 1024)},
    "ViT-B-16": dict.fromkeys(FORMS, (64,)),
    "ViT-L-14": dict.fromkeys(set(FORMS) - {CACHED}, (64,)),
    "ViT-H-14": {MOST: (64,)},
}
# Images in a measured batch, where the whole one takes too long.
FEWER = {"ViT-L-14": 16, "ViT-H-14": 16}
CARDS = (8, 16, 24, 40, 80)
MICRO_BATCH = 8
COLUMNS = {
    "model": "model",
    "form": "form",
    "batch": "batch",
    "images": "measured with",
    "measured": "measured, MiB:.0f",
    "counted": "counted, MiB:.0f",
    "models": "models, MiB:.0f",
    "optimizer": "optimiser, MiB:.0f",
    "step": "one image, MiB:.0f",
    "evaluation": "evaluation, MiB:.0f",
    "image": "more, MiB:.1f",
    "kept": "batch, MiB:.1f",
    "host": "its images, MiB:.0f",
    **{f"on_{card}": f"{card} GB:d" for card in CARDS},
}


def rows_of(model: str, form: str) -> list[Row]:
    """What is counted of a step, a row for each batch."""
    from mulki.train.card import most, ways
    from mulki.train.start.setup import prepared

    with (
        TemporaryDirectory() as cache,
        prepared(_settings(model, form, MICRO_BATCH, cache), write=False) as setup,
    ):
        way, size = next(ways(setup)), setup.model.image_size
    rows: list[Row] = []
    for batch in BATCHES:
        mib = {
            "counted": way.held + most(way.kept, batch) + way.step(MICRO_BATCH),
            "models": way.models,
            "optimizer": way.optimizer,
            "step": way.step(1),
            "evaluation": way.evaluation,
            "image": way.image,
            "kept": most(way.kept, batch),
            # The task's and those made of them, in float32.
            "host": 2 * batch * 3 * size**2 * 4,
        }
        rows.append(
            {"model": model, "form": form, "batch": batch, "images": None, "measured": None}
            | {name: value / 2**20 for name, value in mib.items()}
            | {f"on_{card}": way.images(card * 10**9, batch) for card in CARDS}
        )
    return rows


def measured(model: str, form: str, batch: int) -> float:
    """MiB by which this process grows in two steps of so many images."""
    from mulki.train.learning.inputs import Listeners
    from mulki.train.start.setup import prepared
    from mulki.train.task_learner import TaskLearner

    peak = PeakMemory("cpu")
    with (
        TemporaryDirectory() as cache,
        prepared(_settings(model, form, batch, cache), write=False) as setup,
    ):
        task = setup.tasks[0]
        # Each class in its turn, and all again where the task has fewer images.
        few = sampled(task, min(batch, len(task.train))).train
        places = [i % len(few) for i in range(max(batch, len(few)))]
        TaskLearner(setup).learn(0, replace(task, train=Subset(few, places)), Listeners())
    growth = peak.growth()
    assert growth is not None, "Linux alone says how much memory a process has had"
    return growth / 2**20


def _settings(model: str, form: str, batch: int, cache: str) -> Any:
    from mulki.train.config.run_config import resolve

    given: dict[str, Any] = {
        "tasks": ("embedded:digits", "embedded:animals"),
        "model": model,
        "method": "mulki",
        "precision": "amp_bf16",
        "precision_eval": "amp_bf16",
        "batch_size": batch,
        "micro_batch": str(MICRO_BATCH),
        "iterations": 2,
    }
    if form == CACHED:
        given["teacher_cache"] = cache
    if model != BUNDLED:
        given["pretrained"] = "none"
    return resolve(given | FORMS[form])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="some of them"
    )
    parser.add_argument(
        "--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="some of them"
    )
    a = parser.parse_args(argv)
    print(machine_line("cpu"), flush=True)
    rows = []
    for model, form in product(a.models, a.forms):
        for row in _alone(rows_of, model, form):
            if row["batch"] in MODELS[model].get(form, ()):
                row["images"] = FEWER.get(model, row["batch"])
                row["measured"] = _alone(measured, model, form, row["images"])
            rows.append(row)
            print(row, flush=True)
            if a.output:
                write_csv(a.output, [row], "cpu")
    print(markdown(rows, COLUMNS))


def _alone(call: Callable[..., Any], *given: Any) -> Any:
    # In a process of its own, whose memory is that of this call.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


if __name__ == "__main__":
    main()
