from __future__ import annotations

import math
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest

from mulki.runs.answers import Answers, Ranks, seen_accuracy
from mulki.runs.intervals import (
    RunAnswers,
    interval_over,
    mean_interval,
    paired_differences,
    seed_differences,
    t_quantile,
)
from mulki.runs.metrics import ZERO_SHOT, compute_metrics

METRICS = ("transfer", "average", "last", "forgetting", "bwt", "cil_average", "cil_last")
TASKS = ("a", "b", "c")


def run_of(
    random: np.random.Generator, share: float = 0.5, n: int = 40, tasks: tuple[str, ...] = TASKS
) -> RunAnswers:
    shape = (len(tasks), n)
    own = {task: random.random(shape) < share for task in tasks}
    seen = {task: (own[task] & (random.random(shape) < 0.8))[j:] for j, task in enumerate(tasks)}
    return RunAnswers(own, seen)


# From the tables of Student's distribution, two-sided 95 %.
@pytest.mark.parametrize(
    ("degrees", "wanted"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281)]
    + [(29, 2.0452), (30, 2.0423), (120, 1.9799), (10_000, 1.9602)],
)
def test_quantiles_of_students_t(degrees: int, wanted: float) -> None:
    assert t_quantile(degrees) == pytest.approx(wanted, abs=5e-5)


