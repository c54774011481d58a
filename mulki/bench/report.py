"""What the benchmark shows and stores: a table per case, a CSV of all, and Markdown from that.

The CSV has a line per metric in the columns of Liger-Kernel's benchmark data (its `liger_version`
is `mulki_version` here), and further columns for the machine. Times are those of the median and of
the quantiles 0.2 and 0.8; a metric that has one value alone repeats it.

=========================  ===========  ===========================================================
``speed``                  ms           of one call
``speedup_over_eager``     times        eager's time over this one, round by round
``speedup_over_compile``   times        the same with torch.compile
``speedup_over_products``  times        the same with the least products alone
``throughput``             GFLOP/s      least operations over time
``memory``                 MiB          allocated at the peak, beyond inputs and outputs
``resident_memory``        MiB          growth of the process, beyond outputs (Linux)
``gradient_error``         relative L2  worst gradient against float64
=========================  ===========  ===========================================================

``speed`` on a GPU is from an idle device to the end of the call, launches included. A provider
that forms its gradients in the forward pass has neither ratios nor throughput for the backward pass
alone, in which it only scales them. Files of older versions have further metrics.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mulki.bench.cases import MODES, Case
from mulki.bench.machine import setting_line
from mulki.errors import InputError
from mulki.files import append_lines

Row = dict[str, str]
Status = Literal["timed", "failed", "out of memory", "not applicable"]

MEASURES = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
)
MACHINE = (
    "gpu_name",
    "timestamp",
    "mulki_version",
    "torch_version",
    "triton_version",
    "cpu_name",
    "capability",
    "threads",
    "git_commit",
)
COLUMNS = (*MEASURES, *MACHINE, "status", "note")

#: What tells two runs apart whose numbers must not stand in one table.
_SETTING = tuple(name for name in MACHINE if name != "timestamp")

REFERENCES = ("eager", "compile", "products")
_UNITS = {
    "speed": "ms",
    **{f"speedup_over_{name}": "times" for name in REFERENCES},
    "throughput": "GFLOP/s",
    "memory": "MiB",
    "resident_memory": "MiB",
    "gradient_error": "relative L2",
}


class Quantiles(NamedTuple):
    """Of a metric over the rounds."""

    median: float
    low: float  # 0.2
    high: float  # 0.8

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """The quantiles of a sample."""
        return cls(*(float(q) for q in np.quantile(values, (0.5, 0.2, 0.8))))

    @classmethod
    def same(cls, value: float) -> Quantiles:
        """Of a metric that has one value."""
        return cls(value, value, value)


@dataclass(frozen=True)
class Result:
    """One provider at one case in one mode."""

    case: Case
    provider: str
    mode: str
    status: Status
    notes: tuple[str, ...] = ()
    rounds: int = 0
    metrics: dict[str, Quantiles] = field(default_factory=dict)


def rows_of(result: Result, machine: Mapping[str, str]) -> Iterator[Row]:
    """The lines of a result, one per metric; one without values if it was not timed."""
    case = result.case
    config = {
        "P": case.p,
        "D": case.d,
        "dtype": case.dtype,
        "device": case.device,
        "teachers": case.teachers,
        "rounds": result.rounds,
        "least_operations": case.operations(result.mode),
    }
    shared = {
        "kernel_name": case.operator,
        "kernel_provider": result.provider,
        "kernel_operation_mode": result.mode,
        "x_name": "N",
        "x_label": "samples",
        "x_value": str(case.n),
        "extra_benchmark_config_str": json.dumps(config),
        "status": result.status,
        "note": "; ".join(result.notes),
        **machine,
    }
    metrics: Mapping[str, Quantiles | None] = result.metrics or {"speed": None}
    for name, values in metrics.items():
        numbers = [f"{value:.6g}" for value in values or ()] or ["", "", ""]
        keys = ("y_value_50", "y_value_20", "y_value_80")
        metric = {"metric_name": name, "metric_unit": _UNITS[name]}
        yield shared | metric | dict(zip(keys, numbers, strict=True))


class CsvFile:
    """A CSV that grows by whole lines, so that an interrupted run leaves what it had measured.

    Raises:
        InputError: the file cannot be written, or is another kind of CSV.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        if self._path.exists() and self._path.stat().st_size:
            read_rows(path)
            self.add([])
        else:
            self.add([dict(zip(COLUMNS, COLUMNS, strict=True))])

    def add(self, rows: Iterable[Row]) -> None:
        """Append lines."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, COLUMNS).writerows(rows)
        try:
            append_lines(self._path, text.getvalue())
        except OSError as error:
            raise InputError(
                f"--output {self._path}: {error.strerror}; name a file in a folder that exists"
            ) from None


def read_rows(path: str) -> list[Row]:
    """The lines of a CSV of this benchmark.

    Raises:
        InputError: the file cannot be read, or is another kind of CSV.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise InputError(
                    f"{path}: not a CSV of this benchmark; name another file, or make it anew"
                )
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: {reason}; pass the CSV of mulki bench --output") from None
    for number, row in enumerate(rows, start=2):
        try:
            config = json.loads(row["extra_benchmark_config_str"])
            if not {"P", "D", "dtype"} <= config.keys() or None in row.values():
                raise ValueError
            numbers = [row[f"y_value_{part}"] for part in (20, 50, 80)]
            if row["status"] == "timed" or any(numbers):
                _ = [float(number) for number in numbers], int(row["x_value"])
                _ = int(config["P"]), int(config["D"])
        except (ValueError, TypeError, AttributeError):
            raise InputError(f"{path}, line {number}: damaged; remove the line") from None
    return rows


