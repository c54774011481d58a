"""Memory and time of a training step whose batch is encoded in micro-batches.

python -m benchmarks.microbatch
python -m benchmarks.microbatch --models ViT-S-32 --micro-batch 4 --factors 1 16 --output new.csv

Memory is measured in a fresh process per point, time in one process in which the points take turns.
RESULTS.md beside this file says what is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.microbatch.step_cost import measure
from benchmarks.microbatch.workload import Setting
from benchmarks.tables import machine_line, parser_with_output, show
from mulki.errors import InputError

COLUMNS = {
    "model": "model",
    "precision": "precision",
    "batch": "B:d",
    "micro_batch": "micro-batch:d",
    "saved_mib": "saved for backward, MiB:.1f",
    "peak_mib": "peak, MiB:.1f",
    "batch_mib": "batch, MiB:.1f",
    "saved_ratio": "saved, of M's:.2f",
    "peak_ratio": "peak, of M's:.2f",
    "with_batch_ratio": "peak with batch, of M's:.2f",
    "ms_per_image": "ms an image:.2f",
    "time_of_m_ratio": "time, of M's:.2f",
    "time_ratio": "time, of the whole batch's:.2f",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument("--models", nargs="+", default=["mulki-mini", "ViT-S-32"])
    parser.add_argument("--micro-batch", type=int, default=16, help="M")
    parser.add_argument("--factors", nargs="+", type=int, default=[1, 4, 16, 64], help="B / M")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="on the CPU; 0: as torch takes them")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, beside one to warm up")
    a = parser.parse_args(argv)
    if a.threads:
        torch.set_num_threads(a.threads)
    print(machine_line(a.device), flush=True)
    for name in a.models:
        setting = Setting(name, a.precision, a.device, a.threads)
        rows = measure(setting, a.micro_batch, a.factors, a.rounds)
        show(rows, COLUMNS, a.output, a.device)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"benchmarks.microbatch: error: {error}")
