"""Every operator once, both passes, on ragged shapes: for sanitizers, and to be right.

python -m benchmarks.gpu.small --device cuda --verify
python -m benchmarks.gpu.small --device cuda --again     # the same bits, whatever they are
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

from mulki.bench import call_cost
from mulki.bench.cases import OPERATORS, PAIRED, Case, parse_shape
from mulki.bench.losses import MULKI
from mulki.bench.outcomes import outcome
from mulki.bench.verify import Verifier

#: Whole rows, of one program and of many; then stored logits. The last ones may not be reached.
SHAPES = ("19x35x20", "8192x60x512", "8192x30x1280", "300x1000x512", "4096x1024x64", "70x300x65")
DTYPES = ("bfloat16", "float32")


def main(argv: list[str]) -> int:
    """Run all cases, or those that fit the time, shape by shape.

    Returns:
        The exit status: 1 if a result is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no case beyond")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxPxD; pairs: min(N, P)")
    parser.add_argument("--verify", action="store_true", help="against float64")
    parser.add_argument("--again", action="store_true", help="the third time the same bits")
    options = parser.parse_args(argv)
    stop = time.monotonic() + options.seconds
    left_out, wrong = [], 0
    for case in cases(options.shapes, options.device):
        name = f"{case.operator} {case.shape} {case.dtype}"
        if time.monotonic() > stop:
            left_out.append(name)
            continue
        problems = _run_again(case) if options.again else _run(case, options.verify)
        print(f"{name}: {'; '.join(problems) or 'ran'}", flush=True)
        wrong += bool(problems)
    if left_out:
        print(f"left out: {len(left_out)} cases, out of time: {'; '.join(left_out)}")
    return 1 if wrong else 0


def cases(shapes: tuple[str, ...], device: str) -> list[Case]:
    """Of all operators, the first shape first; N and P of pairs are the smaller one."""
    found = []
    for n, p, d in map(parse_shape, shapes):
        for dtype in DTYPES:
            for operator in OPERATORS:
                size = (min(n, p),) * 2 if operator in PAIRED else (n, p)
                found.append(Case(operator, *size, d, dtype, device))
    return found


def _run(case: Case, verify: bool) -> list[str]:
    inputs = case.inputs()
    loss = MULKI[case.operator]
    if verify:
        verifier = Verifier(case, inputs)
        return verifier.problems(verifier.errors(outcome(loss, inputs)), strict=True)
    for mode in ("both", "forward"):
        float(call_cost.outputs(mode, loss, inputs)[0].sum())  # waits
    return []


def _run_again(case: Case) -> list[str]:
    inputs = case.inputs()
    # The third by launches that were kept.
    first, _, third = (outcome(MULKI[case.operator], inputs) for _ in range(3))
    return [f"{name}: other bits" for name in first if _bits(first[name]) != _bits(third[name])]


def _bits(value: Tensor) -> bytes:
    # NaN is the same as NaN here: fpsan computes with bits that are no numbers.
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
