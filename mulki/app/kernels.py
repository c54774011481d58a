"""`mulki doctor --kernels`: where the Triton kernels are right and faster on this machine's GPU.

Each operator is computed at three shapes in float32 and bfloat16. Its loss and gradients are held
against float64 as `mulki bench` does it, then forward and backward together are timed by turns with
`chunked`, which serves a GPU otherwise, and with eager PyTorch. What was found is a table, and the
file that `mulki.ops.wins` reads. Under TRITON_INTERPRET=1 tiny shapes are computed on CPU tensors,
which shows that the kernels are right there; such times mean nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch

from mulki.errors import InputError
from mulki.ops import backends, wins

#: The case of the benchmark for an operator whose name is none.
CASES = {"teacher_kl": "dual_teacher_kl"}
#: N, P and D: small, as in training, and large; then those of operators on pairs.
SHAPES = ((64, 100, 512), (1024, 1000, 512), (8192, 4096, 512))
PAIRED_SHAPES = ((256, 256, 512), (1024, 1024, 512), (4096, 4096, 512))
#: The same in the interpreter.
TINY, PAIRED_TINY = (
    ((8, 10, 16), (17, 9, 24), (18, 33, 16)),
    ((8, 8, 16), (17, 17, 24), (33, 33, 16)),
)
DTYPES = ("float32", "bfloat16")
INTERPRETED_DTYPES = ("float32",)  # where bfloat16 is cut off and not rounded
WAYS = {"mulki": "triton", "mulki-chunked": "chunked", "eager": "eager"}
WIDTHS = (8, 8, 9, 10, 8, 6)  # of the columns behind the first
SECONDS = 0.1  # that each way is timed at a shape, on a GPU


@dataclass(frozen=True)
class Measured:
    """An operator at one shape in one dtype.

    Args:
        logits: N times P.
        error: relative, of the worst gradient; None where it is unknown.
        milliseconds: medians of forward and backward together, by those of WAYS that ran.
        problem: why it is not right, in words; None where it is.
    """

    operator: str
    dtype: str
    shape: str
    logits: int
    error: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    @property
    def wins(self) -> bool:
        """Whether Triton is faster than what serves otherwise."""
        return self.milliseconds["triton"] < self.milliseconds.get("chunked", math.inf)


def report(path: str = "") -> int:
    """Measure, print and write the file; the exit status, 1 where a kernel is not right.

    Args:
        path: of the file; empty for that of this GPU, and for none in the interpreter.

    Raises:
        InputError: the kernels do not run here, or the file cannot be written.
    """
    kind = _kind()
    of = wins.measured_on(kind)
    said = ", ".join(f"{name} {value}" for name, value in of.items())
    print(said + ("; times mean nothing here" if kind == "cpu" else ""))
    print(_line("N x P x D", "error", "allowed", *(f"{way} ms" for way in WAYS.values())))
    measured: list[Measured] = []
    for case in _cases(kind):
        one = _measured(*case)
        if not measured or measured[-1].operator != one.operator:
            print(one.operator)
        print(_in_words(one), flush=True)
        measured.append(one)
    found: wins.Wins = {}
    for operator, dtype in dict.fromkeys((one.operator, one.dtype) for one in measured):
        here = [one for one in measured if (one.operator, one.dtype) == (operator, dtype)]
        value = found.setdefault(operator, {})[dtype] = verdict(here)
        said = value if isinstance(value, str) else f"triton serves from {value} logits on"
        print(f"{operator}, {dtype}: {said}")
    try:
        file = Path(path) if path else None if kind == "cpu" else wins.path_of(of["card"])
        if file is not None:
            wins.write(file, of, found)
            print(f"written to {file}")
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path or 'MULKI_CACHE_DIR'}: cannot be written ({error})") from None
    return int(any(one.problem for one in measured))


def verdict(measured: Sequence[Measured]) -> int | str:
    """Of one operator and dtype: from how many logits on it wins, or why it never serves."""
    for one in measured:
        if one.problem is not None:
            return f"was not right at {one.shape} ({one.problem}); please report it"
    largest_first = sorted(measured, key=lambda one: -one.logits)
    winning = [*takewhile(lambda one: one.wins, largest_first)]
    return winning[-1].logits if winning else f"is slower at {largest_first[0].shape}"


def _kind() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        kind = "cpu"
    else:
        kind = "xpu" if torch.xpu.is_available() else "cuda"
    reason = backends.BACKENDS["triton"].why_not("siglip", kind, torch.float32)
    if reason is not None:
        remedy = "" if kind == "cpu" else "; TRITON_INTERPRET=1 tries them on the CPU"
        raise InputError(f"--kernels: the Triton kernels do not run here ({reason}){remedy}")
    cards = wins.cards(kind)
    if len(cards) > 1:
        raise InputError(
            f"--kernels: got GPUs of several kinds ({', '.join(cards)}), wanted one kind; "
            "set CUDA_VISIBLE_DEVICES"
        )
    return kind


def _cases(kind: str) -> Iterator[tuple[str, str, tuple[int, int, int], str]]:
    from mulki.bench.cases import PAIRED
    from mulki.kernels import lookup

    plain, paired = (TINY, PAIRED_TINY) if kind == "cpu" else (SHAPES, PAIRED_SHAPES)
    for operator in lookup.OPERATORS:
        for dtype in INTERPRETED_DTYPES if kind == "cpu" else DTYPES:
            for shape in paired if operator in PAIRED else plain:
                yield operator, dtype, shape, kind


def _measured(operator: str, dtype: str, shape: tuple[int, int, int], kind: str) -> Measured:
    from mulki.bench.cases import Case
    from mulki.bench.point import measure_case
    from mulki.bench.providers import setting

    case = Case(CASES.get(operator, operator), *shape, dtype, kind)
    where = operator, dtype, case.shape, case.n * case.p
    try:
        with setting(MULKI_BACKEND="triton", MULKI_STRICT="1"):
            results = measure_case(case, tuple(WAYS), ("both",), 0.0 if kind == "cpu" else SECONDS)
    # After a kernel that has broken the GPU's context nothing runs, and nothing serves.
    except Exception as error:
        return Measured(*where, problem=f"{type(error).__name__}: {error}".splitlines()[0])
    by_way = {WAYS[result.provider]: result for result in results}
    ours = by_way["triton"]
    if ours.status != "timed":
        return Measured(*where, problem="; ".join((ours.status, *ours.notes)))
    times = {
        way: result.metrics["speed"].median
        for way, result in by_way.items()
        if result.status == "timed"
    }
    return Measured(*where, ours.metrics["gradient_error"].median, times)


def _in_words(one: Measured) -> str:
    from mulki.bench.verify import TOLERANCE

    numbers = (one.milliseconds.get(way) for way in WAYS.values())
    return _line(
        f"{one.dtype:<8} {one.shape}",
        *("-" if one.error is None else f"{one.error:.1e}", f"{TOLERANCE[one.dtype]:.0e}"),
        *("-" if number is None else f"{number:.3f}" for number in numbers),
        "wrong" if one.problem else "wins" if one.wins else "slower",
    )


def _line(first: str, *others: str) -> str:
    return f"{first:<22}" + "".join(
        f" {word:>{w}}" for word, w in zip(others, WIDTHS, strict=False)
    )
