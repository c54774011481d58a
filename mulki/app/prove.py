"""`mulki prove`: show on this machine's GPU where the Triton kernels are right, and faster.

Every operator is computed at a few shapes in every dtype, by the kernels and by plain PyTorch.
Values and gradients are compared with float64 as the benchmark does (`mulki.bench.verify`): of the
mean, of the losses of single rows, whose gradients are computed apart, and with other options; and
so are the by-products, such as the divergence and the weight of each teacher. Then
forward and backward together are timed by turns, and forward alone, which may be another kernel.
`mulki.ops.proofs` keeps what was found.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mulki import functional, ops
from mulki.errors import InputError
from mulki.ops import backends, proofs
from mulki.ops.gates import Weighting
from mulki.ops.proofs import Verdict
from mulki.similarity import Similarity

if TYPE_CHECKING:
    from mulki.bench.cases import Case, Inputs
    from mulki.bench.losses import Loss
    from mulki.bench.outcomes import Outcome
    from mulki.bench.verify import Compute

#: The cases of the benchmark that try an operator.
CASES = {
    "teacher_kl": ("teacher_kl_1", "dual_teacher_kl"),
    "prototype_cross_entropy": ("prototype_cross_entropy",),
    "contrastive": ("contrastive",),
    "siglip": ("siglip",),
    "pair_kl": ("pair_kl",),
    "similarity": ("similarity",),
}
#: N, P and D by size, which are timed; pairs have P = N.
SHAPES = {"small": (64, 100, 512), "medium": (1024, 1000, 512), "large": (8192, 4096, 512)}
PAIRED_SHAPES = {"small": (256, 256, 512), "medium": (1024, 1024, 512), "large": (4096, 4096, 512)}
MODES = ("both", "forward")  # a verdict has their speeds in this order
#: Shapes that are tried besides. They fill no tile, and the kernels take other schedules for them:
#: whole rows, stored logits and streams, of operands that tensor descriptors can have and cannot.
OTHER_SHAPES = {
    "small": ((50, 37, 650), (60, 1100, 512), (60, 1100, 650)),
    "medium": ((700, 1531, 770), (16000, 60, 256), (64, 60000, 136), (64, 65000, 132)),
    "large": (
        *((200, 150000, 136), (200, 150000, 132), (160000, 30, 256)),
        *((300, 21841, 512), (300, 21841, 132), (5000, 1000, 132), (1500, 16000, 700)),
    ),
}
#: Of the last the logits are made twice.
OTHER_PAIRED_SHAPES = {
    "small": ((75, 75, 650),),
    "medium": ((700, 700, 770),),
    "large": ((4700, 4700, 640),),
}
DTYPES = ("float32", "bfloat16", "float16")


def prove(
    device: str,
    seconds: float = 60.0,
    dtypes: Sequence[str] = DTYPES,
    sizes: Sequence[str] = tuple(proofs.SIZES),
) -> Iterator[Verdict]:
    """The verdicts, as they are found; each is stored before the next one is sought.

    Args:
        device: "cuda" or "xpu"; "cpu" tries the kernels in Triton's interpreter.
        seconds: for timing, of all cases together; compiling the kernels comes on top.
        dtypes: of DTYPES.
        sizes: of `proofs.SIZES`.

    Raises:
        OSError: the proof cannot be written.
        RuntimeError: a kernel has broken the GPU's context, so that this process can try no other.
    """
    subject = proofs.subject_of(torch.device(device))
    cases = sum(map(len, CASES.values())) * len(MODES)
    each = seconds / (cases * len(dtypes) * len(sizes)) / 2
    for size in sizes:
        for dtype in dtypes:
            for operator in CASES:
                with backends.use_backend("triton"):
                    verdict = _verdict_of(operator, dtype, size, device, each)
                proofs.store(subject, [verdict])
                backends.forget_choices()
                yield verdict
                if verdict.problems:
                    _check_context(device)


def report(
    device: str, seconds: float, limit: float = math.inf, copy_to: Path | None = None
) -> int:
    """Print the verdicts as they are found; the exit status, 1 where something is wrong.

    Args:
        device, seconds: as of `prove`.
        limit: seconds after which no other verdict is sought.
        copy_to: another file for the proof, written after each verdict.

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
    print("times the speed of plain PyTorch, with gradients and without, and what is wrong")
    wrong, stop = 0, time.monotonic() + limit
    for found, verdict in enumerate(prove(device, seconds), start=1):
        speedups = verdict.speedup, verdict.forward_speedup
        speed = " ".join("    -" if one is None else f"{one:5.2f}" for one in speedups)
        untried = "no memory to try it" if verdict.speedup is None else "right"
        words = "; ".join(verdict.problems) or untried
        place = f"{verdict.operator:<24} {verdict.dtype:<9} {verdict.size:<7}"
        print(f"{place} {speed}  {words}", flush=True)
        if copy_to is not None:
            shutil.copyfile(proofs.proof_file(proofs.subject_of(torch.device(device))), copy_to)
        wrong += bool(verdict.problems)
        left = len(CASES) * len(DTYPES) * len(proofs.SIZES) - found
        if left and time.monotonic() > stop:
            print(f"left out: {left} verdicts, out of time; the kernels do not serve there")
            break
    print(f"kept in {proofs.folder()}; the kernels now serve where they are right and faster")
    return int(wrong > 0)


