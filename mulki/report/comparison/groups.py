"""What a comparison of runs consists of: runs, groups of them, and differences between groups."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mulki.errors import InputError
from mulki.report import tables
from mulki.runs.intervals import Difference, RunAnswers, mean_interval, seed_differences
from mulki.runs.metrics import HEAD_METRICS
from mulki.runs.reading import RunData

#: What is compared, with titles. BWT is left out: it is nearly forgetting with its sign changed.
TITLES = {name: title for name, title in tables.TITLES.items() if name != "bwt"} | {
    "cil_average": "CIL average",
    "cil_last": "CIL last",
}
TITLES |= {name: f"{TITLES[of]}, head" for name, of in HEAD_METRICS.items()}

#: As if they were options: earlier tasks of which a run has no row, and those of the runs that it
#: goes on from.
LEARNED_BEFORE, LEARNED_WITH = "learned before", "earlier options"

# Options that change no result but by rounding, or only where it goes. The tasks and their order
# are compared by what was learned, and the seed tells the runs of a group apart. A run that goes on
# from another with the same options has the results of one run.
NEUTRAL = frozenset(
    {"seed", "tasks", "order", "name", "logs", "workers", "device", "import", "preset"}
    | {"log_every_n_steps", "save_checkpoints", "batch_size_eval", "micro_batch"}
    | {"grad_checkpointing", "save_every", "data_root", "max_pixels", "max_member_mb", "report_to"}
    | {"process_timeout", "deterministic", "continue", "test_tasks", "teacher_cache"}
    | {"csv_img_key", "csv_caption_key", "csv_separator"}
)


def learned_with(data: RunData) -> list[tuple[int, dict[str, Any]]]:
    """Of the runs that one goes on from, tasks and options that differ in more than `NEUTRAL`.

    None for folders of before it was written.

    Raises:
        InputError: ``env.json`` is damaged.
    """
    try:
        found = [
            (int(of["tasks"]), {k: v for k, v in of["options"].items() if k not in NEUTRAL})
            for of in data.environment.get("learned_with", [])
        ]
    except (TypeError, KeyError, ValueError, AttributeError):
        raise InputError(
            f'{data.name}: "learned_with" in its env.json is not what a run writes; restore the '
            "file, or leave the run out"
        ) from None
    return [each for each in found if each[1]]


@dataclass(frozen=True, eq=False)
class Run:
    """A complete run, and what a comparison needs of it.

    Args:
        path: of its folder.
        data: the content of the folder.
        options: from ``args.yaml``.
        answers: None where the run kept none.
        captions: tasks that have captions and no classes, as far as the answers say.
    """

    path: Path
    data: RunData
    options: Mapping[str, Any]
    answers: RunAnswers | None
    captions: frozenset[str]

    @property
    def seed(self) -> int:
        return int(self.options["seed"])

    @property
    def method(self) -> str:
        return str(self.options["method"])

    @property
    def configuration(self) -> str:
        # An option that is off is as one that mulki had not yet.
        kept = {k: v for k, v in self.options.items() if k not in NEUTRAL and v is not None}
        return json.dumps(kept, sort_keys=True, default=str)

    @property
    def recipe(self) -> str:
        """Its configuration, whatever it has learned before."""
        kept = {k: v for k, v in json.loads(self.configuration).items() if k != LEARNED_BEFORE}
        return json.dumps(kept)

    @property
    def metrics(self) -> dict[str, float]:
        found = self.data.matrix.metrics().to_dict() | self.data.class_incremental.metrics()
        if self.data.with_head is not None:
            found |= self.data.with_head.metrics()
        return {name: value for name in TITLES if (value := found.get(name)) is not None}

    @property
    def never_changed(self) -> bool:
        """Whether its model did not learn, so that the seed has no say."""
        matrix = self.data.matrix
        return {matrix.zero_shot} == set(matrix.rows)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but the seed.

    Args:
        label: the method, with the options in which groups of this method differ.
        runs: at least one.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def uses(self) -> str:
        """What it learns from beside the images and class names of the tasks."""
        uses = self.runs[0].data.summary.get("uses")
        return "unknown" if uses is None else ", ".join(uses) or "-"

    @property
    def means(self) -> dict[str, tuple[float, float | None]]:
        """Mean and half-width of the interval over seeds, of metrics that all runs have.

        Runs with the same seed count as one, their mean.
        """
        values = [run.metrics for run in self.runs]
        shared = [name for name in TITLES if all(name in each for each in values)]
        of_seed: dict[int, list[dict[str, float]]] = {}
        for run, found in zip(self.runs, values, strict=True):
            of_seed.setdefault(run.seed, []).append(found)
        return {
            name: mean_interval([mean(each[name] for each in same) for same in of_seed.values()])
            for name in shared
        }


def metrics_shown(sections: Sequence[Section]) -> list[str]:
    """The metrics that tables have columns for: those with a head only where a group has them."""
    groups = [group for section in sections for group in section.groups]
    known = {name for group in groups for name in group.means}
    return [name for name in TITLES if name not in HEAD_METRICS or name in known]


@dataclass(frozen=True, eq=False)
class Against:
    """What a group has more than the baseline.

    Args:
        label: of the group.
        pairs: pairs of runs with the same seed.
        over: what the intervals hold, see `mulki.runs.intervals.interval_over`.
        metrics: differences in percentage points.
    """

    label: str
    pairs: int
    over: str
    metrics: Mapping[str, Difference]


@dataclass(frozen=True, eq=False)
class Section:
    """All groups that learned the same tasks in the same order.

    Args:
        name: of the sequence and order.
        tasks: in the order learned.
        groups: in the order in which their runs were given.
        baseline: label of the group that the others are compared with, if it is here.
        differences: of the other groups.
    """

    name: str
    tasks: tuple[str, ...]
    groups: tuple[Group, ...]
    baseline: str | None
    differences: tuple[Against, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """The tasks of captions, of which all figures are of recall@1 in place of accuracy."""
        found = {name for group in self.groups for run in group.runs for name in run.captions}
        return tuple(task for task in self.tasks if task in found)


@dataclass(frozen=True)
class OverOrders:
    """What a group of runs comes to over several orders.

    Args:
        sequence: the name of what was learned, without that of an order.
        label: of the group in the sections.
        orders: how many sections have it.
        means: mean and half of its interval, by metric.
        differences: from the baseline, by metric, over the sections that compare with it.
        baseline: its label; None for the baseline itself.
        compared: how many sections those are.
    """

    sequence: str
    label: str
    orders: int
    means: dict[str, tuple[float, float | None]]
    differences: dict[str, Difference]
    baseline: str | None
    compared: int

    def to_dict(self) -> dict[str, Any]:
        """The numbers for JSON."""
        return {
            "sequence": self.sequence,
            "label": self.label,
            "orders": self.orders,
            "metrics": {n: {"mean": m, "half_width": h} for n, (m, h) in self.means.items()},
            "baseline": self.baseline,
            "difference_orders": self.compared,
            "differences": {n: vars(each) for n, each in self.differences.items()},
        }


def over_orders(sections: Sequence[Section]) -> list[OverOrders]:
    """Combine the sections that learned the same tasks in different orders.

    The order is chance too, and a larger one than the seed. It counts once, with the mean over its
    seeds; intervals are those of Student's t over orders.

    Returns:
        One for each group that two of them or more have, in the order of the first section.
    """
    by_tasks: dict[frozenset[str], list[Section]] = {}
    for section in sections:
        by_tasks.setdefault(frozenset(section.tasks), []).append(section)
    return [
        each
        for of_tasks in by_tasks.values()
        for label in dict.fromkeys(g.label for section in of_tasks for g in section.groups)
        if (each := _combined(label, of_tasks)) is not None
    ]


def _combined(label: str, sections: Sequence[Section]) -> OverOrders | None:
    groups = [group for section in sections for group in section.groups if group.label == label]
    if len(groups) < 2:
        return None
    values = [{name: mean for name, (mean, _) in group.means.items()} for group in groups]
    shared = [name for name in values[0] if all(name in each for each in values)]
    differences = [
        (section.baseline, {name: each.value for name, each in difference.metrics.items()})
        for section in sections
        for difference in section.differences
        if difference.label == label
    ]
    # A mean over differences from several baselines would be one from none of them.
    baseline = differences[0][0] if differences else None
    against = [metrics for of, metrics in differences if of == baseline]
    none = [dict.fromkeys(each, 0.0) for each in against]
    name = sections[0].name
    return OverOrders(
        name.rpartition(", order ")[0] or name,
        label,
        len(groups),
        {name: mean_interval([each[name] for each in values]) for name in shared},
        seed_differences(against, none) if against else {},
        baseline,
        len(against),
    )


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison found.

    Args:
        sections: one for each order of tasks.
        warnings: all that a reader has to be warned of.
        unlike: those of them that say what else than the method differs: the start, the images, the
            prompts or the protocol.
    """

    sections: tuple[Section, ...]
    warnings: tuple[str, ...]
    unlike: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The numbers for JSON; an interval that is undefined is null."""
        return {
            "sections": [
                {
                    "name": section.name,
                    "tasks": list(section.tasks),
                    "groups": [
                        {
                            "label": group.label,
                            "runs": [str(run.path) for run in group.runs],
                            "seeds": [run.seed for run in group.runs],
                            "uses": group.uses,
                            "metrics": {
                                name: {"mean": middle, "half_width": half}
                                for name, (middle, half) in group.means.items()
                            },
                        }
                        for group in section.groups
                    ],
                    "baseline": section.baseline,
                    "differences": [asdict(against) for against in section.differences],
                }
                for section in self.sections
            ],
            "orders": [each.to_dict() for each in over_orders(self.sections)],
            "warnings": list(self.warnings),
        }