LEGEND = (
    "\N{PLUS-MINUS SIGN}: half of what lies between the quantiles 0.2 and 0.8, of the median; "
    "eager and the like: their time over this one's, median over rounds; products: time of the "
    "least matrix products alone, over this one's; MiB: peak beyond inputs and outputs; error: "
    "worst gradient, relative L2 against float64"
)

#: What a line of the terminal holds.
WIDTH = 80


def terminal_table(results: Sequence[Result]) -> list[str]:
    """The timed results of one case, in lines of at most 80 characters; columns that would be
    empty are left out.
    """
    lines = [["", "ms", "\N{PLUS-MINUS SIGN}", *REFERENCES, "GFLOP/s", "MiB", "error"]]
    last = ""
    for r in results:
        if r.status != "timed":
            continue
        if r.mode != last:
            lines.append([r.mode, *[""] * (len(lines[0]) - 1)])
            last = r.mode
        speed = r.metrics["speed"]
        spread = (speed.high - speed.low) / 2 / speed.median if speed.median else 0.0
        cells = [
            f"  {r.provider}",
            _digits(speed.median),
            f"{spread:.0%}",
            *(_shown(r.metrics, f"speedup_over_{name}", ".2f") for name in REFERENCES),
            _shown(r.metrics, "throughput", ".0f"),
            _shown(r.metrics, "memory", ".1f"),
            _shown(r.metrics, "gradient_error", ".0e"),
        ]
        lines.append(cells)
    columns = [c for c in zip(*lines, strict=True) if any(cell not in ("-", "") for cell in c[1:])]
    aligned = [_aligned(column, left=not i) for i, column in enumerate(columns)]
    wide = sum(len(column[0]) + 2 for column in aligned) - 2 > WIDTH
    gap = " " if wide else "  "
    return [gap.join(cells).rstrip() for cells in zip(*aligned, strict=True)]


