"""`mulki prove`: show on this machine's GPUs where the Triton kernels are right, and faster.

They are compared with what serves instead, for that is what is left to decide. A verdict is of an
operator, a kind of numbers and a size of calls. Values and gradients are compared with float64 as
the benchmark does (`mulki.bench.verify`): of the mean, of the losses of single rows, whose
gradients are computed apart, of operands in one memory, and with other options; and so are the
by-products, such as the divergence and the weight of each teacher. Then forward and backward
together are timed by turns, and forward alone, which may be another kernel. `mulki.ops.proofs`
keeps what was found.

Kernels are compiled by several processes (`mulki.app.ahead_of_time`), verdict after verdict. Each
verdict is sought in a process of its own, so that a kernel that breaks the GPU's context, crashes
or hangs costs one. This process alone writes, and it does not touch a GPU.
"""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mulki import functional, ops
from mulki.errors import InputError, counted
from mulki.ops import backends, proofs
from mulki.ops.gates import Weighting
from mulki.ops.proofs import Verdict
from mulki.runs.environment import cores
from mulki.runs.lock import FolderLock
from mulki.similarity import Similarity

if TYPE_CHECKING:
    from mulki.bench.cases import Case, Inputs, Shape
    from mulki.bench.losses import Loss
    from mulki.bench.outcomes import Outcome
    from mulki.bench.verify import Compute

#: The cases of the benchmark that try an operator, those in use first.
CASES = {
    "teacher_kl": ("dual_teacher_kl", "teacher_kl_1", "teacher_kl_3"),
    "prototype_cross_entropy": ("prototype_cross_entropy",),
    "contrastive": ("contrastive",),
    "siglip": ("siglip",),
    "pair_kl": ("pair_kl",),
    "similarity": ("similarity",),
}
#: How numbers are multiplied (`proofs.numbers_of`), the most used first, and sizes, those of
#: training first. float32 is proven both ways.
NUMBERS = ("bfloat16", "float16", "float32", "tf32")
SIZES = ("medium", "large", "small")
#: N, P and D that are tried. The first of each size is timed. The others fill no tile, and the
#: kernels take other schedules for them: whole rows, and stored logits in one block or in several.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": ((64, 100, 512), (50, 37, 650), (60, 1100, 650)),
    "medium": (
        *((1024, 1000, 512), (700, 1531, 770)),
        *((16000, 60, 256), (64, 60000, 136), (64, 65000, 132)),
    ),
    "large": (
        *((8192, 4096, 512), (1500, 16000, 700), (500, 150000, 512)),
        *((160000, 30, 256), (300, 21841, 512), (512, 20000, 512), (5000, 1000, 132)),
    ),
}
#: Those of pairs, P = N. Of the last the logits are made twice.
PAIRED_SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": ((256, 256, 512), (75, 75, 650)),
    "medium": ((1024, 1024, 512), (700, 700, 770)),
    "large": ((4096, 4096, 512), (4700, 4700, 640)),
}
#: At so many of the shapes the other cases of an operator are tried too.
OF_OTHERS = 2
MODES = ("both", "forward")  # a verdict has their speeds in this order
#: Each has a copy of what it imports, and a core.
MOST_COMPILERS = 32
#: Calls before the one that is compared: what the third does, later ones do (`mulki.ops.prepared`).
#: The interpreter takes its time, and compares the first.
FIRST_CALLS = {"cpu": 0}
SECONDS = 0.1  # that a case is timed, in a mode and by one of the two
#: In which a verdict is found. A kernel may wait for ever.
LONGEST = 300.0


class Job(NamedTuple):
    """A verdict that is sought."""

    operator: str
    numbers: str
    size: str
    shapes: tuple[Shape, ...]

    @property
    def place(self) -> str:
        return Verdict(*self[:3]).place

    @property
    def dtype(self) -> str:
        return "float32" if self.numbers == "tf32" else self.numbers

    def cases(self, device: str) -> list[Case]:
        """The operator's first case at all shapes, then the others at few of them."""
        from mulki.bench.cases import Case

        first, *others = CASES[self.operator]
        tried = [(first, shape) for shape in self.shapes]
        tried += [(name, shape) for name in others for shape in self.shapes[:OF_OTHERS]]
        return [Case(name, *shape, self.dtype, device) for name, shape in tried]


def jobs() -> list[Job]:
    """All that a proof has, in the order in which it is sought."""
    from mulki.bench.cases import PAIRED

    return [
        Job(operator, numbers, size, (PAIRED_SHAPES if operator in PAIRED else SHAPES)[size])
        for numbers in NUMBERS
        for size in SIZES
        for operator in CASES
    ]


