"""A training step of ours beside the same step as code of the ZSCL family writes it.

python -m benchmarks.step
python -m benchmarks.step --model ViT-B-16 --task letters --batch-size 8 --lock-text --rounds 3

Same model, batch and objective, in one process, step by step in turns. RESULTS.md beside this file
says what is counted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from benchmarks.step.job import prepare
from benchmarks.step.loop_cost import compare
from benchmarks.step.stopwatch import PARTS
from benchmarks.tables import machine_line, markdown, parser_with_output, write_csv
from mulki.errors import InputError

COLUMNS = {
    "what": "model, task, batch, precision",
    "loop": "loop",
    "images_per_second": "images/s:.1f",
    "speedup": "speed-up:.2f",
    "growth_mib": "memory of a step, MiB:.0f",
    **{f"{part}_share": f"{part}:.0%" for part in PARTS},
    "once_s": "once a task, s:.1f",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument("--model", default="mulki-mini", help="an open_clip model, or mulki-mini")
    parser.add_argument("--task", default="flags", help="of the bundled pack")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit-images", type=int, help="of the task; by default one batch")
    parser.add_argument("--captions", type=int, default=0, help="sentences of a further term")
    parser.add_argument("--augment", default="none", help="crop: teachers cannot be kept")
    parser.add_argument("--lock-text", action=argparse.BooleanOptionalAction)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="on the CPU; 0: as torch takes them")
    parser.add_argument("--workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed")
    parser.add_argument("--torchcompile", action="store_true", help="for our loop")
    a = parser.parse_args(argv)
    logging.getLogger("mulki").setLevel(logging.ERROR)  # random weights are meant
    if a.threads:
        torch.set_num_threads(a.threads)
    print(machine_line(a.device), flush=True)
    job = prepare(
        task=a.task,
        captions=a.captions,
        rounds=a.rounds,
        torchcompile=a.torchcompile,
        lock_text=a.lock_text,
        model=a.model,
        batch_size=a.batch_size,
        limit_images=a.limit_images or a.batch_size,
        augment=a.augment,
        precision=a.precision,
        device=a.device,
        workers=a.workers,
    )
    print(job.described(), flush=True)
    rows = compare(job, a.rounds)
    setting = job.columns()
    print(markdown([{"what": job.described(), **row} for row in rows], COLUMNS), flush=True)
    if a.output:
        write_csv(a.output, [{**setting, **row} for row in rows], a.device)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"benchmarks.step: error: {error}")
