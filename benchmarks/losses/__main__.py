"""The losses beside open_clip's: what they keep for backward, what they take at the peak, and time.

    python -m benchmarks.losses                                  # RESULTS.md has its commands
    python -m benchmarks.losses --batch-sizes 256 --train-batch-size 0
    python -m benchmarks.losses --batch-sizes --train-batch-size 16384

Values and gradients are compared with open_clip's in float64 before anything is measured; where
open_clip has no such loss, with mulki's reference. Times are of the processor, all threads, forward
and backward, medians of rounds in which both take turns in one process. Training has a process of
its own per loss.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.losses.train import LOSSES, TEACHERS
from benchmarks.microbatch.saved import SavedBytes
from mulki.bench.call_cost import extra_memory, no_garbage_collection, take_turns
from mulki.bench.cases import Inputs
from mulki.bench.machine import describe_machine, setting_line
from mulki.ops import use_backend

MIB = 2**20
TOLERANCE = 2e-5  # relative L2, float32 against float64


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
    for prefix in TEACHERS.get(name, {}):
        leaves |= {f"{prefix}{kind}_features": rows(width) for kind in ("image", "text")}
        leaves[f"{prefix}logit_scale"] = torch.tensor(50.0, dtype=dtype)
    return leaves


def total(loss: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(loss(**given, output_dict=True).values())).sum()


def outcome(loss: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    value = total(loss, given)
    leaves = [v for v in given.values() if v.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def check(name: str, n: int, width: int) -> float:
    """The largest relative L2 error of value and gradients; raises where it is too large."""
    exact = arguments(name, n, width, torch.float64)
    if name in LOSSES["open_clip"]:
        want = outcome(LOSSES["open_clip"][name](), exact)
    else:
        with use_backend("reference"):
            want = outcome(LOSSES["mulki"][name](), exact)
    got = outcome(LOSSES["mulki"][name](), arguments(name, n, width, torch.float32))
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
    if not error <= TOLERANCE:
        raise SystemExit(f"{name} at B = {n}: error {error:.1e}, wanted {TOLERANCE:.0e} at most")
    return error


def kept(loss: nn.Module, given: dict[str, Tensor]) -> int:
    """Bytes of the storages that a call keeps for backward, its inputs included."""
    saved = SavedBytes()
    with saved.watching():
        total(loss, given)
    return saved.peak


def extra_at_peak(loss: nn.Module, given: dict[str, Tensor]) -> int:
    """Bytes beyond inputs and gradients at the peak of forward and backward."""
    names = list(given)

    def call(*values: Tensor) -> Tensor:
        return total(loss, dict(zip(names, values, strict=True)))

    leaves = {key: value for key, value in given.items() if value.requires_grad}
    inputs = Inputs(tuple(given.values()), leaves, torch.ones(()))
    return extra_memory("both", call, inputs, "cpu")["memory"]


def timer(loss: nn.Module, given: dict[str, Tensor]) -> Callable[[], float]:
    def call() -> float:
        start = time.process_time()  # of all threads: other processes count for less
        outcome(loss, given)
        return time.process_time() - start

    return call


def compared(batch_sizes: Sequence[int], width: int, seconds: float) -> Iterator[str]:
    headings = ["loss", "B"]
    for measure in ("kept for backward, MiB", "extra at the peak, MiB", "processor, ms"):
        headings += [f"{measure}: {who}" for who in WHO]
    yield f"| {' | '.join([*headings, 'open_clip / mulki', 'error'])} |"
    yield "| --- " + "| ---: " * 9 + "|"
    for name in LOSSES["mulki"]:
        for n in batch_sizes:
            error = check(name, n, width)
            given = arguments(name, n, width, torch.float32)
            made = {who: of[name]() for who, of in LOSSES.items() if name in of}
            with no_garbage_collection():
                calls = {who: timer(loss, given) for who, loss in made.items()}
                times = take_turns(calls, seconds)
            cells = [name, str(n)]
            for measure in (kept, extra_at_peak):
                found = {who: measure(loss, given) / MIB for who, loss in made.items()}
                cells += [f"{found[who]:.0f}" if who in found else "-" for who in WHO]
            medians = {who: 1e3 * statistics.median(of) for who, of in times.items()}
            cells += [f"{medians[who]:.3g}" if who in medians else "-" for who in WHO]
            ratio = "-"
            if "open_clip" in times:
                pairs = zip(times["open_clip"], times["mulki"], strict=True)
                ratio = f"{statistics.median(a / b for a, b in pairs):.2f}x"
            yield f"| {' | '.join([*cells, ratio, f'{error:.0e}'])} |"


WHO = ("open_clip", "mulki")


def trained(batch_size: int, steps: int, with_open_clip: bool) -> Iterator[str]:
    yield (
        "| loss | of | seconds per step | processor seconds per step "
        "| resident before the first step, MiB | at the peak, MiB "
        "| contrastive loss, first and last step |"
    )
    yield "| --- | --- " + "| ---: " * 5 + "|"
    for name in LOSSES["mulki"]:
        for who in WHO:
            if name not in LOSSES[who] or (who == "open_clip" and not with_open_clip):
                continue
            command = [sys.executable, "-m", "benchmarks.losses.train", "--loss", name]
            command += ["--implementation", who, "--steps", str(steps)]
            command += ["--batch-size", str(batch_size)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                yield f"| {name} | {who} | failed: exit status {run.returncode} | | | | |"
                continue
            found = json.loads(run.stdout)
            cells = [name, who]
            cells += [f"{statistics.median(found[key]):.1f}" for key in ("seconds", "processor")]
            cells += [f"{found[key] / MIB:.0f}" for key in ("before", "peak")]
            cells.append(" to ".join(f"{found['losses'][i]:.4g}" for i in (0, -1)))
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1024, 2048])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, each loss of both")
    parser.add_argument("--train-batch-size", type=int, default=16384, help="0: do not train")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--train-open-clip", action="store_true", help="train with open_clip's losses too"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    version = importlib.metadata.version("open_clip_torch")
    print(f"{setting_line(describe_machine('cpu'))}; open_clip {version}; float32\n")
    if args.batch_sizes:
        print(f"D = {args.width}\n")
        for line in compared(args.batch_sizes, args.width, args.seconds):
            print(line, flush=True)
        print()
    if args.train_batch_size:
        print(f"Training with B = {args.train_batch_size}, D = 512, {args.steps} steps\n")
        for line in trained(args.train_batch_size, args.steps, args.train_open_clip):
            print(line, flush=True)


if __name__ == "__main__":
    main()