def prove(
    cards: Mapping[str, torch.device], again: bool = False, wanted: Sequence[Job] | None = None
) -> Iterator[Verdict]:
    """The verdicts that are not stored yet, as they are found; each is stored at once.

    Args:
        cards: as of `proofs.cards`.
        again: seek those too that are stored.
        wanted: None for `jobs`.

    Raises:
        InputError: another process is proving, or a folder cannot be written.
    """
    folder = _check_folders(of_triton=any(card.type != "cpu" for card in cards.values()))
    try:
        lock = FolderLock(folder)
    except InputError:
        raise InputError(
            f"{folder}: another `mulki prove` writes there; wait for its end"
        ) from None
    try:
        for gpu, card in cards.items():
            subject = proofs.subject_of(gpu)
            known = {} if again else proofs.stored(subject) or {}
            todo = [job for job in (wanted or jobs()) if job.place not in known]
            for verdict in _found(todo, card):
                proofs.store(subject, [verdict])
                yield verdict
    finally:
        lock.release()


def report(
    device: str | None = None,
    again: bool = False,
    limit: float | None = None,
    wanted: Sequence[Job] | None = None,
) -> int:
    """Print the verdicts as they are found; the exit status, 1 where something is wrong.

    Args:
        device: "cuda" or "xpu" for every kind of GPU here, or one of them, as "cuda:1"; "cpu" tries
            the kernels in Triton's interpreter. None for what is here.
        again, wanted: as of `prove`.
        limit: seconds after which no other verdict is sought.

    Raises:
        InputError: there is no such device, or the kernels do not load; see `prove`.
    """
    cards = _cards(device or ("xpu" if torch.xpu.is_available() else "cuda"))
    print("times the speed of what serves instead, with gradients and without, and what is wrong")
    wrong, stop = 0, None if limit is None else time.monotonic() + limit
    for verdict in prove(cards, again, wanted):
        speedups = verdict.speedup, verdict.forward_speedup
        speed = " ".join("    -" if one is None else f"{one:5.2f}" for one in speedups)
        untried = "no memory to try it" if verdict.speedup is None else "right"
        words = verdict.failure and f"did not run: {verdict.failure}"
        words = words or "; ".join(verdict.problems) or untried
        place = f"{verdict.operator:<24} {verdict.numbers:<9} {verdict.size:<7}"
        print(f"{place} {speed}  {words}", flush=True)
        wrong += bool(verdict.problems or verdict.failure)
        if stop is not None and time.monotonic() > stop:
            print("left out: what is not there yet, out of time")
            break
    for gpu in cards:
        print(counts(gpu, wanted or jobs()))
    print(f"kept in {proofs.folder()}; the kernels serve where they are right and faster")
    return int(wrong > 0)


def _cards(device: str) -> dict[str, torch.device]:
    """Those of the device on which the kernels run."""
    try:
        found = proofs.cards(device) or {device: torch.device(device)}
    except (AssertionError, RuntimeError) as error:  # torch raises either
        raise InputError(
            f"--device: got {device!r}, wanted cuda, xpu or one GPU of these, as cuda:0 "
            f"({str(error).splitlines()[0]})"
        ) from None
    reasons = {
        gpu: backends.BACKENDS["triton"].why_not("similarity", str(card), torch.float32)
        for gpu, card in found.items()
    }
    refused = [f"{gpu}: {reason}" for gpu, reason in reasons.items() if reason is not None]
    if len(refused) == len(found):
        raise InputError(f"--device: the Triton kernels do not run here; {'; '.join(refused)}")
    for words in refused:
        print(f"left out: {words}")
    return {gpu: card for gpu, card in found.items() if reasons[gpu] is None}


def counts(gpu: str, wanted: Sequence[Job]) -> str:
    """How many verdicts of a kind of GPU there are."""
    found = proofs.stored(proofs.subject_of(gpu)) or {}
    there = [found[job.place] for job in wanted if job.place in found]
    serve = sum(verdict.why_not(True) is None for verdict in there)
    text = f"{len(there)} of {counted(len(wanted), 'verdict')} are there of {gpu}"
    left = "; the others: `mulki prove`" if len(there) < len(wanted) else ""
    return f"{text}, and the kernels serve at {serve} of these places in training{left}"


