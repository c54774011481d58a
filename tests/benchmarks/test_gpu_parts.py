"""What the steps of benchmarks/gpu.sh run, and what it looks for beforehand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.gpu import small
from benchmarks.gpu.probe import instrumented
from benchmarks.gpu.races import false_alarms
from mulki.bench.losses import MULKI
from tests import ROOT

# --- what racecheck reports

RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at stored_rows+0x1a0 in standard.py:293
=========     and Write access at stored_rows+0x1a0 in standard.py:293 [136 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_a_write_that_races_with_itself_is_the_known_false_alarm() -> None:
    assert false_alarms(RACE) == 1 and false_alarms(RACE + RACE.replace("0x1a0", "0x2b0")) == 2
    assert (
        false_alarms("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == 0
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("and Write access at stored_rows+0x1a0", "and Write access at stored_rows+0x2b0"),
        ("and Write access", "and Read access"),
        ("Write access", "Read access"),
        ("=========     and Write", "=========     or Write"),
        ("[136 hazards]", "[136 hazards]\n=========     and Read access at stored_rows+0x3c0"),
        ("========= RACECHECK", "========= Error: process didn't terminate\n========= RACECHECK"),
        ("========= RACECHECK", "========= Internal Sanitizer Error: no\n========= RACECHECK"),
        ("========= RACECHECK", "========= Program hit an illegal address\n========= RACECHECK"),
        ("========= RACECHECK", "Traceback (most recent call last):\n========= RACECHECK"),
    ],
)
def test_any_other_race_is_none(old: str, new: str) -> None:
    assert old in RACE
    assert false_alarms(RACE.replace(old, new)) == 0


# --- what runs under the sanitizer


def test_the_small_cases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operators = {"siglip": 0, "dual_teacher_kl": 2}
    monkeypatch.setattr(small, "OPERATORS", operators)
    given = ["--device", "cpu", "--shapes", "5x7x8", "6x4x3"]
    assert small.main([*given, "--verify"]) == 0
    assert small.main(given) == 0
    out = capsys.readouterr().out
    assert out.count(": ran\n") == 2 * 8
    # Shape by shape, so that what is out of time is a part of each operator.
    assert [line.split()[1] for line in out.splitlines()[:4]] == ["5x5x8", "5x7x8"] * 2
    assert small.main([*given, "--again"]) == 0
    assert capsys.readouterr().out.count(": ran\n") == 8
    assert small.main([*given, "--seconds", "-1"]) == 0
    assert "left out: 8 cases, out of time" in capsys.readouterr().out
    right = MULKI["siglip"]
    monkeypatch.setitem(MULKI, "siglip", lambda *arguments: 1.1 * right(*arguments))
    assert small.main([*given, "--verify"]) == 1
    assert "siglip 5x5x8 float32: loss: relative error 0.1" in capsys.readouterr().out
    seen = iter(range(1, 100))
    monkeypatch.setitem(MULKI, "siglip", lambda *arguments: next(seen) * right(*arguments))
    assert small.main([*given, "--again"]) == 1
    found = capsys.readouterr().out
    assert "siglip 5x5x8 float32: loss: other bits" in found and "kl 5x7x8 float32: ran" in found


def test_a_mode_that_triton_would_ignore_is_none() -> None:
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    assert "consan" in instrumented("sm_90")
    assert "consan" not in instrumented("gfx942") and "fpsan" not in instrumented("gfx1100")


def test_the_stand_in_for_a_sanitizer() -> None:
    def sanitized(tool: str, code: str) -> subprocess.CompletedProcess[str]:
        options = ["sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
        command = [sys.executable, "-m", "benchmarks.gpu.rehearsal", *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = sanitized("memcheck", "print('ran')")
    assert done.returncode == 0 and "ran" in done.stdout and "0 errors" in done.stdout
    done = sanitized("racecheck", "print('ran')")
    assert done.returncode == 9 and false_alarms(done.stdout) == 1
    done = sanitized("racecheck", "raise SystemExit(3)")
    assert done.returncode == 3 and false_alarms(done.stdout) == 0
