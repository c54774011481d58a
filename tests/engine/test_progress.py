from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mulki.engine.learn import StepReport
from mulki.engine.progress import RunProgress, describe
from tests.engine.run_helpers import Run


def terminal() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=200, color_system=None), out


def test_bar_shows_task_losses_rate_and_time_left(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, out = terminal()
    real = RunProgress.step

    def step(self: RunProgress, report: StepReport) -> None:
        real(self, report)
        self._bar.refresh()  # the tests' steps are shorter than its refresh interval

    monkeypatch.setattr(RunProgress, "step", step)
    run(method="mulki", console=console)
    drawn = out.getvalue()
    assert "1/2 colours" in drawn and "2/2 shades" in drawn and "test shades" in drawn
    assert "8/8" in drawn  # steps of the whole run
    assert re.search(r"\d+ img/s", drawn)
    assert re.search(r"\d:\d\d:\d\d", drawn)  # time left
    for term in ("ce", "alignment", "image_text", "feature"):
        assert re.search(rf"\b{term} \d+\.\d{{3}}", drawn)


def test_nothing_is_drawn_without_a_terminal(run: Run) -> None:
    out = io.StringIO()
    run(console=Console(file=out, width=200))
    assert out.getvalue() == ""


def test_bar_averages_the_rate() -> None:
    console, out = terminal()
    with RunProgress(console, 2) as progress:
        for step, seconds in ((1, 1.0), (2, 0.5)):
            progress.step(StepReport(step, {"ce_loss": 1.25}, 1e-3, 10, seconds))
            progress._bar.refresh()
    assert "10 img/s" in out.getvalue() and "11 img/s" in out.getvalue()


def test_describe_names_every_term() -> None:
    report = StepReport(1, {"ce_loss": 1.23456, "text_text_loss": 0.5}, 1e-3, 8, 0.1)
    assert describe(report) == "ce 1.235 text_text 0.500"
