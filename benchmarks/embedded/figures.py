"""Learning curves of the comparison as SVG and PNG, from the lines of its results.

    python -m benchmarks.embedded.compare figures

After each task, mean over the orders and seeds: the accuracy over the tasks learned so far, and
what is gained or lost of the zero-shot accuracy over the tasks that come later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.embedded import studies
from benchmarks.embedded.tables import place_of
from mulki.errors import InputError

# Of Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2")
_PANELS = (
    ("accuracy over the tasks learned so far, %", "learned"),
    ("accuracy less zero-shot over the tasks\nnot learned yet, points", "later"),
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


def draw(lines: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw the curves of `studies.DRAWN_ROWS`.

    Args:
        lines: of the results, of which those of the six orders are drawn.
        folder: where ``learning-curves.svg`` and ``.png`` go.

    Raises:
        InputError: there are no runs.
    """
    # Here, since every process of a study imports this module, and none of them draws.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    runs = {
        name: [
            curves(r)
            for r in lines
            if (r["study"], r["variant"]) == ("compare", name)
            and place_of(r["options"]) in studies.ORDERS
        ]
        for name in studies.DRAWN_ROWS
    }
    if not any(runs.values()):
        raise InputError("figures: no runs of the comparison; run the study compare first")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for ax, (label, curve) in zip(axes, _PANELS, strict=True):
        for (name, of), colour in zip(runs.items(), _COLOURS, strict=True):
            if of:
                middle = np.mean([run[curve] for run in of], axis=0)
                steps = range(1, len(middle) + 1)
                ax.plot(steps, middle, label=name, color=colour, marker="o", markersize=3)
                ax.set_xticks(steps)
        if curve == "later":
            ax.axhline(0, color="grey", linewidth=0.8)
        ax.set_ylabel(label)
        ax.set_xlabel("tasks learned")
        ax.grid(alpha=0.3)
    axes[0].legend()
    paths = [folder / f"learning-curves.{suffix}" for suffix in ("svg", "png")]
    # Without a date, and with names that do not change, the same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "mulki"}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=110, metadata=metadata)
    return paths