def summary(results: Sequence[Result]) -> list[str]:
    """Mulki's speed over eager's by operator and mode, of all cases; empty for a single case."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for r in results:
        if r.provider == "mulki" and (found := r.metrics.get("speedup_over_eager")):
            ratios.setdefault(r.case.operator, {}).setdefault(r.mode, []).append(found.median)
    modes = [mode for mode in MODES if any(mode in of for of in ratios.values())]
    if not modes or len({r.case for r in results}) < 2:
        return []
    lines = [["", *modes]]
    for operator, of in ratios.items():
        cells = [f"{np.median(of[mode]):.2f}" if mode in of else "-" for mode in modes]
        lines.append([operator, *cells])
    columns = [_aligned(c, left=not i) for i, c in enumerate(zip(*lines, strict=True))]
    title = "\neager's time over mulki's, the median over shapes and dtypes"
    return [title, *("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))]


def _aligned(column: Sequence[str], left: bool) -> list[str]:
    width = max(map(len, column))
    return [cell.ljust(width) if left else cell.rjust(width) for cell in column]


def remarks(results: Sequence[Result]) -> list[str]:
    """What is to be said of providers besides numbers, a line for each remark."""
    of: dict[str, dict[str, None]] = {}
    for r in results:
        status = "" if r.status == "timed" else f"{r.status}: "
        for note in r.notes:
            of.setdefault(status + note, {})[r.provider] = None
    return [f"{', '.join(providers)}: {words}" for words, providers in of.items()]


def _shown(metrics: Mapping[str, Quantiles], name: str, form: str) -> str:
    return format(metrics[name].median, form) if name in metrics else "-"


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"


def markdown(rows: Sequence[Row]) -> str:
    """Tables from the lines of a CSV, one for each machine and version; of equal points the last.

    A column per provider holds its milliseconds; the last columns are about mulki. A star marks
    the backward pass of a provider that had formed its gradients before.
    """
    parts = []
    for setting in dict.fromkeys(map(setting_of, rows)):
        table = list(_table([row for row in rows if setting_of(row) == setting]))
        parts += [setting_line(dict(zip(_SETTING, setting, strict=True))), "", *table, ""]
        if any("* |" in line for line in table):
            parts += ["\\* gradients were formed in the forward pass; compare `both`", ""]
    return "\n".join(parts)


def setting_of(row: Row) -> tuple[str, ...]:
    """Machine and versions of a line."""
    return tuple(row[name] for name in _SETTING)


def by_point(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, dict[str, Row]]]:
    """Lines by operator, shape, dtype and mode, then by provider, then by metric.

    Those of the last run that had a point and provider stand for all.
    """
    points: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        config = json.loads(row["extra_benchmark_config_str"])
        shape = f"{row['x_value']} x {config['P']} x {config['D']}"
        point = (row["kernel_name"], shape, config["dtype"], row["kernel_operation_mode"])
        of = points.setdefault(point, {})
        metrics = of.get(row["kernel_provider"], {})
        if any(other["timestamp"] != row["timestamp"] for other in metrics.values()):
            metrics = {}
        of[row["kernel_provider"]] = metrics | {row["metric_name"]: row}
    return points


def _table(rows: Sequence[Row]) -> Iterator[str]:
    points = by_point(rows)
    providers = list(dict.fromkeys(row["kernel_provider"] for row in rows))
    header = ["operator", "N x P x D", "dtype", "mode", *(f"{p}, ms" for p in providers)]
    about = (*(f"over {name}" for name in REFERENCES), "extra MiB", "eager's extra MiB")
    yield _line([*header, *about])
    yield _line(["---"] * 4 + ["---:"] * (len(providers) + len(about)))
    for words, of in points.items():
        mulki = of.get("mulki", {})
        yield _line(
            [
                *words,
                *(_cell(of.get(p, {}), "speed", _digits) + _star(of.get(p, {})) for p in providers),
                *(_cell(mulki, f"speedup_over_{r}", "{:.2f}x".format) for r in REFERENCES),
                *(_cell(of.get(p, {}), "memory", "{:.1f}".format) for p in ("mulki", "eager")),
            ]
        )


def _cell(metrics: Mapping[str, Row], name: str, form: Callable[[float], str]) -> str:
    if name not in metrics:
        return "-"
    row = metrics[name]
    if row["y_value_50"]:
        return form(float(row["y_value_50"]))
    return row["status"] if row["status"] in ("failed", "out of memory") else "-"


def _star(metrics: Mapping[str, Row]) -> str:
    timed = "speed" in metrics and metrics["speed"]["status"] == "timed"
    return "*" if timed and "throughput" not in metrics else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