def test_interval_of_a_mean() -> None:
    values = [70.0, 72.0, 71.0]
    middle, half = mean_interval(values)
    assert middle == 71.0 and half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert mean_interval([5.0]) == (5.0, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_an_interval_of_a_mean_covers_it_in_95_of_100_cases() -> None:
    random = np.random.default_rng(0)
    draws = random.normal(3.0, 2.0, (4000, 4))
    covered = 0
    for values in draws.tolist():
        middle, half = mean_interval(values)
        covered += abs(middle - 3.0) <= (half or 0.0)
    assert 0.94 < covered / 4000 < 0.96


def test_answers_become_rows_and_the_zero_shot_row_is_left_out() -> None:
    yes, no = np.ones(3, dtype=bool), np.zeros(3, dtype=bool)
    rows = {
        ZERO_SHOT: {"a": Answers(no), "b": Answers(no)},
        "a": {"a": Answers(yes, yes), "b": Answers(no)},
        "b": {"a": Answers(no, no), "b": Answers(yes, yes)},
    }
    run = RunAnswers.of_rows(rows)
    assert {task: own[:, 0].tolist() for task, own in run.own.items()} == {
        "a": [True, False], "b": [False, True]
    }  # fmt: skip
    assert {task: seen[:, 0].tolist() for task, seen in run.seen.items()} == {
        "a": [True, False], "b": [True]
    }  # fmt: skip
    assert run.sizes == {"a": 3, "b": 3}


def test_accuracy_among_all_classes_leaves_captions_out_and_has_what_was_learned_before() -> None:
    yes, no = np.ones(4, dtype=bool), np.zeros(4, dtype=bool)
    ranks = Ranks(np.zeros(4, np.int32), np.zeros(4, np.int32))
    words = Answers(yes, ranks=ranks)

    def run(right: np.ndarray, before: np.ndarray) -> RunAnswers:
        rows = {
            ZERO_SHOT: {"words": words, "a": Answers(no), "old": Answers(no, no)},
            "words": {"words": words, "a": Answers(no), "old": Answers(no, before)},
            "a": {"words": words, "a": Answers(no, right), "old": Answers(no, before)},
        }
        return RunAnswers.of_rows(rows)

    ours, others = run(yes, yes), run(no, yes)
    assert ours.sizes == {"words": 4, "a": 4, "old": 4}
    found = paired_differences([ours], [others], resamples=10)
    # After words 4 of 4 against 4 of 4 images, after a 8 of 8 against 4 of 8.
    assert (found["cil_average"].value, found["cil_last"].value) == (25.0, 50.0)
    found = paired_differences([ours], [run(yes, no)], resamples=10)
    assert (found["cil_average"].value, found["cil_last"].value) == (75.0, 50.0)
    # Of runs that learned the old ones in another order.
    back = RunAnswers(others.own, dict(reversed(others.seen.items())))
    assert paired_differences([ours], [back], resamples=10)["cil_last"].value == 50.0
    alone = RunAnswers.of_rows({"words": {"words": words}})
    assert set(paired_differences([alone], [alone], resamples=10)) == {"average", "last"}


def test_differences_are_those_of_the_metrics() -> None:
    random = np.random.default_rng(1)
    ours, others = ([run_of(random, share) for _ in range(2)] for share in (0.6, 0.4))
    found = paired_differences(ours, others, resamples=10)
    assert set(found) == set(METRICS)

    def values(run: RunAnswers) -> dict[str, float]:
        a = np.array([run.own[task].mean(axis=1) for task in TASKS]).T * 100
        after = [
            seen_accuracy(
                Answers(run.seen[t][i - j], run.seen[t][i - j])
                for j, t in enumerate(TASKS[: i + 1])
            )[0]
            for i in range(3)
        ]
        known = {k: v for k, v in compute_metrics(a).to_dict().items() if v is not None}
        return known | {"cil_average": mean(after), "cil_last": after[-1]}

    for name, difference in found.items():
        pairs = zip(ours, others, strict=True)
        wanted = mean(values(a)[name] - values(b)[name] for a, b in pairs)
        assert difference.value == pytest.approx(wanted)


@pytest.mark.parametrize("runs", [1, 3])
def test_methods_that_are_the_same_differ_by_exactly_nothing(runs: int) -> None:
    random = np.random.default_rng(2)
    same = [run_of(random, n=30 + 11) for _ in range(runs)]
    for difference in paired_differences(same, same, resamples=200).values():
        assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_a_method_that_is_right_on_more_images() -> None:
    # 15 of 100 images are right with the one method alone, and no image with the other alone.
    n = 100
    base = np.arange(n) < 50
    more = np.arange(n) < 65
    shape = (2, n)
    ours = RunAnswers(*[{t: np.broadcast_to(more, shape) for t in "ab"} for _ in range(2)])
    other = RunAnswers(*[{t: np.broadcast_to(base, shape) for t in "ab"} for _ in range(2)])
    found = paired_differences([ours], [other], resamples=4000)
    for name, tasks in (("average", 2), ("last", 2), ("transfer", 1), ("cil_last", 2)):
        difference = found[name]
        assert difference.value == pytest.approx(15.0)
        # The standard error of a mean of 0 and 1 over all images of `tasks` tasks.
        error = 100 * math.sqrt(0.15 * 0.85 / (n * tasks))
        assert difference.low == pytest.approx(15 - 1.96 * error, abs=1.1)
        assert difference.high == pytest.approx(15 + 1.96 * error, abs=1.1)
    assert (found["forgetting"].low, found["forgetting"].high) == (0.0, 0.0)


def test_seeds_widen_the_interval() -> None:
    steady, random = np.random.default_rng(3), np.random.default_rng(4)
    other = [run_of(steady, 0.5, 400)] * 4
    alike = [run_of(steady, 0.6, 400)] * 4
    apart = [run_of(random, share, 400) for share in (0.4, 0.5, 0.7, 0.8)]
    narrow, wide = (paired_differences(ours, other)["last"] for ours in (alike, apart))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)  # type: ignore[operator]
    means = [100 * mean(float(run.own[t][-1].mean()) for t in TASKS) for run in apart]
    others = [100 * mean(float(run.own[t][-1].mean()) for t in TASKS) for run in other]
    seeds = 3.18245 * stdev(a - b for a, b in zip(means, others, strict=True)) / 2
    assert wide.high - wide.low > 2 * seeds  # type: ignore[operator]
    assert wide.high - wide.low == pytest.approx(2 * seeds, rel=0.1)  # type: ignore[operator]


def test_the_same_seed_gives_the_same_interval_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(5)
    ours, others = [run_of(random)], [run_of(random)]
    first = paired_differences(ours, others, resamples=100, seed=7)
    assert paired_differences(ours, others, resamples=100, seed=7) == first
    assert paired_differences(ours, others, resamples=100, seed=8) != first
    monkeypatch.setattr("mulki.runs.intervals._AT_ONCE", 40 * 7)
    assert paired_differences(ours, others, resamples=100, seed=7) == first


