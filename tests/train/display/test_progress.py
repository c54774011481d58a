from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mulki.train.display import progress as module
from mulki.train.display.progress import (
    STEPS,
    TEACHERS,
    TEST,
    RunProgress,
    checking,
    describe,
    megabytes,
)
from mulki.train.learning.inputs import StepReport
from tests.train.run_helpers import Run

TERMS = {
    f"{name}_loss": 0.125
    for name in ("ce", "alignment", "image_text", "image_image", "text_image", "text_text")
} | {"image_anchor_loss": 0.25, "feature_loss": 1.0}


def report(step: int, seconds: float = 0.5) -> StepReport:
    return StepReport(step, TERMS, 1e-3, 10, seconds)


def drawn(progress: RunProgress, width: int = 80) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    console.print(progress._drawn())
    return out.getvalue().splitlines()


def quiet() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize("width", [80, 100])
def test_all_is_visible_at_80_columns(width: int) -> None:
    progress = RunProgress(quiet(), {STEPS: 240, TEST: 60}, 6)
    progress.stage("test of digits", TEST, 20)
    progress.advance(20)
    progress.task(2, "letters")
    progress.stage("", STEPS, 120)
    progress.watch(800 * 2**20, {"zero_shot": 0.625, "previous": 0.375})
    for step in range(1, 35):
        progress.step(report(step))
    lines = drawn(progress, width)
    text = " ".join(lines)
    assert max(map(len, lines)) <= width
    assert "task 2/6 letters" in lines[0] and "left 0:00:43, run 0:01:43" in lines[0]
    assert "34/120 steps" in lines[1]
    assert lines[2].split("  ")[:3] == ["20 img/s", "lr 1.00e-03", "memory 800 MiB"]
    assert "loss 2.000" in text
    assert re.search(r"zero_shot 0\.62 +previous 0\.38", text)
    for name, value in TERMS.items():
        # A name and its number stand on one line.
        words = f"{name.removesuffix('_loss')} {value:.3f}"
        assert any(words in line for line in lines)


def test_teachers_and_tests_move_the_bar() -> None:
    progress = RunProgress(quiet(), {STEPS: 5, TEACHERS: 40, TEST: 60}, 1)
    progress.task(1, "a task whose name is longer than any terminal is wide" * 2)
    for kind, text in ((TEACHERS, "teachers"), (TEST, "test of x")):
        progress.stage(text, kind, 40)
        assert f"0/40 {kind}" in drawn(progress)[1]
        progress.advance(30)
        lines = drawn(progress)
        assert f"30/40 {kind}" in lines[1] and "img/s" in lines[2]
        assert max(map(len, lines)) <= 80 and "left 0:00:00" in lines[0]


def test_a_line_every_few_seconds_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = io.StringIO()
    with RunProgress(Console(file=out, width=40), {STEPS: 2000}, 2) as progress:
        progress.task(1, "[red]<b>")
        progress.stage("", STEPS, 1000)
        progress.watch(2**20, {"previous": 1.0})
        for step in range(1, 1001):
            now += 0.5
            progress.step(report(step))
    expected, first, *rest = out.getvalue().splitlines()
    assert expected == "expected: 0:16:38 for the rest of the run, 1 MiB of memory so far"
    assert re.match(
        r"\d\d:\d\d:\d\d task 1/2 \[red\]<b>, 10/1000 steps, 0:08:15 left, run 0:16:35 left, "
        r"20 img/s, 1 MiB, loss 2.000, teachers previous 1.00$",
        first,
    )
    assert len(rest) == 99


def test_what_is_not_known_and_what_is_over_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OFTEN", 0.0)
    out = io.StringIO()
    progress = RunProgress(Console(file=out, width=200), {STEPS: 4, TEST: 20}, 1)
    assert [line.strip() for line in drawn(progress)] == ["starting", ""]
    progress.stage("test of x", TEST, 10)
    assert "left" not in drawn(progress)[0]
    progress.advance(10)
    progress.task(1, "x")
    progress.stage("", STEPS, 4)
    for step in range(1, 5):
        progress.watch(None, {"previous": 1.0})
        progress.step(report(step))
    assert "teachers" in drawn(progress)[-1]
    progress.stage("test of x", TEST, 10)
    assert not any("teachers" in line or "img/s" in line for line in drawn(progress))
    lines = [line.partition(" ")[2] for line in out.getvalue().splitlines()]
    assert lines[0] == "test of x, 0/10 test images"
    assert lines[1].startswith("test of x, 10/10 test images, 0:00:00 left, ")
    assert lines[-1] == "task 1/1 x: test of x, 0/10 test images, 0:00:00 left, run 0:00:00 left"


