"""95 % intervals: of a mean over seeds, and of the difference of two methods.

Two sources of chance are told apart. A seed decides in what order the images of a task come and how
they are augmented; a few values of it have the interval of Student's t. The test images are a
sample too, and a small one on small test sets: they are drawn anew, with replacement, the same ones
for both methods (a paired bootstrap). The two are independent, so where an interval has both, the
squares of their widths add up. A bootstrap that draws the few seeds as well is too narrow: in
simulations where seeds dominate, it covered the true difference in 72 of 100 cases with three pairs
and in 85 with five.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
import numpy.typing as npt

from mulki.runs.answers import Answers
from mulki.runs.metrics import HEAD_METRICS, ZERO_SHOT, FloatArray, stacked_metrics

CONFIDENCE = 0.95

#: Draws of the bootstrap.
RESAMPLES = 2000

# Numbers of images drawn at a time; it bounds the memory and changes no result.
_AT_ONCE = 2**22


def t_quantile(degrees: int) -> float:
    """The t for which Student's distribution has `CONFIDENCE` between -t and t.

    The distribution in closed form is that of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    Args:
        degrees: of freedom, 1 or more.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _between(middle, degrees) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(high)


def _between(angle: float, degrees: int) -> float:
    # The probability of -t..t, for angle = arctan(t / sqrt(degrees)).
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its interval by Student's t; None for a single value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values; pass one or more")
    if len(values) == 1:
        return values[0], None
    return mean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True, eq=False)
