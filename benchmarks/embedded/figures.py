"""Learning curves of the comparison as SVG and PNG, from the lines of its results.

    python -m benchmarks.embedded.compare figures

For orders I and II, after each task: the accuracy over the tasks learned so far, and what is gained
or lost of the zero-shot accuracy over the tasks that come later. Lines are means over seeds, bands
their 95 % intervals.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mulki.errors import InputError
from mulki.runs.intervals import mean_interval

# Of Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")
_PANELS = (
    ("tasks learned so far:\naccuracy, %", "learned"),
    ("tasks not learned yet:\naccuracy less zero-shot, points", "later"),
)


def curves(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """The two curves of a run.

    Args:
        result: a line of the results; its matrix [T, T] is in percent.

    Returns:
        "learned" [T]: after task i the mean accuracy over tasks 1..i. "later" [T - 1]: after task i
        the mean over tasks i+1..T of accuracy less zero-shot accuracy.
    """
    matrix, zero_shot = np.array(result["matrix"]), np.array(result["zero_shot"])
    count = len(matrix)
    return {
        "learned": [float(matrix[i, : i + 1].mean()) for i in range(count)],
        "later": [
            float((matrix[i, i + 1 :] - zero_shot[i + 1 :]).mean()) for i in range(count - 1)
        ],
    }


def draw(
    scenes: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], folder: Path
) -> list[Path]:
    """Draw the curves.

    Args:
        scenes: by title, by row of the comparison, the lines of its runs.
        folder: where ``learning-curves.svg`` and ``.png`` go.

    Raises:
        InputError: matplotlib is not installed, or there are no runs.
    """
    if not any(runs for rows in scenes.values() for runs in rows.values()):
        raise InputError("figures: no runs of the comparison; run the study compare first")
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise InputError("figures: matplotlib is not installed; pip install matplotlib") from None
    figure = figure_class(figsize=(5 * len(scenes), 7), layout="constrained")
    axes = figure.subplots(len(_PANELS), len(scenes), squeeze=False, sharey="row")
    names = list(dict.fromkeys(name for rows in scenes.values() for name in rows))
    colours = dict(zip(names, _COLOURS, strict=False))
    for column, (title, rows) in enumerate(scenes.items()):
        for row, (label, curve) in enumerate(_PANELS):
            ax = axes[row][column]
            for name, runs in rows.items():
                if runs:
                    _curve(ax, name, colours[name], [curves(run)[curve] for run in runs])
            if row == 0:
                ax.set_title(title)
            if column == 0:
                ax.set_ylabel(label)
            if curve == "later":
                ax.axhline(0, color="grey", linewidth=0.8)
            ax.set_xlabel("tasks learned")
            ax.set_xticks(
                range(1, 1 + max(map(len, (line.get_xdata() for line in ax.get_lines()))))
            )
            ax.grid(alpha=0.3)
    axes[0][0].legend()
    paths = [folder / f"learning-curves.{suffix}" for suffix in ("svg", "png")]
    # Without a date, and with names that do not change, the same results give the same file.
    with importlib.import_module("matplotlib").rc_context({"svg.hashsalt": "mulki"}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=110, metadata=metadata)
    return paths


def _curve(ax: Any, name: str, colour: str, runs: Sequence[Sequence[float]]) -> None:
    steps = range(1, len(runs[0]) + 1)
    intervals = [mean_interval([run[i] for run in runs]) for i in range(len(runs[0]))]
    middle = np.array([mean for mean, _ in intervals])
    half = np.array([half or 0.0 for _, half in intervals])
    ax.plot(steps, middle, label=name, color=colour, marker="o", markersize=3)
    ax.fill_between(steps, middle - half, middle + half, color=colour, alpha=0.15, linewidth=0)
