"""The benchmark from its options to its tables: verify, then time, then measure memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import torch
from rich.console import Console

from mulki import __version__
from mulki.bench import measure, report
from mulki.bench.cases import (
    DTYPES,
    MODES,
    OPERATORS,
    PAIRED,
    Case,
    Inputs,
    make_cases,
    parse_shape,
)
from mulki.bench.providers import PROVIDERS, Loss
from mulki.bench.report import REFERENCES, CsvFile, Quantiles, Result, Status
from mulki.bench.verify import Verifier, outcome, worst_gradient
from mulki.errors import InputError, nearest
from mulki.options import check_options, option
from mulki.results import environment

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class BenchOptions:
    """What is run; every field is an option of ``mulki bench``."""

    ops: tuple[str, ...] = option(tuple(OPERATORS), "the operators")
    shapes: tuple[str, ...] = option(
        ("all",), "NxP or NxPxD, as 1024x1000x512, or all; D is 512 where it is left out"
    )
    dtypes: tuple[str, ...] = option(
        ("float32", "bfloat16"), f"of {', '.join(DTYPES)} (also fp32, bf16, fp16)"
    )
    modes: tuple[str, ...] = option(MODES, "forward (without autograd), backward (alone), both")
    providers: tuple[str, ...] = option(tuple(PROVIDERS), "what computes the operators")
    quick: bool = option(False, "a few small shapes")
    threads: int = option(0, "CPU threads; 0 for those torch takes", low=0)
    seconds: float = option(1.0, "how long a provider is timed per case and mode", above=0)
    device: str = option("cpu", "cpu, cuda, cuda:1, xpu, ...")
    output: str | None = option(None, "a CSV file to write; one that exists grows")


def run(options: BenchOptions, console: Console) -> int:
    """Measure, print and store.

    Returns:
        The exit status: 0, or 1 if a provider failed at a case.

    Raises:
        InputError: naming the option that cannot be used.
    """
    cases, options = _plan(options)
    output = CsvFile(options.output) if options.output else None
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        return _run(cases, options, output, console)
    finally:
        torch.set_num_threads(before)


def _plan(options: BenchOptions) -> tuple[list[Case], BenchOptions]:
    check_options(options)
    options = replace(
        options,
        ops=_names("ops", options.ops, OPERATORS),
        dtypes=_names("dtypes", [_SHORT.get(name, name) for name in options.dtypes], DTYPES),
        modes=_names("modes", options.modes, MODES),
        providers=_names("providers", options.providers, PROVIDERS),
        device=_device(options.device),
    )
    shapes = None
    if options.shapes != ("all",):
        if options.quick:
            raise InputError("--quick: given beside --shapes; leave one of the two out")
        shapes = [parse_shape(text) for text in dict.fromkeys(options.shapes)]
    cases = make_cases(options.ops, shapes, options.dtypes, options.device, options.quick)
    if not cases:
        raise InputError(
            f"--shapes: got {' '.join(options.shapes)}, wanted one with N = P: "
            f"{' and '.join(options.ops)} take pairs"
        )
    return cases, options


def _device(name: str) -> str:
    here = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return "cpu"
        if here is not None and device.type == here.type:
            torch.empty(0, device=device)
            return name
    except RuntimeError:
        pass
    wanted = "cpu" if here is None else f"cpu or {here.type}"
    raise InputError(f"--device: got {name!r}, wanted {wanted} on this machine")


def _names(name: str, given: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    known = tuple(known)
    for word in given:
        if word not in known:
            raise InputError(
                f"--{name}: got {word}{nearest(word, known)}, wanted of {', '.join(known)}"
            )
    return tuple(dict.fromkeys(given))


def _run(
    cases: Sequence[Case], options: BenchOptions, output: CsvFile | None, console: Console
) -> int:
    machine = describe_machine(options.device)
    _say(console, report.setting_line(machine))
    rates = {name: measure.product_rate(DTYPES[name], options.device) for name in options.dtypes}
    for name, rate in rates.items():
        mm, own = rate.torch_mm / 1e9, rate.similarity / 1e9
        _say(console, f"{name}: torch.mm {mm:.0f}, prototype_similarity {own:.0f} GFLOP/s")
    _say(console, report.LEGEND)
    without_pairs = {c.shape for c in cases if c.n != c.p}
    pairs = [name for name in options.ops if name in PAIRED]
    if options.shapes != ("all",) and without_pairs and pairs:
        left_out = ", ".join(sorted(without_pairs))
        _say(console, f"{' and '.join(pairs)} take N = P, so these shapes are left out: {left_out}")
    results: list[Result] = []
    for case in cases:
        console.rule(f"{case.operator}, {case.shape}, {case.dtype}")
        found = measure_case(case, options.providers, options.modes, options.seconds)
        found = [_with_shares(r, rates[case.dtype]) for r in found]
        if output:
            output.add(row for r in found for row in report.rows_of(r, machine))
        console.print(report.terminal_table(found))
        for line in report.remarks(found):
            _say(console, line)
        results += found
    return 1 if any(r.status == "failed" for r in results) else 0


@dataclass(frozen=True)
class _Checked:
    """What became of a provider when it was verified at a case."""

    status: Status
    notes: tuple[str, ...] = ()
    loss: Loss | None = None  # if it is right
    error: float = 0.0  # of its worst gradient


def measure_case(
    case: Case, providers: Sequence[str], modes: Sequence[str], seconds: float
) -> list[Result]:
    """Verify every provider at a case, and time those that are right, turn by turn.

    Args:
        seconds: how long a provider is timed in a mode.

    Returns:
        A result per mode and provider.
    """
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    checked = {name: _check(case, name, inputs, verifier) for name in providers}
    del verifier
    right = {name: c.loss for name, c in checked.items() if c.loss is not None}
    results = []
    with measure.no_garbage_collection():
        for mode in modes:
            turns = {
                n: functools.partial(_timed, case, n, mode, f, inputs) for n, f in right.items()
            }
            times = measure.take_turns(turns, seconds)
            for name, found in checked.items():
                if found.loss is None:
                    results.append(Result(case, name, mode, found.status, found.notes))
                    continue
                metrics = _metrics(case, name, mode, times)
                if mode != "backward":
                    context = functools.partial(PROVIDERS[name].context, case)
                    memory = measure.extra_memory(mode, found.loss, inputs, case.device, context)
                    metrics |= {key: Quantiles.same(size / 2**20) for key, size in memory.items()}
                metrics["gradient_error"] = Quantiles.same(found.error)
                notes, rounds = _notes(case, name, mode), len(times[name])
                results.append(Result(case, name, mode, "timed", notes, rounds, metrics))
    return results


def _check(case: Case, name: str, inputs: Inputs, verifier: Verifier) -> _Checked:
    provider = PROVIDERS[name]
    reason = provider.refusal(case)
    if reason is not None:
        return _Checked("not applicable", (reason,))
    try:
        loss = provider.make(case)
        with provider.context(case):
            errors = verifier.errors(outcome(loss, inputs))
    # A provider may be anybody's code: whatever it raises is its result at this case.
    except Exception as error:
        return _Checked("failed", (f"{type(error).__name__}: {error}".splitlines()[0],))
    problems = verifier.problems(errors)
    if problems:
        return _Checked("failed", tuple(problems))
    return _Checked("timed", loss=loss, error=worst_gradient(errors))


def _timed(case: Case, name: str, mode: str, loss: Loss, inputs: Inputs) -> float:
    with PROVIDERS[name].context(case):
        return measure.timed(mode, loss, inputs, case.device)


def _metrics(
    case: Case, name: str, mode: str, times: dict[str, list[float]]
) -> dict[str, Quantiles]:
    own = times[name]
    metrics = {"speed": Quantiles.of([1e3 * t for t in own])}
    if _only_scales(case, name, mode):
        return metrics
    for other in REFERENCES:
        if other in times and other != name:
            ratios = [a / b for a, b in zip(times[other], own, strict=True)]
            metrics[f"speedup_over_{other}"] = Quantiles.of(ratios)
    metrics["throughput"] = Quantiles.of([case.operations(mode) / t / 1e9 for t in own])
    return metrics


def _only_scales(case: Case, name: str, mode: str) -> bool:
    return mode == "backward" and PROVIDERS[name].early_gradients(case)


def _notes(case: Case, name: str, mode: str) -> tuple[str, ...]:
    early = "forms gradients in the forward pass, so that backward alone only scales them"
    notes = PROVIDERS[name].note(case), early if _only_scales(case, name, mode) else ""
    return tuple(filter(None, notes))


def _with_shares(result: Result, rates: measure.ProductRates) -> Result:
    """Add the shares of the rates of plain products, where the result has a throughput."""
    if "throughput" not in result.metrics:
        return result
    reached = result.metrics["throughput"]
    of = {"share_of_torch_mm": rates.torch_mm, "share_of_best_product": rates.best}
    shares = {
        name: Quantiles(*(1e9 * q / rate for q in (reached.median, reached.low, reached.high)))
        for name, rate in of.items()
    }
    return replace(result, metrics=result.metrics | shares)


def describe_machine(device: str) -> dict[str, str]:
    """The columns of the CSV that say when, where and with which versions."""
    found = environment()
    commit = found["git_commit"] or ""
    gpu, capability = "", torch.backends.cpu.get_cpu_capability()
    if device != "cpu":
        gpu, capability = torch.get_device_module(device).get_device_name(device), ""
    if torch.device(device).type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {
        "gpu_name": gpu,
        "timestamp": datetime.now().isoformat(timespec="seconds"),
        "mulki_version": __version__,
        "torch_version": torch.__version__,
        "triton_version": str(found["triton"] or ""),
        "cpu_name": str(found["cpu"]),
        "capability": capability,
        "threads": str(torch.get_num_threads()),
        "git_commit": f"{commit}, modified" if found["git_modified"] else str(commit),
    }


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)
