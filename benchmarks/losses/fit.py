"""One loss at growing batch sizes, by open_clip and by mulki's backends: time, memory, what fits.

    python -m benchmarks.losses.fit                    # RESULTS.md has its command
    python -m benchmarks.losses.fit --batch-sizes 256 --limit 1024

Time is of the processor, all threads, forward and backward: the median of rounds in which all take
turns, at least five, above B = 4096 at least one. Memory is what a call takes beyond its inputs and
gradients at the peak. Up to B = 4096 values and gradients are compared with open_clip's in float64
first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.losses.__main__ import (
    LOSSES,
    MIB,
    TEACHERS,
    Case,
    arguments,
    check,
    extra_at_peak,
    timer,
    total_of,
)
from mulki.bench.call_cost import no_garbage_collection, take_turns
from mulki.bench.machine import describe_machine, setting_line
from mulki.bench.providers import setting

#: By name, whose loss it is, and the backend.
WHO = {
    "open_clip": ("open_clip", "auto"),
    "mulki, chunked": ("mulki", "chunked"),
    "mulki, cpp": ("mulki", "cpp"),
}
STEP = 512  # of the batch sizes that are tried
CHECKED = 4096


def case_of(name: str) -> Case:
    return name, 1.0 if name in TEACHERS else None


def memory(who: str, name: str, n: int, width: int) -> float:
    """MiB beyond inputs and gradients."""
    with setting(MULKI_BACKEND=WHO[who][1]):
        given = arguments(name, n, width, torch.float32)
        return extra_at_peak(total_of(WHO[who][0], case_of(name)), given) / MIB


def largest(who: str, name: str, width: int, most: float, limit: int) -> str:
    """The largest batch, in steps of STEP, that takes at most so many MiB."""
    low, high = 0, 1
    while memory(who, name, high * STEP, width) <= most:
        if high * STEP >= limit:
            return f"over {high * STEP}"
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if memory(who, name, middle * STEP, width) <= most:
            low = middle
        else:
            high = middle
    return str(low * STEP)


def times(name: str, n: int, width: int, seconds: float) -> dict[str, float]:
    """Milliseconds of the processor."""
    given = arguments(name, n, width, torch.float32)

    def call_of(who: str) -> Callable[[], float]:
        call = timer(total_of(WHO[who][0], case_of(name)), given)

        def within() -> float:
            with setting(MULKI_BACKEND=WHO[who][1]):
                return call()

        return within

    with no_garbage_collection():
        rounds = 5 if n <= CHECKED else 1
        found = take_turns({who: call_of(who) for who in WHO}, seconds, rounds)
    return {who: 1e3 * statistics.median(of) for who, of in found.items()}


def table(
    name: str, sizes: Sequence[int], width: int, seconds: float, most: float, limit: int
) -> Iterator[str]:
    for n in sizes:
        if n <= CHECKED:
            for _, backend in WHO.values():
                with setting(MULKI_BACKEND=backend):
                    check(case_of(name), n, width)
    cells = {who: [who] for who in WHO}
    for n in sizes:
        of_size = times(name, n, width, seconds)
        for who in WHO:
            cells[who].append(f"{of_size[who]:.3g} ms, {memory(who, name, n, width):.0f} MiB")
    headings = [f"B = {n}" for n in sizes]
    yield f"| {name} | {' | '.join(headings)} | largest B in {most / 1024:g} GiB |"
    yield "| --- " + "| ---: " * (len(sizes) + 1) + "|"
    for who in WHO:
        yield f"| {' | '.join([*cells[who], largest(who, name, width, most, limit)])} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--loss", default="DistillClipLoss", choices=LOSSES["open_clip"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, of each")
    parser.add_argument("--mib", type=float, default=2048.0, help="that have to be enough")
    parser.add_argument("--limit", type=int, default=32768, help="the largest batch to try")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{setting_line(describe_machine('cpu'))}; float32, D = {args.width}\n")
    options = args.width, args.seconds, args.mib, args.limit
    for line in table(args.loss, args.batch_sizes, *options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
