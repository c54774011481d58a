from __future__ import annotations

from mulki.bench.pace import Pace, in_words


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


def test_what_is_left_is_told_by_what_was_done() -> None:
    clock = [0.0]
    pace: Pace[str] = Pace(0.0, now=lambda: clock[0])
    left = []
    for number, _ in enumerate(pace.take("abcd")):
        left.append(pace.left(4 - number, expected=1.0))
        clock[0] += 3
    assert left == [4.0, 9.0, 6.0, 3.0]
    short: Pace[str] = Pace(10.0, now=lambda: clock[0])
    clock[0] += 4
    assert short.left(100, expected=1.0) == 6.0
    assert [in_words(s) for s in (0.2, 59.6, 600, 9000)] == ["1 s", "60 s", "10 min", "2.5 h"]