@pytest.mark.parametrize(
    ("pairs", "of_seed"),
    # The effect of a seed: none, one as large as that of the images, and a larger one.
    [(1, 0.0), (3, 0.0), (3, 0.06), (3, 0.2), (5, 0.2)],
)
def test_the_interval_covers_the_true_difference(pairs: int, of_seed: float) -> None:
    # Many small experiments with a known difference of 10 points. Whether an image is right depends
    # on the image, which all runs share, on the run, and on what their seed does to the method.
    random = np.random.default_rng(6)
    covered, n = 0, 60

    def run(images: np.ndarray[Any, Any], share: float) -> RunAnswers:
        right = (0.5 * images + 0.5 * random.random(n) < share)[None]
        return RunAnswers({"a": right}, {"a": right})

    def chance(share: float) -> float:
        # That the mean of two uniform numbers is below `share`.
        return 2 * share**2 if share < 0.5 else 1 - 2 * (1 - share) ** 2

    spread = np.linspace(-of_seed, of_seed, 1001)
    true = 100 * (mean(chance(0.5 + e) for e in spread) - chance(0.45))
    for _ in range(400):
        images = random.random(n)
        effects = random.uniform(-of_seed, of_seed, pairs)
        ours = [run(images, 0.5 + effect) for effect in effects]
        others = [run(images, 0.45) for _ in range(pairs)]
        found = paired_differences(ours, others, resamples=300)["average"]
        covered += found.low <= true <= found.high  # type: ignore[operator]
    assert covered / 400 >= 0.92


def test_the_interval_of_forgetting_covers_the_true_difference() -> None:
    """Of a model whose answers change by chance, against one that never changes."""
    random = np.random.default_rng(8)
    covered, n, count = 0, 300, 60
    tasks = tuple("abcdef")
    for _ in range(count):
        first = {task: random.random(n) < 0.8 for task in tasks}
        steady = {task: np.repeat(first[task][None], 6, axis=0) for task in tasks}
        # An eighth of the answers of each row are drawn anew.
        moved = {
            task: np.where(random.random((6, n)) < 0.125, random.random((6, n)) < 0.8, rows)
            for task, rows in steady.items()
        }
        ours, other = (
            RunAnswers(own, {task: own[task][j:] for j, task in enumerate(tasks)})
            for own in (moved, steady)
        )
        found = paired_differences([ours], [other], resamples=300)["forgetting"]
        covered += found.low <= 0 <= found.high  # type: ignore[operator]
    assert covered / count >= 0.85  # percentiles: 0.63


def test_what_an_interval_holds_in_words() -> None:
    assert interval_over(3, images=True) == "seeds and images"
    assert interval_over(1, images=True) == "images"
    assert interval_over(2, images=False) == "seeds"
    assert interval_over(1, images=False) == "nothing"


def test_one_task_has_no_transfer() -> None:
    random = np.random.default_rng(7)
    ours, other = (run_of(random, tasks=("a",)) for _ in range(2))
    assert set(paired_differences([ours], [other], resamples=5)) == {
        "average", "last", "cil_average", "cil_last"
    }  # fmt: skip


def test_differences_from_seeds_alone() -> None:
    ours = [{"last": 80.0, "cil_last": 1.0}, {"last": 82.0, "cil_last": 1.0}]
    others = [{"last": 70.0}, {"last": 70.0}]
    found = seed_differences(ours, others)
    assert list(found) == ["last"]
    assert found["last"].value == 11.0
    assert found["last"].high == pytest.approx(11 + 12.7062, abs=1e-3)
    alone = seed_differences(ours[:1], others[:1])["last"]
    assert (alone.value, alone.low, alone.high) == (10.0, None, None)


def test_what_cannot_be_paired() -> None:
    random = np.random.default_rng(8)
    one = run_of(random)
    with pytest.raises(ValueError, match="1 runs against 2"):
        paired_differences([one], [one, one])
    with pytest.raises(ValueError, match="0 runs against 0"):
        paired_differences([], [])
    with pytest.raises(ValueError, match="test sets"):
        paired_differences([one], [run_of(random, n=41)])
