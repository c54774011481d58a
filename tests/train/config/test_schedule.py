from __future__ import annotations

import math

import pytest

from mulki.train.config import schedule


def test_cosine_as_in_open_clip() -> None:
    factors = [schedule.factor("cosine", step, 12, 2) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_constant_after_warm_up() -> None:
    factors = [schedule.factor("const", step, 6, 3) for step in range(6)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["cosine", "const"])
def test_warm_up_longer_than_the_task(name: schedule.Name) -> None:
    assert [schedule.factor(name, s, 3, 10) for s in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert schedule.factor(name, 3, 3, 3) == 1.0


@pytest.mark.parametrize(("steps", "warmup"), [(9, 0), (32, 3), (1000, 100)])
def test_warm_up_of_a_tenth(steps: int, warmup: int) -> None:
    for step in range(steps):
        given = schedule.factor("cosine", step, steps, warmup)
        assert schedule.factor("cosine", step, steps, None) == given