def _check_folders(of_triton: bool) -> Path:
    """The folder of the proofs, if that and Triton's can be written."""
    folder = proofs.folder()
    folders = {"MULKI_CACHE_DIR": folder}
    if of_triton:
        from triton import knobs

        folders["TRITON_CACHE_DIR"] = Path(knobs.cache.dir)
    for variable, each in folders.items():
        try:
            each.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=each):
                pass
        except OSError as error:
            raise InputError(
                f"{each}: cannot be written ({error.strerror}); set {variable} to a folder that can"
            ) from None
    return folder


# --- processes


def _found(todo: Sequence[Job], card: torch.device) -> Iterator[Verdict]:
    """The verdicts in their order, each behind the processes that compile for it."""
    gpu: Any = _Child(_gpu, str(card)).result() if todo and card.type != "cpu" else None
    # Ctrl-C ends a compiler, which would go on with what is next.
    ends = signal.signal, (signal.SIGINT, signal.SIG_DFL)
    # A core is left to the process that measures.
    compilers = max(1, min(cores() - 1, MOST_COMPILERS))
    with ProcessPoolExecutor(compilers, _context(), *ends) as pool:
        # Where that has failed, and behind a compiler that has crashed, the verdicts compile.
        compiled = {
            job: [pool.submit(_compile, job, case, *gpu) for case in job.cases("meta") if gpu]
            for job in todo
        }
        try:
            for job in todo:
                futures.wait(compiled[job], timeout=LONGEST)
                child = _Child(verdict_of, job, str(card))
                yield child.result() or Verdict(*job[:3], failure=child.end)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _context() -> Any:
    """Starts processes: forks of one that has imported all they need, where there are forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    needed = ["app.prove", "app.ahead_of_time", "bench.calls", "bench.verify"]
    needed += [f"kernels.{operator}" for operator in CASES]
    context.set_forkserver_preload([f"mulki.{name}" for name in needed])
    return context


class _Child:
    """A function of a module, in a process of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        context = _context()
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_send, args=(sender, function, args), daemon=True)
        self._process.start()
        sender.close()

    def result(self) -> Any:
        """What the function has returned; None where it did not, and `end` says why."""
        self.end = f"it did not end within {LONGEST:.0f} seconds"
        try:
            return self._receiver.recv() if self._receiver.poll(LONGEST) else None
        except EOFError:
            self._process.join()
            self.end = f"its process ended with exit status {self._process.exitcode}"
            return None
        finally:
            self._process.kill()


def _send(sender: Connection, function: Callable[..., Any], args: Any) -> None:
    with suppress(KeyboardInterrupt):
        sender.send(function(*args))


def _gpu(device: str) -> tuple[str, Any]:
    """The architecture of a GPU, and what Triton compiles for there."""
    from triton.runtime import driver

    from mulki.kernels import common
    from mulki.ops import prepared

    with prepared.current_device(torch.device(device)):
        return common.architecture(torch.device(device)), driver.active.get_current_target()


def _compile(job: Job, case: Case, architecture: str, target: Any) -> None:
    from mulki.app.ahead_of_time import compile_launched, launches_of

    inputs = case.inputs()
    # What does not compile fails again where it is launched.
    with suppress(Exception), _multiplying(job.numbers):
        calls = [partial(ours, inputs) for ours, _ in _forms(job, case, inputs).values()]
        compile_launched(launches_of(calls, architecture), target)


# --- one verdict


