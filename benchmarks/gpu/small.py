"""Every operator once, both passes, on small ragged shapes: for compute-sanitizer, and to be right.

python -m benchmarks.gpu.small --device cuda --verify
"""

from __future__ import annotations

import argparse
import sys
import time

from mulki.bench import call_cost
from mulki.bench.cases import OPERATORS, PAIRED, Case
from mulki.bench.losses import MULKI
from mulki.bench.outcomes import outcome
from mulki.bench.verify import Verifier

SHAPES = ((19, 35, 20), (70, 300, 65))  # whole rows, and stored logits
DTYPES = ("float32", "bfloat16")


def main(argv: list[str]) -> int:
    """Run all cases, or those that fit the time.

    Returns:
        The exit status: 1 if a result is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no case beyond")
    parser.add_argument("--verify", action="store_true", help="against float64")
    options = parser.parse_args(argv)
    stop = time.monotonic() + options.seconds
    left_out, wrong = [], 0
    for operator in OPERATORS:
        for n, p, d in SHAPES:
            for dtype in DTYPES:
                p = n if operator in PAIRED else p
                case = Case(operator, n, p, d, dtype, options.device)
                name = f"{operator} {case.shape} {dtype}"
                if time.monotonic() > stop:
                    left_out.append(name)
                    continue
                problems = _run(case, options.verify)
                print(f"{name}: {'; '.join(problems) or 'ran'}", flush=True)
                wrong += bool(problems)
    if left_out:
        print(f"left out: {len(left_out)} cases, out of time: {'; '.join(left_out)}")
    return 1 if wrong else 0


def _run(case: Case, verify: bool) -> list[str]:
    inputs = case.inputs()
    loss = MULKI[case.operator]
    if verify:
        verifier = Verifier(case, inputs)
        return verifier.problems(verifier.errors(outcome(loss, inputs)))
    float(call_cost.outputs("both", loss, inputs)[0].sum())  # waits
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
