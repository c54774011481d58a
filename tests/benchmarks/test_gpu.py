"""benchmarks/gpu.sh as far as it goes without a GPU, and what it says of the rest."""

from __future__ import annotations

import dataclasses
import importlib
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu.plan import TOTAL, Plan
from benchmarks.gpu.probe import MODES, Machine
from benchmarks.gpu.rehearsal import _FALSE_ALARM
from benchmarks.gpu.steps import GRACE, Step, run_step, summary
from mulki.app.cli import run_command
from mulki.bench.report import read_rows
from tests import ROOT, project_files

NEEDLESS = "rich yaml open_clip safetensors hypothesis jinja2 torchvision PIL matplotlib"


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# --- the script


@pytest.mark.long
def test_a_rehearsal_runs_every_step(tmp_path: Path) -> None:
    """With torch, triton, numpy and pytest alone: the other packages cannot be imported here."""
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    code = f"import sys\nsys.modules.update(dict.fromkeys({NEEDLESS!r}.split()))\n"
    (blocked / "sitecustomize.py").write_text(code)
    path = os.pathsep.join(filter(None, [str(blocked), os.environ.get("PYTHONPATH", "")]))
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    (out / "ops.csv").write_text("of another run")
    # A machine that does something else besides has the time too; an idle one takes a minute.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Plugins of pytest would want some of them.
    variables = {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = script(str(out), "--rehearse", "--seconds", "3600", **variables)
    text = (out / "summary.txt").read_text()
    if "Triton's interpreter does not run here" in text:
        pytest.skip(text)
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took < 2 * 120, "more than two minutes of two cores"
    assert done.stdout.endswith(text)
    lines = text.splitlines()
    assert lines[0].startswith("benchmarks/gpu.sh on no GPU, a rehearsal: 1 warning, 13 ok, 1 skip")
    found = {line[13:25].strip(): line[:11].strip() for line in lines[2:] if line[0] != " "}
    steps = Plan(machine(), tmp_path).steps(400.0)
    assert found == dict.fromkeys([one.name for one in steps], "ok") | {
        "racecheck": "warning",
        "figures": "skipped",
    }
    assert "matplotlib is not installed" in text and "known false alarm" in text
    assert "tests-large.log: SKIPPED" in text and "needs a GPU" in text
    assert " passed" in next(line for line in lines if "schedules-interpreted.log" in line)
    files = {str(file.relative_to(out)) for file in out.rglob("*")}
    assert files == {"summary.txt", "ops.csv", "tables.md", "results.tar.gz"}
    rows = read_rows(str(out / "ops.csv"))
    assert {row["status"] for row in rows} == {"timed", "not applicable"}
    assert {row["kernel_provider"] for row in rows} == {"eager", "mulki", "products", "torch_lce"}
    assert "| dual_teacher_kl |" in (out / "tables.md").read_text()
    with tarfile.open(out / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        logged = archive.extractfile("results/tests-small.log").read()  # type: ignore[union-attr]
    assert {"summary.txt", "environment.log", "racecheck.log"} <= names
    assert logged.decode().count(": ran\n") == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is skipped without a GPU")
def test_without_a_gpu_it_says_what_it_skipped_and_why(tmp_path: Path) -> None:
    done = script(str(tmp_path))
    text = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0 and done.stdout.endswith(text), done.stdout + done.stderr
    lines = text.splitlines()
    assert lines[0].startswith("benchmarks/gpu.sh on no GPU: 1 ok, 13 skipped in ")
    for name in (
        "schedules",
        "tests",
        "verified",
        "losses",
        "memcheck",
        "proof",
        "racecheck",
        "consan",
        "fpsan",
    ):
        at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["skipped", name])
        assert lines[at + 1].strip() == "torch finds no GPU on this machine"
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {
            f"results{name}" for name in ("", "/environment.log", "/summary.txt")
        }


def test_without_a_folder_it_says_how_it_is_used() -> None:
    for arguments in ((), ("--rehearse",)):
        done = script(*arguments)
        assert done.returncode == 2 and "benchmarks/gpu.sh OUT" in done.stderr


def test_without_torch_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = script(str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "torch and mulki must be importable" in done.stderr


# --- the plan


def machine(**changes: object) -> Any:
    found = {"device": "a card", "no_gpu": None, "sanitizer": "/bin/cs", "no_figures": None}
    found |= {"instrumented": MODES}
    return Machine(**{**found, **changes})


def planned(tmp_path: Path, **changes: object) -> dict[str, Any]:
    steps = Plan(machine(**changes), tmp_path).steps(400.0)
    return {step.name: step for step in steps}


def test_with_all_there_nothing_is_skipped(tmp_path: Path) -> None:
    steps = planned(tmp_path)
    assert all(step.skip is None for step in steps.values())
    # Times first, since values are verified there too.
    assert list(steps)[:5] == ["environment", "verified", "throughput", "losses", "proof"]
    variables = Plan(machine(), tmp_path).variables
    assert variables == {"MULKI_BACKEND": "triton", "MULKI_STRICT": "1"}
    assert TOTAL + GRACE < 10 * 60


def test_reasons(tmp_path: Path) -> None:
    steps = planned(tmp_path, no_gpu="it is old", sanitizer=None)
    assert {name for name, step in steps.items() if step.skip is None} == {"environment"}
    assert steps["throughput"].skip == steps["memcheck"].skip == "it is old"
    assert steps["figures"].skip == "nothing was measured: it is old"
    assert Plan(machine(no_gpu="it is old"), tmp_path).variables == {}
    steps = planned(tmp_path, sanitizer=None, no_figures="no matplotlib")
    skipped = {name: step.skip for name, step in steps.items() if step.skip}
    assert set(skipped) == {"memcheck", "racecheck", "figures"}
    assert "compute-sanitizer is neither" in skipped["memcheck"]
    steps = planned(tmp_path, instrumented=("consan",))
    assert [name for name, step in steps.items() if step.skip] == ["fpsan"]
    assert "no instrumentation 'fpsan'" in steps["fpsan"].skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_the_commands_ask_for_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All options are right up to the device, which is not here."""
    importlib.import_module("benchmarks.ops.packages")  # as `python -m benchmarks.ops` does
    steps = planned(tmp_path)
    for name in ("throughput", "losses", "more"):
        ((log, command),) = steps[name].commands(120.0).items()
        assert log == name and command[1:3] == ["-m", "benchmarks.ops"]
        assert command[command.index("--budget") + 1] == "120"
        assert command[command.index("--output") + 1] == str(tmp_path / "ops.csv")
        given = list(command[3:])
        assert run_command(["bench", *given]) == 2
        assert "--device: got 'cuda'" in capsys.readouterr().err
        given[given.index("--ops") + 1] = "gone"
        assert run_command(["bench", *given]) == 2
        assert "--ops: got gone" in capsys.readouterr().err
    tests, schedules = (steps[name].commands(100.0) for name in ("tests", "schedules"))
    assert len(tests) == 7 and len(schedules) == 5
    verified = steps["verified"].commands(100.0)
    assert len(verified) == 2 and not any("--output" in one for one in verified.values())
    commands = (*tests.values(), *schedules.values())
    files = {word for command in commands for word in command if word.endswith(".py")}
    assert all((ROOT / file).is_file() for file in files)
    here = {str(path.relative_to(ROOT)) for path in project_files("tests/kernels/gpu/test_*.py")}
    assert files == here | {"tests/kernels/test_schedule.py", "tests/benchmarks/test_plan.py"}
    (sanitized,) = steps["racecheck"].commands(30.0).values()
    assert sanitized[:5] == ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "/bin/cs", "--tool"] + [
        "racecheck"
    ]
    for mode in ("consan", "fpsan"):
        (instrumented,) = steps[mode].commands(30.0).values()
        assert instrumented[:2] == ["env", f"TRITON_INSTRUMENTATION_MODE={mode}"]
        assert instrumented[-1] == "--again"
    (proof,) = steps["proof"].commands(60.0).values()
    assert proof[1:] == ["-m", "mulki", "doctor", "--kernels"]


def test_a_rehearsal_has_the_same_steps_and_touches_no_gpu_and_no_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("benchmarks.ops.packages")  # as `python -m benchmarks.ops` does
    plan = Plan(machine(rehearsal=True), tmp_path)
    assert plan.variables["CUDA_VISIBLE_DEVICES"] == ""
    assert plan.variables["MULKI_CACHE_DIR"].startswith(str(tmp_path))
    steps = {step.name: step for step in plan.steps(400.0)}
    assert list(steps) == list(planned(tmp_path)) and not any(s.skip for s in steps.values())
    for step in steps.values():
        for command in step.commands(100.0).values():
            assert "cuda" not in command and "/bin/cs" not in command
            if "--ops" in command:
                given = list(command[command.index("benchmarks.ops") + 1 :])
                given[given.index("--ops") + 1] = "gone"
                assert run_command(["bench", *given]) == 2
                assert "--ops: got gone" in capsys.readouterr().err


# --- steps


def step(code: str, seconds: float = 60.0, skip: str | None = None) -> Any:
    command = [sys.executable, "-c", code]
    return Step("one", seconds, lambda seconds: {"one": command}, skip)


def test_what_a_step_says_is_in_the_summary(tmp_path: Path) -> None:
    lines = (
        "left out: 2 points",
        "FAILED tests/a.py::b - assert",
        "========= ERROR SUMMARY: 3 errors",
        "mulki: failed: loss: relative error 1",
        "SKIPPED [3] tests/a.py:3: out of time",
        "2 failed, 3 passed, 1 skipped in 12.3s (0:01:00)",
        "a line of no interest",
    )
    code = f"import os, sys\nprint({chr(10).join(lines)!r}, os.environ['ONE'])\nsys.exit(3)"
    found = run_step(step(code), tmp_path, 100.0, {"ONE": "x"})
    assert found.status == "failed" and found.name == "one"
    told = [remark.removeprefix("one.log: ") for remark in found.remarks]
    assert told[:2] == list(lines[:2]) and told[2] == "ERROR SUMMARY: 3 errors"
    assert told[3] == "failed: loss: relative error 1" and told[4:6] == list(lines[4:6])
    assert told[6:] == ["exit status 3"]
    skipped = run_step(step("", skip="no card"), tmp_path, 100.0, {})
    text = summary([found, skipped], "a card", 12.0)
    assert text.startswith("benchmarks/gpu.sh on a card: 1 failed, 1 skipped in 12 s\n")
    assert "\n             one.log: exit status 3\n" in text and "\n             no card\n" in text


@pytest.mark.parametrize(
    "line",
    [
        "left out: 3 cases, out of time: siglip",
        "left out: 2 points, beyond --budget 60: siglip 3x3x4 float32",
        "SKIPPED [3] tests/kernels/gpu/conftest.py:20: out of time",
    ],
)
def test_what_ran_out_of_time_is_never_ok(line: str, tmp_path: Path) -> None:
    found = run_step(step(f"print({line!r})"), tmp_path, 100.0, {})
    assert found.status == "out of time" and found.remarks == (f"one.log: {line}",)
    # Nor does it hide a failure.
    found = run_step(step(f"print({line!r})\nraise SystemExit(1)"), tmp_path, 100.0, {})
    assert found.status == "failed"
    other = "left out: graph: wants a CUDA GPU"
    assert run_step(step(f"print({other!r})"), tmp_path, 100.0, {}).status == "ok"


def test_the_worst_of_its_commands_is_what_became_of_a_step(tmp_path: Path) -> None:
    late = "left out: 1 cases, out of time: siglip"
    codes = {"a": f"print({late!r})", "b": "", "c": "raise SystemExit(1)"}
    commands = {name: [sys.executable, "-c", code] for name, code in codes.items()}
    for names, status in (("b", "ok"), ("ab", "out of time"), ("abc", "failed")):
        some = Step("one", 60.0, lambda seconds, names=names: {n: commands[n] for n in names})
        assert run_step(some, tmp_path, 100.0, {}).status == status


def test_the_known_false_alarm_is_a_warning(tmp_path: Path) -> None:
    found = run_step(step(f"print({_FALSE_ALARM!r})\nraise SystemExit(9)"), tmp_path, 100.0, {})
    assert found.status == "warning" and "known false alarm" in found.remarks[-1]
    assert "rehearsed_kernel+0x1a0" in found.remarks[0]
    late = _FALSE_ALARM + "\nleft out: 1 cases, out of time: siglip"
    found = run_step(step(f"print({late!r})\nraise SystemExit(9)"), tmp_path, 100.0, {})
    assert found.status == "out of time"
    many = "\n".join(f"========= Error: Race reported between {i}" for i in range(50))
    found = run_step(step(f"print({many!r})\nraise SystemExit(9)"), tmp_path, 100.0, {})
    assert found.status == "failed" and len(found.remarks) == 22
    assert "30 more lines" in found.remarks[-2]


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(p.pid, flush=True)\ntime.sleep(600)"
    )
    start = time.monotonic()
    found = run_step(step(code, seconds=6.0), tmp_path, 100.0, {}, grace=0.5)
    assert found.status == "failed" and time.monotonic() - start < 60
    assert "did not end within" in found.remarks[0]
    pid = int((tmp_path / "one.log").read_text())
    for _ in range(100):
        if not _runs(pid):
            return
        time.sleep(0.1)
    raise AssertionError("the child is still there")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_step_without_time_is_skipped(tmp_path: Path) -> None:
    found = run_step(step("raise SystemExit(1)"), tmp_path, 1.0, {})
    assert found.status == "skipped" and "no time" in found.remarks[0]
    keeping = dataclasses.replace(step("raise SystemExit(1)"), keeps=20.0)
    assert run_step(keeping, tmp_path, 22.0, {}).status == "skipped"


def test_commands_know_when_to_end(tmp_path: Path) -> None:
    code = "import os, time\nprint(float(os.environ['MULKI_GPU_DEADLINE']) - time.time())"
    found = run_step(step(code, seconds=50.0), tmp_path, 20.0, {})
    assert found.status == "ok" and 0 < float((tmp_path / "one.log").read_text()) <= 20


def test_a_failed_step_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "_machine", lambda rehearse: machine())
    for code, status in (("", 0), ("raise SystemExit(1)", 1)):
        # Lines of an earlier run would be drawn with those of this one.
        (tmp_path / "ops.csv").write_text("of another run")
        steps = [step(code), step("print(1)")]
        monkeypatch.setattr(main.Plan, "steps", lambda self, total, steps=steps: steps)
        assert main.main([str(tmp_path)]) == status
        assert "2 ok" in capsys.readouterr().out or status
    assert {path.name for path in tmp_path.iterdir()} == {"summary.txt", "results.tar.gz"}
