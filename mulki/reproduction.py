"""Our runs beside a published row: what is missing for them, and a verdict on what they reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mulki.data.published.collections import COLLECTIONS
from mulki.data.published.rows import Published
from mulki.errors import InputError
from mulki.intervals import mean_interval
from mulki.report import RunData, read_folder

Verdict = Literal["within", "above", "below"]

# Options of a scenario that a run must have, with what it has where its options do not say.
_SCENARIO = {
    "shots": None,
    "label_space": "task",
    "scenario": "tasks",
    "increments": None,
    "base_classes": 0,
}
#: What a verdict is called.
WORDS: dict[Verdict, str] = {
    "within": "within the band",
    "above": "above the band",
    "below": "below the band",
}


@dataclass(frozen=True)
class Line:
    """One figure of a row.

    Attributes:
        metric: its name.
        published: in percent.
        ours: the mean over runs.
        half_width: of its 95 % interval over runs; None for a single run.
        low, high: the acceptance band.
        verdict: where ours lies.
    """

    metric: str
    published: float
    ours: float
    half_width: float | None
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Judgement:
    """A row, and what our runs of it reached."""

    row: Published
    lines: tuple[Line, ...]
    runs: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """`reproduced`, `better` or `not reproduced`."""
        found = {line.verdict for line in self.lines}
        if "below" in found:
            return "not reproduced"
        return "better" if "above" in found else "reproduced"

    def to_dict(self) -> dict[str, Any]:
        """The numbers for JSON."""
        return {
            "row": self.row.name,
            "source": self.row.source,
            "protocol": self.row.protocol,
            "runs": list(self.runs),
            "figures": [asdict(line) for line in self.lines],
            "verdict": self.verdict,
        }


def judge(row: Published, folders: Sequence[Path]) -> Judgement:
    """Hold complete runs against a row.

    Raises:
        InputError: no run, one that is not complete, or one of another scenario.
    """
    if not folders:
        raise InputError(f"{row.name}: no run to judge; pass run folders, or leave --runs out")
    values = []
    for folder in folders:
        data = read_folder(folder)
        if data.status != "complete":
            raise InputError(f"{folder}: is {data.status}; go on with mulki run --resume {folder}")
        reason = differs(row, data)
        if reason:
            raise InputError(f"{folder}: is no run of {row.name}, {reason}; pass another")
        values.append(figures_of(data))
    return Judgement(
        row,
        tuple(_line(row, name, [each[name] for each in values]) for name in row.figures),
        tuple(str(folder) for folder in folders),
    )


def figures_of(data: RunData) -> dict[str, float]:
    """The figures of a run in percent, by metric."""
    seen = data.class_incremental
    found = data.matrix.metrics().to_dict()
    found |= {"cil_average": seen.average, "cil_last": seen.last}
    return {name: value for name, value in found.items() if value is not None}


def differs(row: Published, data: RunData) -> str:
    """What a run has not in common with the scenario of a row; empty if it has all."""
    options = yaml.safe_load(data.config) or {}
    for name, default in _SCENARIO.items():
        wanted, found = row.scenario.get(name, default), options.get(name, default)
        if wanted != found:
            return f"its {name.replace('_', ' ')} is {found}, not {wanted}"
    words = list(row.scenario["tasks"])
    collection = COLLECTIONS.get(words[0])
    if collection is None:
        return "" if options.get("tasks") == words else f"it learned {options.get('tasks')}"
    tasks = collection.in_order(str(row.scenario.get("order", "I")))
    if data.matrix.tasks != tasks:
        return f"it learned {', '.join(data.matrix.tasks) or 'nothing'}"
    protocol = options.get("protocol") or collection.protocols[0]
    return "" if protocol == row.protocol else f"its protocol is {protocol}, not {row.protocol}"


def leaderboard(
    rows: Mapping[str, Published], folders: Sequence[Path]
) -> dict[str, list[Published | tuple[Path, RunData]]]:
    """Rows by benchmark, the highest average first, with the runs of ours among them.

    Raises:
        InputError: a folder that is no run.
    """
    runs = [(folder, read_folder(folder)) for folder in folders]
    by_benchmark: dict[str, list[Published]] = {}
    for row in rows.values():
        by_benchmark.setdefault(row.benchmark, []).append(row)
    return {
        benchmark: sorted(
            [*here, *(run for run in runs if any(not differs(row, run[1]) for row in here))],
            key=_average,
            reverse=True,
        )
        for benchmark, here in by_benchmark.items()
    }


def _average(entry: Published | tuple[Path, RunData]) -> float:
    figures: Mapping[str, float]
    figures = entry.figures if isinstance(entry, Published) else figures_of(entry[1])
    # Rows without one come last: another figure of theirs would not compare.
    return figures.get("average", figures.get("cil_average", 0.0))


def _line(row: Published, metric: str, values: Sequence[float]) -> Line:
    published = row.figures[metric]
    ours, half = mean_interval(values)
    low, high = published - row.band, published + row.band
    # Both have their decimals; a difference of rounding decides nothing.
    verdict: Verdict = "below" if ours < low - 1e-9 else "above" if ours > high + 1e-9 else "within"
    return Line(metric, published, ours, half, low, high, verdict)
