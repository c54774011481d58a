"""Figures from the lines of a CSV: time, rate and memory of every provider over the shapes."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mulki.errors import InputError

from .machine import setting_line
from .report import Row

# Metric, what its axis says, and the factor to its unit.
_PANELS = (
    ("speed", "ms", 1.0),
    ("throughput", "TFLOP/s, by the least operations", 1e-3),
    ("memory", "extra MiB", 1.0),
)
_MODES = ("forward", "both")


def plot(rows: Sequence[Row], folder: str) -> list[Path]:
    """A PNG per operator, dtype and mode, forward or both; of equal points the last counts.

    Raises:
        InputError: matplotlib is not installed, or the folder cannot be written.
    """
    figures = _figures()
    made = []
    where = Path(folder)
    try:
        where.mkdir(parents=True, exist_ok=True)
        for (operator, dtype, mode), of in _groups(rows).items():
            name = re.sub(r"[^a-z0-9_]+", "_", f"{operator}_{dtype}_{mode}".lower())
            path = where / f"{name}.png"
            _draw(figures, f"{operator}, {dtype}, {mode}", of).savefig(path, dpi=120)
            made.append(path)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    return made


def _figures() -> Callable[..., Any]:
    try:
        # The figure alone, so that no display and no global state are involved.
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise InputError(
            "plot: matplotlib is not installed; pip install matplotlib, or see mulki bench table"
        ) from None


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        mode = row["kernel_operation_mode"]
        if row["status"] == "timed" and mode in _MODES:
            key = (row["kernel_name"], _config(row)["dtype"], mode)
            groups.setdefault(key, []).append(row)
    return groups


def _config(row: Row) -> dict[str, Any]:
    return json.loads(row["extra_benchmark_config_str"])


def _shape(row: Row) -> str:
    config = _config(row)
    return f"{row['x_value']}x{config['P']}x{config['D']}"


def _work(row: Row) -> int:
    return _config(row).get("least_operations", 0)


def _draw(figures: Callable[..., Any], title: str, rows: Sequence[Row]) -> Any:
    shapes = list(dict.fromkeys(_shape(row) for row in sorted(rows, key=_work)))
    providers = list(dict.fromkeys(row["kernel_provider"] for row in rows))
    figure = figures(figsize=(5 * len(_PANELS), 4.5), layout="constrained")
    for axes, (metric, unit, factor) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for provider in providers:
            points = {
                shapes.index(_shape(row)): [
                    factor * float(row[f"y_value_{q}"]) for q in ("50", "20", "80")
                ]
                for row in rows
                if row["kernel_provider"] == provider and row["metric_name"] == metric
            }
            if points:
                at = sorted(points)
                middle, low, high = zip(*(points[i] for i in at), strict=True)
                spread = (
                    [m - v for m, v in zip(middle, low, strict=True)],
                    [v - m for m, v in zip(middle, high, strict=True)],
                )
                axes.errorbar(at, middle, yerr=spread, marker="o", capsize=3, label=provider)
        # Memory may be none at all, which a logarithm does not show.
        axes.set_yscale("symlog" if metric == "memory" else "log")
        axes.set_xticks(range(len(shapes)), shapes, rotation=60, ha="right", fontsize=7)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"{title}\n{setting_line(rows[-1])}", fontsize=8)
    return figure
