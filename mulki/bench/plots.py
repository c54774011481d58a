"""Figures from the lines of a CSV: what every provider reached over the shapes of an operator.

For each operator and dtype: time, throughput, ratio to eager and to torch.compile, and memory. They
are written as PNG and SVG, and on one page.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mulki.bench.machine import setting_line
from mulki.bench.report import Row, by_point, setting_of
from mulki.errors import InputError
from mulki.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mulki.report.plot import Plot

#: What the figures are drawn with, and what their page is made with.
NEEDED = ("matplotlib", "jinja2", "rich", "yaml")

PAGE = "bench.html"

_TEMPLATE = """{% extends "base.html" %}
{% block body %}
<header><h1>{{ title }}</h1><p>{{ setting }}</p>
{%- if left_out %}
<p>Lines of the CSV that are left out, of another machine or version: {{ left_out }}.</p>
{%- endif %}</header>
<main><h2>Operators</h2>
<p>Points are medians over rounds, bars go from the quantile 0.2 to 0.8.</p>
<div class="tabs" aria-label="Operators">
{%- for name, figures in panels %}
<section class="panel"><h3>{{ name }}</h3>
<div class="figures">
{%- for figure in figures %}{% with heading = "h3" %}{% include "figure.html" %}{% endwith %}
{%- endfor %}</div></section>
{%- endfor %}
</div></main>
{% endblock %}
"""


@dataclass(frozen=True)
class _Metric:
    name: str  # in the CSV
    title: str
    unit: str
    text: str
    line: float | None = None  # that is drawn across


_METRICS = (
    _Metric("speed", "Time", "ms", "Milliseconds of a call; less is better."),
    _Metric("throughput", "Throughput", "GFLOP/s", "By the least number of operations."),
    *(
        _Metric(
            f"speedup_over_{name}",
            f"Ratio to {name}",
            "times",
            f"How many times as fast as {who}, round by round.",
            line=1.0,
        )
        for name, who in (("eager", "eager PyTorch"), ("compile", "torch.compile"))
    ),
    _Metric("memory", "Memory", "MiB", "Peak beyond inputs and outputs; less is better."),
)


Providers = Mapping[str, Mapping[str, Row]]  # rows by metric, by provider


def plot(rows: Sequence[Row], folder: str, mode: str = "both") -> list[Path]:
    """Draw the lines of one machine and version, those of the last line; of equal points the last.

    Args:
        rows: of a CSV.
        folder: that the files go to; it is made.
        mode: forward, backward or both.

    Returns:
        The page first.

    Raises:
        InputError: a package is not installed, nothing was timed in this mode, or the folder cannot
            be written.
    """
    _check_packages()
    from mulki.report.pages import render

    timed = [r for r in rows if r["status"] == "timed" and r["kernel_operation_mode"] == mode]
    if not timed:
        raise InputError(
            f"--mode {mode}: nothing was timed in it; pass another mode, or another CSV"
        )
    setting = setting_of(timed[-1])
    of = [row for row in timed if setting_of(row) == setting]
    groups: dict[tuple[str, str], dict[str, Providers]] = {}
    for (operator, shape, dtype, _), providers in by_point(of).items():
        groups.setdefault((operator, dtype), {})[shape] = providers
    names = list(dict.fromkeys(row["kernel_provider"] for row in of))
    figures = {key: list(_figures(key, mode, points, names)) for key, points in groups.items()}
    page = render(
        _TEMPLATE,
        title=f"mulki bench, {mode if mode != 'both' else 'forward and backward'}",
        setting=setting_line(timed[-1]),
        left_out=len(timed) - len(of),
        panels=[(f"{operator}, {dtype}", of) for (operator, dtype), of in figures.items()],
    )
    where = Path(folder)
    try:
        where.mkdir(parents=True, exist_ok=True)
        write_atomic(where / PAGE, page)
        drawn = [path for of_group in figures.values() for f in of_group for path in f.write(where)]
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    return [where / PAGE, *drawn]


def _check_packages() -> None:
    for name in NEEDED:
        try:
            importlib.import_module("matplotlib.figure" if name == "matplotlib" else name)
        except ImportError:
            raise InputError(
                f"plot: {name} is not installed; pip install {name}, or see mulki bench table"
            ) from None


def _figures(
    key: tuple[str, str],
    mode: str,
    points: Mapping[str, Providers],
    names: Sequence[str],
) -> Iterator[Plot]:
    from mulki.report.plot import Plot

    operator, dtype = key
    for metric in _METRICS:
        if any(metric.name in of for each in points.values() for of in each.values()):
            yield Plot(
                re.sub(r"[^a-z0-9_]+", "_", f"{operator}_{dtype}_{mode}_{metric.name}".lower()),
                f"{metric.title}, {operator}, {dtype}",
                metric.text,
                partial(_draw, points=points, names=names, metric=metric),
            )


def _draw(
    axes: Axes, points: Mapping[str, Providers], names: Sequence[str], metric: _Metric
) -> int:
    from mulki.report.plot import DIM, look, plain_log

    shapes = sorted(points, key=lambda shape: [_work(shape), shape])
    if metric.line is not None:
        axes.axhline(metric.line, color=DIM, linewidth=0.8)
    drawn = 0
    for number, name in enumerate(names):
        found = {
            place: _values(points[shape][name][metric.name])
            for place, shape in enumerate(shapes)
            if metric.name in points[shape].get(name, {})
        }
        if not found:
            continue
        middle, low, high = zip(*found.values(), strict=True)
        below = [max(m - v, 0.0) for m, v in zip(middle, low, strict=True)]
        above = [max(v - m, 0.0) for m, v in zip(middle, high, strict=True)]
        colour, dash = look(number)
        axes.errorbar(
            list(found), middle, yerr=(below, above), color=colour, linestyle=dash, marker=".",
            capsize=2, label=name,
        )  # fmt: skip
        drawn += 1
    if metric.name == "memory":
        # Memory may be none at all, which a logarithm does not show.
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_yscale("log")
        plain_log(axes)
    labels = [shape.replace(" x ", "\N{MULTIPLICATION SIGN}") for shape in shapes]
    axes.set_xticks(range(len(shapes)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylabel(metric.unit)
    return drawn


def _work(shape: str) -> int:
    n, p, d = map(int, shape.split(" x "))
    return n * p * d


def _values(row: Row) -> tuple[float, float, float]:
    middle, low, high = (float(row[f"y_value_{q}"]) for q in ("50", "20", "80"))
    return middle, low, high