def _check_context(device: str) -> None:
    # After an illegal access every later call would fail, and look like a wrong kernel.
    if torch.device(device).type == "cpu":
        return
    try:
        torch.accelerator.synchronize(torch.device(device))
    except RuntimeError as error:
        raise RuntimeError(
            f"mulki prove: the kernel above has broken the GPU's context ({error}); what was not "
            f"tried yet stays in plain PyTorch; please report it"
        ) from None


def _verdict_of(operator: str, dtype: str, size: str, device: str, seconds: float) -> Verdict:
    try:
        return _tried(operator, dtype, size, device, seconds)
    except torch.OutOfMemoryError:
        # Plain PyTorch needs more than the GPU has, or the comparison in float64 does.
        return Verdict(operator, dtype, size)


def _tried(operator: str, dtype: str, size: str, device: str, seconds: float) -> Verdict:
    from mulki.bench.cases import PAIRED, Case
    from mulki.bench.point import measure_case

    problems: list[str] = []
    speedups: dict[str, list[float]] = {mode: [] for mode in MODES}
    for name in CASES[operator]:
        shape = (PAIRED_SHAPES if name in PAIRED else SHAPES)[size]
        case = Case(name, *shape, dtype, device)
        reason = _not_served(operator, device, dtype)
        results = [] if reason else measure_case(case, ("eager", "mulki"), MODES, seconds)
        for result in results:
            if result.provider == "mulki" and result.status == "failed":
                problems += result.notes or (result.status,)
            elif result.provider == "mulki" and "speedup_over_eager" in result.metrics:
                speedups[result.mode].append(result.metrics["speedup_over_eager"].median)
        problems += [reason] if reason else _problems_of_forms(case)
    slowest = (
        min(speedups[mode]) if len(speedups[mode]) == len(CASES[operator]) else None
        for mode in MODES
    )
    # What fails in one mode fails in the other with the same words.
    return Verdict(operator, dtype, size, tuple(dict.fromkeys(problems)), *slowest)


def _not_served(operator: str, device: str, dtype: str) -> str | None:
    # Under a forced backend what it does not serve falls back, and would prove nothing.
    kind = torch.device(device).type
    return backends.BACKENDS["triton"].why_not(operator, kind, getattr(torch, dtype))


def _problems_of_forms(case: Case) -> list[str]:
    """What is wrong with other forms of a loss, with three teachers, and at other shapes."""
    from mulki.bench.cases import PAIRED
    from mulki.bench.losses import MULKI
    from mulki.bench.outcomes import outcome

    size = proofs.size_of(case.n, case.p)
    others = (OTHER_PAIRED_SHAPES if case.operator in PAIRED else OTHER_SHAPES)[size]
    problems = []
    for n, p, d in ((case.n, case.p, case.d), *others):
        of_shape = [replace(case, n=n, p=p, d=d)]
        if case.operator == "dual_teacher_kl":
            of_shape.append(replace(of_shape[0], operator="teacher_kl_3"))
        for one in of_shape:
            where = f"at {one.shape}"
            if one.operator != case.operator:
                where = f"of three teachers {where}"
            if one != case:
                problems += _problems_of(one, where, partial(outcome, MULKI[one.operator]))
            for form, (ours, plain) in _forms(one).items():
                problems += _problems_of(one, f"{form} {where}", ours, plain)
    return problems


def _problems_of(case: Case, form: str, ours: Compute, plain: Compute | None = None) -> list[str]:
    from mulki.bench.verify import Verifier

    inputs = case.inputs()
    verifier = Verifier(case, inputs, plain)
    try:
        errors = verifier.errors(ours(inputs))
    except torch.OutOfMemoryError:
        raise
    # Whatever else the kernels raise is what is wrong with them.
    except Exception as error:
        return [f"{form}: {type(error).__name__}: {error}".splitlines()[0]]
    return [f"{form}: {problem}" for problem in verifier.problems(errors, strict=True)]


