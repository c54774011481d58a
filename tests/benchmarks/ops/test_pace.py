from __future__ import annotations

from mulki.bench.pace import Pace


def test_what_does_not_fit_the_budget_is_left_out_last_first() -> None:
    clock = [100.0]
    pace: Pace[str] = Pace(10.0, now=lambda: clock[0])
    clock[0] += 1  # of preparations, which the budget pays for
    taken = []
    for item in pace.take("abcdefg"):
        taken.append(item)
        clock[0] += 2.5
    # The fourth would end at 11 of 10 seconds.
    assert taken == ["a", "b", "c"] and pace.left_out == ["d", "e", "f", "g"]
    forever: Pace[str] = Pace(0.0, now=lambda: clock[0])
    assert list(forever.take("ab")) == ["a", "b"] and not forever.left_out
