"""`mulki prove`: show on this machine's GPU where the Triton kernels are right, and faster.

Every operator is computed at a few shapes in every dtype, by the kernels and by plain PyTorch.
Values and gradients are compared with float64 as the benchmark does (`mulki.bench.verify`), in the
reduced form and row by row, whose backward passes are kernels of their own, and of pairs also with
labels. Then forward and
backward together are timed by turns. `mulki.ops.proofs` keeps what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mulki import ops
from mulki.errors import InputError
from mulki.ops import backends, proofs
from mulki.ops.gates import find_gate
from mulki.ops.proofs import Verdict

if TYPE_CHECKING:
    from mulki.bench.cases import Case
    from mulki.bench.losses import Loss

#: The cases of the benchmark that try an operator.
CASES = {
    "teacher_kl": ("teacher_kl_1", "dual_teacher_kl"),
    "prototype_cross_entropy": ("prototype_cross_entropy",),
    "contrastive": ("contrastive",),
    "siglip": ("siglip",),
    "pair_kl": ("pair_kl",),
    "similarity": ("similarity",),
}
#: N, P and D by size; pairs have P = N.
SHAPES = {"small": (64, 100, 512), "medium": (1024, 1000, 512), "large": (8192, 4096, 512)}
PAIRED_SHAPES = {"small": (256, 256, 512), "medium": (1024, 1024, 512), "large": (4096, 4096, 512)}
DTYPES = ("float32", "bfloat16", "float16")


def prove(
    device: str,
    seconds: float = 60.0,
    dtypes: Sequence[str] = DTYPES,
    sizes: Sequence[str] = tuple(proofs.SIZES),
) -> Iterator[Verdict]:
    """The verdicts, as they are found; the whole proof is stored with the last one.

    Args:
        device: "cuda" or "xpu"; "cpu" tries the kernels in Triton's interpreter.
        seconds: for timing, of all cases together; compiling the kernels comes on top.
        dtypes: of DTYPES.
        sizes: of `proofs.SIZES`.

    Raises:
        OSError: the proof cannot be written.
    """
    verdicts = []
    each = seconds / (sum(map(len, CASES.values())) * len(dtypes) * len(sizes)) / 2
    for size in sizes:
        for dtype in dtypes:
            for operator in CASES:
                with backends.use_backend("triton"):
                    verdict = _verdict_of(operator, dtype, size, device, each)
                verdicts.append(verdict)
                yield verdict
    proofs.store(proofs.subject_of(torch.device(device)), verdicts)
    backends.forget_choices()


def report(device: str, seconds: float) -> int:
    """Print the verdicts as they are found; the exit status, 1 where something is wrong.

    Raises:
        InputError: there is no such device, or the kernels do not load.
        OSError: the proof cannot be written.
    """
    reason = _not_served("similarity", device, "float32")
    if reason is not None:
        raise InputError(
            f"--device: got {device}, where the Triton kernels do not run: {reason}; run it on a "
            f"machine with a GPU"
        )
    print(f"{'operator':<24} {'dtype':<9} {'size':<7} speed of plain PyTorch, and what is wrong")
    wrong = 0
    for verdict in prove(device, seconds):
        speed = "-" if verdict.speedup is None else f"{verdict.speedup:.2f}"
        words = "; ".join(verdict.problems) or "right"
        place = f"{verdict.operator:<24} {verdict.dtype:<9} {verdict.size:<7}"
        print(f"{place} {speed:>5}  {words}", flush=True)
        wrong += bool(verdict.problems)
    print(f"kept in {proofs.proof_file()}; the kernels now serve where they are right and faster")
    return int(wrong > 0)


def _verdict_of(operator: str, dtype: str, size: str, device: str, seconds: float) -> Verdict:
    from mulki.bench.cases import PAIRED, Case
    from mulki.bench.point import measure_case

    problems: list[str] = []
    speedups: list[float] = []
    for name in CASES[operator]:
        shape = (PAIRED_SHAPES if name in PAIRED else SHAPES)[size]
        case = Case(name, *shape, dtype, device)
        reason = _not_served(operator, device, dtype)
        results = [] if reason else measure_case(case, ("eager", "mulki"), ("both",), seconds)
        for result in results:
            if result.provider == "mulki" and result.status != "timed":
                problems += result.notes or (result.status,)
            elif result.provider == "mulki" and "speedup_over_eager" in result.metrics:
                speedups.append(result.metrics["speedup_over_eager"].median)
        problems += [reason] if reason else _problems_of_forms(case)
    speedup = min(speedups) if len(speedups) == len(CASES[operator]) else None
    return Verdict(operator, dtype, size, tuple(problems), speedup)


def _not_served(operator: str, device: str, dtype: str) -> str | None:
    # Under a forced backend what it does not serve falls back, and would prove nothing.
    kind = torch.device(device).type
    return backends.BACKENDS["triton"].why_not(operator, kind, getattr(torch, dtype))


def _problems_of_forms(case: Case) -> list[str]:
    """What is wrong with the losses of single rows, and with labels beside pairs."""
    from mulki.bench.losses import EAGER, MULKI, TEMPERATURE
    from mulki.bench.outcomes import outcome
    from mulki.bench.verify import Verifier

    if case.operator == "similarity":
        return []
    ours = MULKI[case.operator]
    inputs = case.inputs()
    problems = []

    def try_form(form: str, loss: Loss, plain: Loss | None = None) -> None:
        try:
            verifier = Verifier(case, inputs, plain)
            errors = verifier.errors(outcome(loss, inputs))
        # Whatever the kernels raise is what is wrong with them.
        except Exception as error:
            problems.append(f"{form}: {type(error).__name__}: {error}".splitlines()[0])
        else:
            problems.extend(f"{form}: {problem}" for problem in verifier.problems(errors))

    try_form("row by row", lambda *operands: ours(*operands, reduction="none").mean())
    if case.operator == "pair_kl":

        def with_labels(
            x: Tensor, w: Tensor, scale: Tensor, teachers: Any, target: Tensor
        ) -> Tensor:
            uniform = find_gate("uniform")
            of_labels, of_teachers, *_ = ops.pair_kl.sums_with_labels(
                (x, w, scale), teachers, TEMPERATURE, uniform, (0.0, 0.0), 1.0
            )
            return (of_labels + of_teachers) / len(x)

        def plain(*operands: Any) -> Tensor:
            return EAGER["contrastive"](*operands[:3]) + EAGER["pair_kl"](*operands)

        try_form("with labels", with_labels, plain)
    return problems