def test_lines_of_a_long_run_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = io.StringIO()
    progress = RunProgress(Console(file=out), {TEST: 10**6}, 1)
    progress.stage("test of x", TEST, 10**6)
    for _ in range(24 * 360):
        now += 10.0
        progress.advance(1)
    assert 24 * 60 < len(out.getvalue().splitlines()) < 24 * 60 + 150


def test_a_display_tells_the_expected_time_and_results_above_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with RunProgress(console, {STEPS: 8}, 1) as progress:
        progress.task(1, "digits")
        progress.stage("", STEPS, 8)
        for step in range(1, 5):
            progress.step(report(step))
        progress.say("after digits: digits 90.0")
    text = out.getvalue()
    assert "expected: 0:00:02 for the rest of the run" in text
    assert "after digits: digits 90.0" in text


def test_a_run_shows_its_stages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str, int, int]] = []
    real = RunProgress._left

    def spied(name: str) -> None:
        method = getattr(RunProgress, name)

        def call(self: RunProgress, *given: object) -> None:
            method(self, *given)
            seen.append((self._task, self._stage, self._kind, self._done, self._total))

        monkeypatch.setattr(RunProgress, name, call)

    spied("advance")
    spied("step")
    out = io.StringIO()
    progress_left: list[tuple[str, str]] = []
    leave = RunProgress.__exit__
    monkeypatch.setattr(
        RunProgress,
        "__exit__",
        lambda self, *given: (progress_left.append(real(self)), leave(self, *given))[1],
    )
    folder = run(method="mulki", console=Console(file=out, width=200))
    assert seen[:2] == [
        ("", "test of colours", TEST, 15, 15), ("", "test of shades", TEST, 10, 10)
    ]  # fmt: skip
    assert any(stage == "teachers" and kind == TEACHERS for _, stage, kind, *_ in seen)
    steps = [(task, done, total) for task, _, kind, done, total in seen if kind == STEPS]
    assert steps == [
        (f"task {i}/2 {name}", step, 4)
        for i, name in ((1, "colours"), (2, "shades"))
        for step in range(1, 5)
    ]
    assert progress_left == [("0:00:00", "0:00:00")]
    said = out.getvalue()
    assert said.startswith("run      mulki on 2 tasks")
    assert f"results  {folder.path}" in said and "after shades: colours" in said
    assert "expected: 0:00:0" in said


def test_describe_names_every_term() -> None:
    found = StepReport(1, {"ce_loss": 1.23456, "text_text_loss": 0.5}, 1e-3, 8, 0.1)
    assert describe(found) == "ce 1.235 text_text 0.500"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(None, ""), (320 * 2**10, "320 KiB"), (5 * 2**20, "5 MiB"), (12 * 2**30, "12.0 GiB")],
)
def test_megabytes(count: int | None, shown: str) -> None:
    assert megabytes(count) == shown


def test_what_the_first_step_takes_is_not_expected_again() -> None:
    out = io.StringIO()
    with RunProgress(Console(file=out), {STEPS: 103}, 1) as progress:
        progress.stage("", STEPS, 103)
        for step, seconds in ((1, 60.0), (2, 0.5), (3, 0.5)):
            progress.step(report(step, seconds))
    assert out.getvalue() == "expected: 0:00:50 for the rest of the run\n"
    assert drawn(progress)[2].startswith("20 img/s")


@pytest.mark.parametrize("terminal", [True, False])
def test_checking_many_images_is_shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with checking(console) as show:
        for done in range(1, 101):
            show(done, 100)
            # Few images are checked before anything could be read.
            assert now[0] >= 1 or not out.getvalue()
            now[0] += 0.25
    shown = out.getvalue()
    if terminal:
        assert "checking images" in shown and "/100" in shown
    else:
        lines = ["checking images: 21/100", "checking images: 41/100", "checking images: 61/100"]
        assert shown.splitlines() == [*lines, "checking images: 81/100"]


def test_what_goes_into_a_file_is_not_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    drawn = io.StringIO()
    with checking(Console(file=drawn, force_terminal=True, width=100)) as show:
        show(1, 2)
        print("a prediction")
    assert capsys.readouterr().out == "a prediction\n" and "a prediction" not in drawn.getvalue()


def test_a_run_shows_the_check_of_its_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_OFTEN", 0.0)
    out = io.StringIO()
    run(method="zero_shot", console=Console(file=out, width=200))
    # The first task has 18 training and 15 test images.
    assert "checking images: 33/33\n" in out.getvalue()