class RunAnswers:
    """Which test images a run got right, after each of its T tasks.

    Attributes:
        own: among the classes of the image's own task; by task, [T, n].
        seen: among the classes of all tasks learned by then; by data set, [k, n] after the last k
            tasks, those since it was learned. A task of captions has none, and a task that an
            earlier run learned has k = T.
        head: the same with the head of class statistics; None where a row has none.
    """

    own: Mapping[str, npt.NDArray[np.bool_]]
    seen: Mapping[str, npt.NDArray[np.bool_]]
    head: RunAnswers | None = None

    @classmethod
    def of_rows(cls, rows: Mapping[str, Mapping[str, Answers]]) -> RunAnswers:
        """From `mulki.runs.answers.read_answers`; the zero-shot row is left out."""
        tasks = [name for name in rows if name != ZERO_SHOT]
        names = dict.fromkeys(name for row in rows.values() for name in row)
        answers = {name: [rows[after][name] for after in tasks] for name in names}
        heads = {name: [a.head or a for a in each] for name, each in answers.items()}
        of_tasks = [a for task in tasks for a in answers[task]]
        whole = all(a.head or a.ranks for a in of_tasks) and any(a.head for a in of_tasks)
        return cls(
            *_own_and_seen(tasks, answers), cls(*_own_and_seen(tasks, heads)) if whole else None
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Test images: of each task in the order learned, and of those that were learned before."""
        return {name: answers.shape[1] for name, answers in {**self.own, **self.seen}.items()}


def _own_and_seen(
    tasks: Sequence[str], answers: Mapping[str, Sequence[Answers]]
) -> tuple[dict[str, npt.NDArray[np.bool_]], dict[str, npt.NDArray[np.bool_]]]:
    own = {task: np.array([a.own for a in answers[task]]) for task in tasks}
    since = {name: [a.seen for a in each if a.seen is not None] for name, each in answers.items()}
    return own, {name: np.array(each) for name, each in since.items() if each}


@dataclass(frozen=True)
class Difference:
    """A difference of two methods in percentage points, and the ends of its 95 % interval.

    The ends are None where a single pair of runs without answers leaves nothing to estimate from.
    """

    value: float
    low: float | None
    high: float | None


def seed_differences(
    ours: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]
) -> dict[str, Difference]:
    """Differences of metrics, ours less the others', paired by place, from seeds alone.

    The interval is that of Student's t on the differences of the pairs.

    Raises:
        ValueError: no pair, or numbers of runs that differ.
    """
    names = set.intersection(*(set(metrics) for metrics in (*ours, *others)))
    found = {}
    for name in (name for name in ours[0] if name in names):
        middle, half = mean_interval([a[name] - b[name] for a, b in zip(ours, others, strict=True)])
        ends = (None, None) if half is None else (middle - half, middle + half)
        found[name] = Difference(middle, *ends)
    return found


def paired_differences(
    ours: Sequence[RunAnswers],
    others: Sequence[RunAnswers],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """Differences of metrics, ours less the others', from seeds and test images together.

    In each resample, test images of each task are drawn with replacement: the same images for all
    runs and after all tasks. All matrices and metrics are computed anew. The part of the interval
    that comes from images is the basic bootstrap interval of the mean difference (Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 5.2): percentiles would count
    the upward bias of forgetting, which takes a largest accuracy, twice. The part that comes from
    seeds is that of Student's t on the differences of the pairs. A single pair has the first part
    alone.

    Args:
        ours, others: runs with the same tasks in the same order and the same test images, paired
            by place.
        resamples: how many draws.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        By name, the metrics of `mulki.runs.metrics.stacked_metrics`; where there are tasks of
        classes, with `cil_average` and `cil_last`; where all runs have a head, also those of
        `HEAD_METRICS`.

    Raises:
        ValueError: no pair, numbers of runs that differ, or other tasks or test sets.
    """
    if not ours or len(ours) != len(others):
        raise ValueError(f"{len(ours)} runs against {len(others)}: wanted pairs, at least one")
    sizes = list(ours[0].sizes.items())
    if any(run.sizes != dict(sizes) or [*run.own] != [*ours[0].own] for run in (*ours, *others)):
        raise ValueError("runs with other tasks or test sets; pass runs of the same tasks")
    runs = [*ours, *others]
    whole = _differences(runs, {task: np.ones((1, n), np.float32) for task, n in sizes})
    # One generator for each task, so that the draws do not depend on the chunks.
    generators = np.random.default_rng(seed).spawn(len(sizes))
    drawn: dict[str, list[FloatArray]] = {name: [] for name in whole}
    for start, end in _chunks(resamples, max(n for _, n in sizes)):
        images = {
            task: _counts(generator, end - start, n)
            for (task, n), generator in zip(sizes, generators, strict=True)
        }
        for name, values in _differences(runs, images).items():
            drawn[name].append(values.mean(axis=1))
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for name, parts in drawn.items():
        value, of_seeds = mean_interval(whole[name][0].tolist())
        ends = 2 * value - np.quantile(np.concatenate(parts), [1 - tail, tail])
        below, above = (math.hypot(max(w, 0.0), of_seeds or 0.0) for w in (ends - value) * (-1, 1))
        found[name] = Difference(value, value - below, value + above)
    return found


def interval_over(pairs: int, *, images: bool) -> str:
    """What the interval of a difference holds, in words.

    Args:
        pairs: how many pairs of runs.
        images: whether it is from `paired_differences`, else from `seed_differences`.
    """
    parts = ["seeds"] * (pairs > 1) + ["images"] * images
    return " and ".join(parts) or "nothing"


def _chunks(resamples: int, images: int) -> Iterator[tuple[int, int]]:
    step = max(1, _AT_ONCE // images)
    for start in range(0, resamples, step):
        yield start, min(start + step, resamples)


def _counts(generator: np.random.Generator, resamples: int, count: int) -> npt.NDArray[np.float32]:
    # How often each of `count` things is drawn, [resamples, count].
    drawn = generator.integers(count, size=(resamples, count))
    drawn += np.arange(resamples)[:, None] * count
    counts = np.bincount(drawn.ravel(), minlength=resamples * count)
    return counts.reshape(resamples, count).astype(np.float32)


def _differences(
    runs: Sequence[RunAnswers], images: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, FloatArray]:
    # Of each metric in percentage points, [R, S], where `images` has counts [R, n] by task. The
    # sums are whole numbers, which float32 holds exactly.
    own = [100 * _hits([run.own[t] for run in runs], images[t]) for t in runs[0].own]
    metrics = stacked_metrics(
        np.stack([hits / images[t].shape[1] for t, hits in zip(runs[0].own, own, strict=True)], -1)
    )
    right, total = np.zeros(own[0].shape), np.zeros(own[0].shape[-1])
    for name in runs[0].seen:
        hits = _hits([run.seen[name] for run in runs], images[name])
        right[..., -hits.shape[-1] :] += 100 * hits
        total[-hits.shape[-1] :] += images[name].shape[1]
    if total.any():
        after = right[..., total > 0] / total[total > 0]
        metrics |= {"cil_average": after.mean(axis=-1), "cil_last": after[..., -1]}
    half = len(runs) // 2
    found = {name: values[:, :half] - values[:, half:] for name, values in metrics.items()}
    heads = [run.head for run in runs if run.head is not None]
    if len(heads) == len(runs):
        of_heads = _differences(heads, images)
        found |= {name: of_heads[of] for name, of in HEAD_METRICS.items() if of in of_heads}
    return found


def _hits(answers: Sequence[npt.NDArray[np.bool_]], counts: npt.NDArray[np.float32]) -> FloatArray:
    # Right answers [R, 2 S, T] of 2 S runs with [T, n] each, for counts [R, n].
    stacked = np.stack(answers)
    flat = counts @ stacked.reshape(-1, stacked.shape[-1]).T.astype(np.float32)
    return flat.reshape(len(counts), *stacked.shape[:2]).astype(np.float64)
