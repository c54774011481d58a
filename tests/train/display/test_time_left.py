from __future__ import annotations

import pytest

from mulki.train.display.time_left import TimeLeft, clock


def test_time_is_known_when_every_kind_that_is_left_was_measured() -> None:
    left = TimeLeft({"steps": 10, "tests": 100, "nothing": 0})
    assert left.of_run() is None and left.seconds("steps", 3) is None
    left.did("steps", 1, 2.0)
    assert left.seconds("steps", 3) == 6.0 and left.of_run() is None
    left.did("tests", 50, 5.0)
    assert left.of_run() == pytest.approx(9 * 2.0 + 50 * 0.1)
    left.skip("tests", 50)
    left.skip("steps", 100)
    assert left.of_run() == 0.0


def test_recent_work_counts_more() -> None:
    left = TimeLeft({"steps": 1000})
    for _ in range(50):
        left.did("steps", 1, 1.0)
    for _ in range(50):
        left.did("steps", 1, 3.0)
    assert left.seconds("steps", 1) == pytest.approx(3.0, abs=0.02)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (400000, "111:06:40")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
