"""Our runs beside a published row: what is missing for them, and a verdict on what they reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from mulki.choices.option_files import options_in
from mulki.choices.options import flag
from mulki.data.published.collections import COLLECTIONS
from mulki.data.published.rows import Published
from mulki.errors import InputError
from mulki.report.comparison.groups import NEUTRAL, learned_with
from mulki.runs.intervals import mean_interval
from mulki.runs.reading import RunData, read_folder

Verdict = Literal["within", "above", "below"]

# Options that a run of any method must have, where a row does not say otherwise.
_SCENARIO = {
    "limit_images": None,
    "shots": None,
    "label_space": "task",
    "scenario": "tasks",
    "increments": None,
    "base_classes": 0,
}
# Compared apart, or where things are and how they are computed.
_FREE = NEUTRAL | {"protocol", "pretrained", "reference", "precision", "precision_eval"}


@dataclass(frozen=True)
class Line:
    """One figure of a row.

    Attributes:
        metric: its name.
        published: in percent.
        ours: the mean over seeds, of which each has the mean of its runs.
        half_width: of its 95 % interval over seeds; None for a single one.
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
    """A row, and what our runs of it reached.

    Attributes:
        row: the published one.
        lines: one for each of its figures.
        runs: their folders.
        notes: a sentence for each thing in which a run may differ, and does.
    """

    row: Published
    lines: tuple[Line, ...]
    runs: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`reproduced`, `better` or `not reproduced`."""
        # Of forgetting, less is better.
        worse: dict[str, Verdict] = {"forgetting": "above"}
        found = [line for line in self.lines if line.verdict != "within"]
        if any(line.verdict == worse.get(line.metric, "below") for line in found):
            return "not reproduced"
        return "better" if found else "reproduced"

    def to_dict(self) -> dict[str, Any]:
        """The numbers for JSON."""
        return {
            "row": self.row.name,
            "source": self.row.source,
            "protocol": self.row.protocol,
            "runs": list(self.runs),
            "notes": list(self.notes),
            "figures": [asdict(line) for line in self.lines],
            "verdict": self.verdict,
        }


def judge(row: Published, folders: Sequence[Path]) -> Judgement:
    """Hold complete runs against a row.

    Raises:
        InputError: no run, one that is not complete, or one that differs from the row.
    """
    if not folders:
        raise InputError(f"{row.name}: no run to judge; pass run folders, or leave --runs out")
    by_seed: dict[Any, list[dict[str, float]]] = {}
    notes = []
    for folder in folders:
        data = read_folder(folder)
        if data.status != "complete":
            raise InputError(f"{folder}: is {data.status}; go on with mulki run --resume {folder}")
        reason = differs(row, data)
        if reason:
            raise InputError(f"{folder}: is no run of {row.name}, {reason}; pass another")
        figures = figures_of(data)
        by_seed.setdefault(options_of(data).get("seed"), []).append(figures)
        lacking = [name for name in row.figures if name not in figures]
        if lacking:
            raise InputError(f"{folder}: has no {lacking[0]}, which {row.name} has; pass another")
        notes += [f"{folder}: {note}" for note in _notes(row, data)]
    return Judgement(
        row,
        tuple(
            _line(row, name, [mean(each[name] for each in same) for same in by_seed.values()])
            for name in row.figures
        ),
        tuple(str(folder) for folder in folders),
        tuple(notes),
    )


def figures_of(data: RunData) -> dict[str, float]:
    """The figures of a run in percent, by metric."""
    found = data.matrix.metrics().to_dict() | data.class_incremental.metrics()
    return {name: value for name, value in found.items() if value is not None}


def differs(row: Published, data: RunData) -> str:
    """What a run has not in common with a row; empty if it has all.

    A row that mulki can run binds all options of a run but those that change no result by more than
    rounding, or say where things are. Other rows bind the scenario and the model.
    """
    options = options_of(data)
    if not options:
        return "it has no args.yaml that says what it is"
    wanted = _wanted(row)
    for name in wanted:
        if name not in _FREE and wanted[name] != options.get(name):
            return f"its {name.replace('_', ' ')} is {options.get(name)}, not {wanted[name]}"
    for count, others in learned_with(data) if row.options is not None else ():
        if changed := sorted(others.keys() - _FREE):
            return f"{count} of its tasks were learned with {changed[0]} {others[changed[0]]}"
    start = options.get("pretrained")
    if wanted.get("pretrained", start) != start and _is_tag(options.get("model"), start):
        return f"its pretrained is {start}, not {wanted['pretrained']}"
    words = list(row.scenario["tasks"])
    collection = COLLECTIONS.get(words[0])
    if collection is None:
        return "" if options.get("tasks") == words else f"it learned {options.get('tasks')}"
    tasks = collection.in_order(str(row.scenario.get("order", "I")))
    if data.matrix.tasks != tasks:
        return f"it learned {', '.join(data.matrix.tasks) or 'nothing'}"
    protocol = protocol_of(data) or collection.protocols[0]
    return "" if protocol == row.protocol else f"its protocol is {protocol}, not {row.protocol}"


def protocol_of(data: RunData) -> str:
    """The protocol of a run's images, by default that of its sequence; empty if neither is known.

    Raises:
        InputError: as `options_of`.
    """
    options = options_of(data)
    words = [str(word) for word in options.get("tasks", ())]
    collection = COLLECTIONS.get(words[0].partition(":")[0]) if words else None
    return str(options.get("protocol") or (collection.protocols[0] if collection else ""))


def options_of(data: RunData) -> dict[str, Any]:
    """The options in ``args.yaml`` of a run; none where it has not the file.

    Raises:
        InputError: it is damaged.
    """
    try:
        return options_in(data.config)
    except ValueError:
        raise InputError(
            f"{data.name}: its args.yaml is damaged; restore it, or leave the run out"
        ) from None


def _wanted(row: Published) -> dict[str, Any]:
    # The options of a run of the row, by their name in args.yaml.
    if row.options is None:
        return {**_SCENARIO, **row.scenario}
    from mulki.train.config.run_config import resolve

    return resolve({**row.options, **row.scenario}).to_dict()


def _is_tag(model: Any, pretrained: Any) -> bool:
    # Other weights than those of a tag are in a file, which may be a copy of the row's.
    import open_clip

    return pretrained is None or bool(
        open_clip.get_pretrained_cfg(str(model).replace("/", "-"), str(pretrained))
    )


def _notes(row: Published, data: RunData) -> list[str]:
    # Options that may be given, but have a say in the figures.
    wanted, options = _wanted(row), options_of(data)
    notes = [
        f"{flag(name)} {options[name]}"
        for name in ("pretrained", "reference")
        if name in wanted and options.get(name) != wanted[name]
    ]
    processes = data.environment.get("processes", 1)
    if row.options is not None and processes != 1:
        notes.append(f"{processes} processes, each with a batch as large as the row's")
    return notes


def leaderboard(
    rows: Mapping[str, Published], runs: Sequence[tuple[Path, RunData]]
) -> dict[str, list[Published | tuple[Path, RunData]]]:
    """Rows by benchmark, the highest average first, with the runs of ours among them.

    A run belongs to the benchmarks with its scenario and model, whatever its method.
    """
    by_benchmark: dict[str, list[Published]] = {}
    for row in rows.values():
        by_benchmark.setdefault(row.benchmark, []).append(row)

    def fits(data: RunData, here: Sequence[Published]) -> bool:
        return any(not differs(replace(row, options=None), data) for row in here)

    return {
        benchmark: _by_average(here, [run for run in runs if fits(run[1], here)])
        for benchmark, here in by_benchmark.items()
    }


def _by_average(
    rows: Sequence[Published], runs: Sequence[tuple[Path, RunData]]
) -> list[Published | tuple[Path, RunData]]:
    metric = "cil_average" if any("cil_average" in row.figures for row in rows) else "average"

    def average(entry: Published | tuple[Path, RunData]) -> float:
        figures = entry.figures if isinstance(entry, Published) else figures_of(entry[1])
        # Those without one come last: another figure of theirs would not compare.
        return figures.get(metric, 0.0)

    return sorted([*rows, *runs], key=average, reverse=True)


def _line(row: Published, metric: str, values: Sequence[float]) -> Line:
    published = row.figures[metric]
    ours, half = mean_interval(values)
    low, high = published - row.band, published + row.band
    # Both have their decimals; a difference of rounding decides nothing.
    verdict: Verdict = "below" if ours < low - 1e-9 else "above" if ours > high + 1e-9 else "within"
    return Line(metric, published, ours, half, low, high, verdict)
