from __future__ import annotations

import math

import pytest

from mulki.errors import InputError
from mulki.train.config.rates import Schedule, factor, learning_rates


def test_rates_by_task() -> None:
    assert learning_rates(["mnist=5e-5", "a=b=1"]) == {"mnist": 5e-5, "a=b": 1.0}
    assert learning_rates([]) == {}


@pytest.mark.parametrize(
    "entry", ["mnist", "mnist=", "=1", "a=fast", "a=0", "a=-1", "a=nan", "a=inf"]
)
def test_other_forms_are_refused(entry: str) -> None:
    with pytest.raises(InputError, match=f"^--lr-of: got '{entry}'"):
        learning_rates(["a=1", entry])


def test_cosine_as_in_open_clip() -> None:
    factors = [factor("cosine", step, 12, 2) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_constant_after_warm_up() -> None:
    factors = [factor("const", step, 6, 3) for step in range(6)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["cosine", "const"])
def test_warm_up_longer_than_the_task(name: Schedule) -> None:
    assert [factor(name, s, 3, 10) for s in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert factor(name, 3, 3, 3) == 1.0


@pytest.mark.parametrize(("steps", "warmup"), [(9, 0), (32, 3), (1000, 100)])
def test_warm_up_of_a_tenth(steps: int, warmup: int) -> None:
    for step in range(steps):
        given = factor("cosine", step, steps, warmup)
        assert factor("cosine", step, steps, None) == given
