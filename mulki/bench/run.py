"""The benchmark from its options to its tables."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from mulki.bench import call_cost, clocks, largest, report
from mulki.bench.cases import DTYPES, MODES, OPERATORS, PAIRED, Case, make_cases, parse_shape
from mulki.bench.machine import describe_machine, setting_line
from mulki.bench.pace import Pace, in_words
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS
from mulki.bench.report import CsvFile, Quantiles, Result
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
    largest: bool = option(False, "search the largest N that fits, and time nothing (GPU)")
    limit: int = option(0, "of --largest: try no N beyond (0: 1048576, of pairs 262144)", low=0)
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
    pace: Pace[Case] = Pace(options.budget)
    cases, options, absent = _plan(options)
    output = CsvFile(options.output) if options.output else None
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        return _run(cases, options, absent, output, pace, say)
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
    if options.largest and options.device == "cpu" and not options.limit:
        raise InputError(
            "--largest: given with --device cpu, wanted a GPU, whose memory ends; or give --limit"
        )
    reasons = {name: PROVIDERS[name].absence(options.device) for name in options.providers}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    here = tuple(name for name in options.providers if name not in absent)
    if not here:
        listed = "; ".join(f"{name} {reason}" for name, reason in absent.items())
        raise InputError(f"--providers: none of them can be timed on {options.device}: {listed}")
    options = replace(options, providers=here)
    defaults = BenchOptions()
    for name in ("shapes", "modes", "seconds", "quick") if options.largest else ():
        if getattr(options, name) != getattr(defaults, name):
            raise InputError(
                f"--{name}: given with --largest, which searches N forward and backward; leave one "
                "of the two out"
            )
    if options.limit and not options.largest:
        raise InputError("--limit: given without --largest, which is all that it ends")
    if 0 < options.limit < largest.START:
        raise InputError(f"--limit: got {options.limit}, wanted {largest.START} or more")
    shapes = None
    if options.shapes != ("all",):
        if options.quick:
            raise InputError("--quick: given beside --shapes; leave one of the two out")
        shapes = [parse_shape(text) for text in dict.fromkeys(options.shapes)]
    if options.largest:
        return largest.cases(options.ops, options.dtypes, options.device), options, absent
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
    pace: Pace[Case],
    say: Say,
) -> int:
    machine = describe_machine(options.device)
    say(setting_line(machine))
    for reason in dict.fromkeys(absent.values()):
        say(f"left out: {', '.join(n for n in absent if absent[n] == reason)}: {reason}")
    measured = _searched(options) if options.largest else _timed(cases, options, say)
    results: list[Result] = []
    for number, case in enumerate(pace.take(cases)):
        left = len(cases) - number
        takes = in_words(pace.left(left, options.seconds * _timings(options)))
        say(
            f"\n{case.operator}, {case.shape}, {case.dtype} "
            f"({number + 1} of {len(cases)}, about {takes} left)"
        )
        try:
            found = measured(case)
        except Exception as error:
            if not says_no_memory(error):
                raise
            notes = (str(error).splitlines()[0],)
            found = [
                Result(case, name, mode, "out of memory", notes)
                for mode in options.modes
                for name in options.providers
            ]
        if output:
            output.add(row for r in found for row in report.rows_of(r, machine))
        for line in (*report.terminal_table(found), *report.remarks(found)):
            say(line)
        results += found
    for line in report.summary(results):
        say(line)
    if pace.left_out:
        points = "; ".join(f"{c.operator} {c.shape} {c.dtype}" for c in pace.left_out)
        count = counted(len(pace.left_out), "point")
        say(f"left out: {count}, beyond --budget {options.budget:g}: {points}")
    failed = {r.provider for r in results if r.status == "failed"}
    return 1 if any(not PROVIDERS[name].peer for name in failed) else 0


def _timed(
    cases: Sequence[Case], options: BenchOptions, say: Say
) -> Callable[[Case], list[Result]]:
    mm = {name: call_cost.product_rate(DTYPES[name], options.device) for name in options.dtypes}
    copy = call_cost.copy_rate(options.device)
    for name, rate in mm.items():
        of_mm, own = rate.torch_mm / 1e9, rate.similarity / 1e9
        say(f"{name}: torch.mm {of_mm:.0f}, prototype_similarity {own:.0f} GFLOP/s")
    say(f"copy: {copy / 1e9:.0f} GB/s, read and written")
    if clocks.has_events(options.device):
        say("every call finds an idle device and none of its data in the second-level cache")
    say(report.LEGEND)
    without_pairs = {c.shape for c in cases if c.n != c.p}
    pairs = [name for name in options.ops if name in PAIRED]
    if options.shapes != ("all",) and without_pairs and pairs:
        left_out = ", ".join(sorted(without_pairs))
        say(f"{' and '.join(pairs)} take N = P, so these shapes are left out: {left_out}")

    def measured(case: Case) -> list[Result]:
        found = measure_case(case, options.providers, options.modes, options.seconds)
        return [_with_shares(r, mm[case.dtype], copy) for r in found]

    return measured


def _searched(options: BenchOptions) -> Callable[[Case], list[Result]]:
    return lambda case: largest.search(case, options.providers, options.limit)


def _with_shares(result: Result, rates: call_cost.ProductRates, copy: float) -> Result:
    """Add the shares of plain products and of a copy, where the result has a throughput."""
    if "throughput" not in result.metrics:
        return result
    reached, case = result.metrics["throughput"], result.case
    # So many operations would be made while a copy of the least bytes runs.
    of_copy = copy * case.operations(result.mode) / case.least_bytes(result.mode)
    of = {
        "share_of_torch_mm": rates.torch_mm,
        "share_of_best_product": rates.best,
        "share_of_copy": of_copy,
    }
    shares = {name: Quantiles(*(1e9 * q / rate for q in reached)) for name, rate in of.items()}
    return replace(result, metrics=result.metrics | shares)
