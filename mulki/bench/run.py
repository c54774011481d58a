"""The benchmark from its options to its tables."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from mulki.bench import report
from mulki.bench.cases import DTYPES, MODES, OPERATORS, PAIRED, Case, make_cases, parse_shape
from mulki.bench.machine import describe_machine, setting_line
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS
from mulki.bench.report import CsvFile, Result
from mulki.choices.options import check_options, option
from mulki.errors import InputError, counted, nearest, says_no_memory

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Say = Callable[[str], None]

#: Of `--quick`, without the time to start: seconds, and providers that take too long to be made.
QUICK_BUDGET = 45.0
_SLOW = ("compile", "mulki-chunked-compiled", "mulki-reference")


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
    providers: tuple[str, ...] = option(
        ("all",), f"what computes the operators: all that are there, or of {', '.join(PROVIDERS)}"
    )
    quick: bool = option(
        False, f"a few small shapes in a minute; all providers are all but {' and '.join(_SLOW)}"
    )
    threads: int = option(0, "CPU threads; 0 for those torch takes", low=0, high=4096)
    seconds: float = option(
        1.0, "how long a provider is timed per case and mode; --quick takes less", above=0
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, xpu, ...")
    budget: float = option(
        0.0,
        "seconds for all; points that do not fit are left out, the last shapes first (0: no limit)",
        low=0,
    )
    output: str | None = option(None, "a CSV file to write; one that exists grows")


def print_wrapped(text: str) -> None:
    """Print a line that may be longer than a terminal is wide."""
    line = text.lstrip("\n")
    lines = [line]
    if len(line) > report.WIDTH:
        wrapper = textwrap.TextWrapper(
            report.WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        lines = wrapper.wrap(line)
    print(text[: len(text) - len(line)] + "\n".join(lines), flush=True)


def run(options: BenchOptions, say: Say = print_wrapped) -> int:
    """Measure, print and store.

    Returns:
        The exit status: 0, or 1 if a provider failed at a case. Peers that fail do not count, nor
        does a lack of memory.

    Raises:
        InputError: naming the option that cannot be used.
    """
    if options.quick and not options.budget:
        options = replace(options, budget=QUICK_BUDGET)
    begin = time.perf_counter()
    cases, options, absent = _plan(options)
    output = CsvFile(options.output) if options.output else None
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        return _run(cases, options, absent, output, begin, say)
    finally:
        torch.set_num_threads(before)


def _plan(options: BenchOptions) -> tuple[list[Case], BenchOptions, dict[str, str]]:
    """The cases, the options with short names spelt out, and why providers are not here."""
    check_options(options)
    providers = options.providers
    if providers == ("all",):
        providers = tuple(n for n in PROVIDERS if not (options.quick and n in _SLOW))
    options = replace(
        options,
        ops=_names("ops", options.ops, OPERATORS),
        dtypes=_names("dtypes", [_SHORT.get(name, name) for name in options.dtypes], DTYPES),
        modes=_names("modes", options.modes, MODES),
        providers=_names("providers", providers, PROVIDERS),
        device=_device(options.device),
    )
    reasons = {name: PROVIDERS[name].absence(options.device) for name in options.providers}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    here = tuple(name for name in options.providers if name not in absent)
    if not here:
        listed = "; ".join(f"{name} {reason}" for name, reason in absent.items())
        raise InputError(f"--providers: none of them can be timed on {options.device}: {listed}")
    options = replace(options, providers=here)
    shapes = None
    if options.shapes != ("all",):
        if options.quick:
            raise InputError("--quick: given beside --shapes; leave one of the two out")
        shapes = [parse_shape(text) for text in dict.fromkeys(options.shapes)]
    cases = make_cases(
        options.ops,
        shapes,
        options.dtypes,
        options.device,
        options.quick,
        by_shape=options.budget > 0,
    )
    if not cases:
        raise InputError(
            f"--shapes: got {' '.join(options.shapes)}, wanted one with N = P: "
            f"{' and '.join(options.ops)} take pairs"
        )
    if options.quick:
        # Half of the time for timing: the other half goes to checks, inputs and memory.
        fits = options.budget / 2 / (len(cases) * _timings(options))
        options = replace(options, seconds=min(options.seconds, fits))
    return cases, options, absent


def _timings(options: BenchOptions) -> int:
    return len(options.modes) * len(options.providers)


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
                f"--{name}: got {word}{nearest(word, known)}, wanted one or more of "
                f"{', '.join(known)}"
            )
    return tuple(dict.fromkeys(given))


def _run(
    cases: Sequence[Case],
    options: BenchOptions,
    absent: dict[str, str],
    output: CsvFile | None,
    begin: float,
    say: Say,
) -> int:
    machine = describe_machine(options.device)
    say(setting_line(machine))
    for reason in dict.fromkeys(absent.values()):
        say(f"left out: {', '.join(n for n in absent if absent[n] == reason)}: {reason}")
    say(report.LEGEND)
    _say_what_is_no_pair(cases, options, say)
    results: list[Result] = []
    first = time.perf_counter()
    each = options.seconds * _timings(options)  # of a case, until one is done
    for number, case in enumerate(cases):
        left, now = len(cases) - number, time.perf_counter()
        if number:
            each = (now - first) / number
        if options.budget and number and now + each > begin + options.budget:
            points = "; ".join(f"{c.operator} {c.shape} {c.dtype}" for c in cases[number:])
            said = f"{counted(left, 'point')}, beyond --budget {options.budget:g}: {points}"
            break
        takes = left * each
        if options.budget:
            takes = min(takes, max(begin + options.budget - now, 0.0))
        say(
            f"\n{case.operator}, {case.shape}, {case.dtype} "
            f"({number + 1} of {len(cases)}, about {_in_words(takes)} left)"
        )
        found = _measured(case, options)
        if output:
            output.add(row for r in found for row in report.rows_of(r, machine))
        for line in (*report.terminal_table(found), *report.remarks(found)):
            say(line)
        results += found
    else:
        said = ""
    for line in report.summary(results):
        say(line)
    if said:
        say(f"left out: {said}")
    failed = {r.provider for r in results if r.status == "failed"}
    return 1 if any(not PROVIDERS[name].peer for name in failed) else 0


def _measured(case: Case, options: BenchOptions) -> list[Result]:
    try:
        return measure_case(case, options.providers, options.modes, options.seconds)
    except Exception as error:
        if not says_no_memory(error):
            raise
        notes = (str(error).splitlines()[0],)
        return [
            Result(case, name, mode, "out of memory", notes)
            for mode in options.modes
            for name in options.providers
        ]


def _say_what_is_no_pair(cases: Sequence[Case], options: BenchOptions, say: Say) -> None:
    without_pairs = {c.shape for c in cases if c.n != c.p}
    pairs = [name for name in options.ops if name in PAIRED]
    if options.shapes != ("all",) and without_pairs and pairs:
        left_out = ", ".join(sorted(without_pairs))
        say(f"{' and '.join(pairs)} take N = P, so these shapes are left out: {left_out}")


def _in_words(seconds: float) -> str:
    """A duration to the precision that an estimate has."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