def _forms(case: Case) -> dict[str, tuple[Compute, Compute | None]]:
    """Other forms of the loss of a case, and what each is compared with; None for the case's."""
    from mulki.bench.losses import EAGER, MULKI, TEMPERATURE
    from mulki.bench.outcomes import outcome

    if case.operator == "similarity":
        return {}
    ours = MULKI[case.operator]

    def of_rows(*operands: Any) -> Tensor:
        return ours(*operands, reduction="none").mean()

    forms: dict[str, tuple[Compute, Compute | None]] = {
        "row by row": (partial(outcome, of_rows), None)
    }
    for name, loss in _with_options(case).items():
        compute = partial(outcome, loss)
        forms[name] = compute, compute
    for name, loss in {"": ours, **_with_options(case)}.items():
        compute = partial(_by_products, case, loss)
        forms[f"by-products, {name}" if name else "by-products"] = compute, compute
    if case.operator == "pair_kl":

        def sums(x: Tensor, w: Tensor, scale: Tensor, teachers: Any, target: Tensor) -> Any:
            options = TEMPERATURE, True, None, Weighting.of("uniform"), "sum", True
            return ops.pair_kl.loss((x, w, scale), teachers, *options)

        def with_labels(share: float, *operands: Any) -> Tensor:
            (of_labels, of_teachers), *_ = sums(*operands)
            total: Tensor = (share * of_labels + of_teachers) / len(operands[0])
            return total

        def beside_labels(inputs: Inputs) -> Outcome:
            _, _, weights, entropy = sums(*inputs.arguments)
            return {"weights": weights, "entropy": entropy}

        def plain(share: float, *operands: Any) -> Tensor:
            of_labels: Tensor = EAGER["contrastive"](*operands[:3])
            return share * of_labels + EAGER["pair_kl"](*operands)

        # Of different upstream gradients both losses are computed again.
        for share, form in ((1.0, "with labels"), (0.5, "with labels of half the weight")):
            found, wanted = partial(with_labels, share), partial(plain, share)
            forms[form] = partial(outcome, found), partial(outcome, wanted)
        forms["by-products, with labels"] = beside_labels, beside_labels
    return forms


def _by_products(case: Case, loss: Callable[..., Any], inputs: Inputs) -> Outcome:
    """The losses of rows and, of teachers, what is returned beside them and beside a mean."""
    if not case.teachers:
        return {"losses": loss(*inputs.arguments, reduction="none").detach()}
    found: Outcome = {}
    for reduction, beside in (("none", "the losses"), ("mean", "the mean")):
        losses, details = loss(*inputs.arguments, reduction=reduction, return_details=True)
        found |= {f"{name} beside {beside}": v.detach() for name, v in details._asdict().items()}
        if reduction == "none":
            found["losses"] = losses.detach()
    return found


def _with_options(case: Case) -> dict[str, Loss]:
    """Our loss with options beside those of the case; further ones may be given."""
    from mulki.bench.losses import MULKI, TEMPERATURE

    ours = MULKI[case.operator]
    blend: dict[str, Any] = {"gate": "blend", "gate_entropy": 1.0, "gate_label": 0.5}
    if case.operator == "dual_teacher_kl":
        return {
            "blend gate and class mask": partial(ours, **blend, class_mask=_mask(case)),
            "loss gate": partial(ours, gate="loss"),
        }
    if case.operator == "prototype_cross_entropy":
        ignored = int(_target(case)[0])
        options: dict[str, Any] = {"label_smoothing": 0.1, "class_mask": _mask(case)}
        loss = partial(ours, **options, ignore_index=ignored)
        return {"smoothing, class mask and ignored rows": loss}
    if case.operator == "pair_kl":
        weights = torch.linspace(0.5, 1.5, 2 * case.n, device=case.device).view(2, case.n, 1)

        def two_teachers(
            x: Tensor, w: Tensor, scale: Tensor, teachers: Any, target: Tensor, **options: Any
        ) -> Any:
            ((u, v, s),) = teachers
            others = [Similarity(u, v, s), Similarity(v, u, s)]
            return functional.pair_teacher_kl(
                Similarity(x, w, scale), others, temperature=TEMPERATURE, **blend, **options
            )

        return {
            "weights": partial(ours, weights=weights),
            "two teachers and a blend gate": two_teachers,
        }
    return {}


def _target(case: Case) -> Tensor:
    target: Tensor = case.inputs().arguments[-1]
    return target


def _mask(case: Case) -> Tensor:
    """[P], without every seventh class that no sample has."""
    mask = torch.arange(case.p, device=case.device) % 7 != 0
    mask[_target(case)] = True
    return mask
