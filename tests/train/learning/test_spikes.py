from __future__ import annotations

import logging

import pytest

from mulki.train.learning.spikes import SpikeGuard


@pytest.mark.parametrize("factor", [None, 3.0])
def test_spikes_are_counted_and_left_out_on_request(
    factor: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    guard = SpikeGuard(factor)
    losses = [1.0, 1.1, 0.9, 40.0, 1.0, 2.9, 50.0]
    allowed = [guard.allows(loss, number) for number, loss in enumerate(losses, start=1)]
    left_out = [number for number, yes in enumerate(allowed, start=1) if not yes]
    assert left_out == ([] if factor is None else [4, 7])
    with caplog.at_level(logging.WARNING, "mulki"):
        guard.report("flags")
    (record,) = caplog.records
    assert "task flags: the loss of 2 steps, step 4 the first" in record.getMessage()
    assert ("left out)" in record.getMessage()) == (factor is not None)


def test_a_quiet_task_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    guard = SpikeGuard()
    assert all(guard.allows(loss, 1) for loss in (2.0, 3.0, 0.1, 1.0, 0.0, -1.0, 1e-9))
    guard.report("flags")
    assert not caplog.records


def test_a_loss_that_stays_high_is_accepted_in_time() -> None:
    guard = SpikeGuard(2.0)
    guard.allows(1.0, 1)
    allowed = [guard.allows(100.0, step) for step in range(2, 100)]
    assert not allowed[0] and allowed[-1]


def test_it_goes_on_where_it_was() -> None:
    one, other = SpikeGuard(2.0), SpikeGuard(2.0)
    for loss in (1.0, 5.0, 1.2):
        one.allows(loss, 2)
    other.restore(one.state())
    assert other.state() == one.state()
    assert [one.allows(x, 3) for x in (2.4, 2.6)] == [other.allows(x, 3) for x in (2.4, 2.6)]
