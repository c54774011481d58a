"""The losses beside open_clip's: what they keep for backward, what they take at the peak, and time.

    python -m benchmarks.losses                        # RESULTS.md has its command
    python -m benchmarks.losses --batch-sizes 256 --weights 1 2

Values and gradients are compared with open_clip's in float64 before anything is measured; where
open_clip has no such loss, with mulki's reference. Times are of the processor, all threads, forward
and backward, medians of rounds in which both take turns in one process.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import open_clip.loss
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.saved import SavedBytes
from mulki import losses
from mulki.bench.call_cost import extra_memory, no_garbage_collection, take_turns
from mulki.bench.cases import Inputs
from mulki.bench.machine import describe_machine, setting_line
from mulki.ops import use_backend

MIB = 2**20
TOLERANCE = 2e-5  # relative L2, float32 against float64
WHO = ("open_clip", "mulki")
LOSSES: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "mulki": {
        "ClipLoss": losses.ClipLoss,
        "SigLipLoss": losses.SigLipLoss,
        "DistillClipLoss": losses.DistillClipLoss,
        "DualTeacherClipLoss": losses.DualTeacherClipLoss,
    },
    "open_clip": {
        "ClipLoss": open_clip.loss.ClipLoss,
        "SigLipLoss": open_clip.loss.SigLipLoss,
        "DistillClipLoss": open_clip.loss.DistillClipLoss,
    },
}
# Of the losses that distil, the prefixes of the teachers' arguments.
TEACHERS = {"DistillClipLoss": ("dist_",), "DualTeacherClipLoss": ("dist_", "prev_")}

# A loss, and the weight of its distillation beside the contrastive loss, 1; None where it has none.
Case = tuple[str, float | None]


def cases_of(weights: Sequence[float]) -> list[Case]:
    """The rows of the table: a loss that distils once for each weight."""
    return [
        (name, weight)
        for name in LOSSES["mulki"]
        for weight in (weights if name in TEACHERS else (None,))
    ]


def arguments(name: str, n: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a call of the loss, with the student's requiring grad."""
    generator = torch.Generator().manual_seed(0)

    def rows(d: int) -> Tensor:
        drawn = torch.randn(n, d, generator=generator, dtype=torch.float64)
        return F.normalize(drawn, dim=1).to(dtype)

    siglip = name == "SigLipLoss"
    leaves = {"image_features": rows(width), "text_features": rows(width)}
    leaves["logit_scale"] = torch.tensor(10.0 if siglip else 50.0, dtype=dtype)
    if siglip:
        leaves["logit_bias"] = torch.tensor(-10.0, dtype=dtype)
    for leaf in leaves.values():
        leaf.requires_grad_()
    for prefix in TEACHERS.get(name, ()):
        leaves |= {f"{prefix}{kind}_features": rows(width) for kind in ("image", "text")}
        leaves[f"{prefix}logit_scale"] = torch.tensor(50.0, dtype=dtype)
    return leaves


Total = Callable[[dict[str, Tensor]], Tensor]


def total_of(who: str, case: Case) -> Total:
    """The sum of a loss and, by its weight, of its distillation: an argument of ours."""
    name, weight = case
    if weight is None:
        loss, factor = LOSSES[who][name](), 1.0
    elif who == "mulki":
        loss, factor = LOSSES[who][name](distill_weight=weight), 1.0
    else:
        loss, factor = LOSSES[who][name](), weight

    def total(given: dict[str, Tensor]) -> Tensor:
        contrastive, *distilled = loss(**given, output_dict=True).values()
        # Weight 1 costs no multiplication, as in open_clip's training.
        weighed = distilled if factor == 1 else [factor * term for term in distilled]
        return torch.stack([contrastive, *weighed]).sum()

    return total


def outcome(total: Total, given: dict[str, Tensor]) -> list[Tensor]:
    """Value and gradients."""
    value = total(given)
    leaves = [v for v in given.values() if v.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def check(case: Case, n: int, width: int) -> float:
    """The largest relative L2 error of value and gradients; raises where it is too large."""
    name, _ = case
    exact = arguments(name, n, width, torch.float64)
    if name in LOSSES["open_clip"]:
        want = outcome(total_of("open_clip", case), exact)
    else:
        with use_backend("reference"):
            want = outcome(total_of("mulki", case), exact)
    got = outcome(total_of("mulki", case), arguments(name, n, width, torch.float32))
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
    if not error <= TOLERANCE:
        raise SystemExit(f"{name} at B = {n}: error {error:.1e}, wanted {TOLERANCE:.0e} at most")
    return error


def kept(total: Total, given: dict[str, Tensor]) -> int:
    """Bytes of the storages that a call keeps for backward, its inputs included."""
    saved = SavedBytes()
    with saved.watching():
        total(given)
    return saved.peak


def extra_at_peak(total: Total, given: dict[str, Tensor]) -> int:
    """Bytes beyond inputs and gradients at the peak of forward and backward."""
    names = list(given)

    def call(*values: Tensor) -> Tensor:
        return total(dict(zip(names, values, strict=True)))

    leaves = {key: value for key, value in given.items() if value.requires_grad}
    inputs = Inputs(tuple(given.values()), leaves, torch.ones(()))
    return extra_memory("both", call, inputs, "cpu")["memory"]


def timer(total: Total, given: dict[str, Tensor]) -> Callable[[], float]:
    """A call that returns the seconds of the processor that it took."""

    def call() -> float:
        start = time.process_time()  # of all threads: other processes count for less
        outcome(total, given)
        return time.process_time() - start

    return call


def compared(
    batch_sizes: Sequence[int], weights: Sequence[float], width: int, seconds: float
) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured."""
    headings = ["loss", "weight", "B"]
    for measure in ("kept for backward, MiB", "extra at the peak, MiB", "processor, ms"):
        headings += [f"{measure}: {who}" for who in WHO]
    yield f"| {' | '.join([*headings, 'open_clip / mulki', 'error'])} |"
    yield "| --- " + "| ---: " * 10 + "|"
    for case in cases_of(weights):
        name, weight = case
        for n in batch_sizes:
            error = check(case, n, width)
            given = arguments(name, n, width, torch.float32)
            totals = {who: total_of(who, case) for who, of in LOSSES.items() if name in of}
            with no_garbage_collection():
                calls = {who: timer(total, given) for who, total in totals.items()}
                times = take_turns(calls, seconds)
            cells = [name, "-" if weight is None else f"{weight:g}", str(n)]
            for measure in (kept, extra_at_peak):
                found = {who: measure(total, given) / MIB for who, total in totals.items()}
                cells += [f"{found[who]:.0f}" if who in found else "-" for who in WHO]
            medians = {who: 1e3 * statistics.median(of) for who, of in times.items()}
            cells += [f"{medians[who]:.3g}" if who in medians else "-" for who in WHO]
            ratio = "-"
            if "open_clip" in times:
                pairs = zip(times["open_clip"], times["mulki"], strict=True)
                ratio = f"{statistics.median(a / b for a, b in pairs):.2f}x"
            yield f"| {' | '.join([*cells, ratio, f'{error:.0e}'])} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[1.0, 2.0],
        help="of a distillation beside the contrastive loss, a row for each",
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, each loss of both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    version = importlib.metadata.version("open_clip_torch")
    print(f"{setting_line(describe_machine('cpu'))}; open_clip {version}; float32\n")
    print(f"D = {args.width}\n")
    for line in compared(args.batch_sizes, args.weights, args.width, args.seconds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