def verdict_of(job: Job, device: str) -> Verdict:
    """The verdict, found in this process."""
    from mulki.bench.providers import setting

    card, dtype = torch.device(device), getattr(torch, job.dtype)
    # What a backend that was asked for does not serve falls back, and would prove nothing.
    reason = backends.BACKENDS["triton"].why_not(job.operator, device, dtype)
    if reason is not None:
        return Verdict(*job[:3], failure=reason)
    try:
        if card.index is not None:
            torch.accelerator.set_device_index(card.index)
        with _multiplying(job.numbers), setting(MULKI_BACKEND="triton"):
            return _tried(job, card.type)
    except torch.OutOfMemoryError:
        # What serves instead needs more than the GPU has, or the comparison in float64 does.
        return Verdict(*job[:3])
    # Whatever else the kernels raise is why they did not run.
    except Exception as error:
        return Verdict(*job[:3], failure=f"{type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def _multiplying(numbers: str) -> Iterator[None]:
    """float32 is multiplied as such, or as tf32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if numbers == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _tried(job: Job, device: str) -> Verdict:
    problems: list[str] = []
    speedups: list[tuple[float, ...]] = []
    for case in job.cases(device):
        inputs = case.inputs()
        problems += _problems(job, case, inputs)
        if _is_timed(job, case):
            speedups.append(tuple(_speedups(case, inputs)))
    return Verdict(*job[:3], tuple(problems), *map(min, zip(*speedups, strict=True)))


def _problems(job: Job, case: Case, inputs: Inputs) -> Iterator[str]:
    """What is wrong, in words."""
    from mulki.bench.verify import Verifier

    verifiers: dict[Compute | None, Verifier] = {}
    for form, (ours, plain) in _forms(job, case, inputs).items():
        if plain not in verifiers:
            verifiers[plain] = Verifier(case, inputs, plain)
        for _ in range(FIRST_CALLS.get(case.device, 2)):
            ours(inputs)
        errors = verifiers[plain].errors(ours(inputs))
        for problem in verifiers[plain].problems(errors, strict=True):
            yield f"{form} at {case.shape}: {problem}"


def _is_timed(job: Job, case: Case) -> bool:
    return (case.n, case.p, case.d) == job.shapes[0]


def _speedups(case: Case, inputs: Inputs) -> Iterator[float]:
    """Over what serves instead, in each of MODES."""
    from mulki.bench import call_cost
    from mulki.bench.calls import calls_of
    from mulki.bench.providers import PROVIDERS

    instead = "mulki-chunked"  # serves where the Triton kernels do not, on every device
    calls = {name: calls_of(PROVIDERS[name], case, inputs) for name in (instead, "mulki")}
    calls[instead].outcome()  # once off the clock, as the kernels were
    with call_cost.no_garbage_collection():
        for mode in MODES:
            turns = {name: partial(of.seconds, mode, False) for name, of in calls.items()}
            times = call_cost.take_turns(turns, SECONDS)
            ratios = zip(times[instead], times["mulki"], strict=True)
            yield statistics.median(theirs / ours for theirs, ours in ratios)


def _forms(job: Job, case: Case, inputs: Inputs) -> dict[str, tuple[Compute, Compute | None]]:
    """What is computed of a case, and what each is compared with; None for the case in float64."""
    from mulki.bench.losses import EAGER, MULKI, TEMPERATURE
    from mulki.bench.outcomes import outcome

    ours = MULKI[case.operator]
    forms: dict[str, tuple[Compute, Compute | None]] = {}
    forms[case.operator] = partial(outcome, ours), None
    is_first = case.operator == CASES[job.operator][0]
    if case.operator == "similarity" or not (is_first and _is_timed(job, case)):
        return forms

    def of_rows(*operands: Any) -> Tensor:
        return ours(*operands, reduction="none").mean()

    forms["row by row"] = partial(outcome, of_rows), None
    if case.teachers:

        def in_one_memory(x: Tensor, w: Tensor, scale: Tensor, teachers: Any, *rest: Any) -> Tensor:
            of_teachers, scales = [of[:2] for of in teachers], [of[2] for of in teachers]
            xs, ws = (torch.stack(operands) for operands in zip((x, w), *of_teachers, strict=True))
            moved = tuple(zip(xs[1:].detach(), ws[1:].detach(), scales, strict=True))
            return ours(xs[0], ws[0], scale, moved, *rest)

        forms["in one memory"] = partial(outcome, in_one_memory), None
    with_options = _with_options(case, inputs)
    for name, loss in with_options.items():
        compute = partial(outcome, loss)
        forms[name] = compute, compute
    for name, loss in {"": ours, **with_options}.items():
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
            return share * EAGER["contrastive"](*operands[:3]) + EAGER["pair_kl"](*operands)

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


def _with_options(case: Case, inputs: Inputs) -> dict[str, Loss]:
    """Our loss with options beside those of the case; further ones may be given."""
    from mulki.bench.losses import MULKI, TEMPERATURE

    ours = MULKI[case.operator]
    blend: dict[str, Any] = {"gate": "blend", "gate_entropy": 1.0, "gate_label": 0.5}
    target: Tensor = inputs.arguments[-1]
    if case.operator == "dual_teacher_kl":
        return {
            "blend gate and class mask": partial(ours, **blend, class_mask=_mask(case, target)),
            "loss gate": partial(ours, gate="loss"),
        }
    if case.operator == "prototype_cross_entropy":
        # One that is there; where values are not, any number.
        ignored = 0 if case.device == "meta" else int(target[0])
        options: dict[str, Any] = {"label_smoothing": 0.1, "class_mask": _mask(case, target)}
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


def _mask(case: Case, target: Tensor) -> Tensor:
    """[P], without every seventh class that no sample has."""
    mask = torch.arange(case.p, device=case.device) % 7 != 0
    mask[target] = True
    return mask
