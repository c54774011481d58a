"""benchmarks/gpu.sh as far as it goes without a GPU, and what it says of the rest."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mulki.bench.losses import MULKI
from mulki.bench.report import read_rows
from mulki.cli import run_command
from tests import ROOT

NEEDLESS = "rich yaml open_clip safetensors hypothesis jinja2 torchvision PIL matplotlib"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.gpu.{name}")


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# --- the script


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is skipped without a GPU")
def test_without_a_gpu_it_says_what_it_skipped_and_why(tmp_path: Path) -> None:
    """With torch, numpy and pytest alone: the other packages cannot be imported here."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    code = f"import sys\nsys.modules.update(dict.fromkeys({NEEDLESS!r}.split()))\n"
    (blocked / "sitecustomize.py").write_text(code)
    path = os.pathsep.join(filter(None, [str(blocked), os.environ.get("PYTHONPATH", "")]))
    out = tmp_path / "new" / "out"
    done = script(str(out), "--rehearse", PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (out / "summary.txt").read_text()
    assert done.stdout.endswith(text)
    assert text.startswith("benchmarks/gpu.sh on no GPU: 3 ok, 0 failed, 7 skipped in ")
    lines = text.splitlines()
    for name in ("tests", "losses", "memcheck", "largest", "racecheck", "more"):
        at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["skipped", name])
        assert lines[at + 1].strip() == "torch finds no GPU on this machine"
    at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["skipped", "figures"])
    assert lines[at + 1].strip() == "matplotlib is not installed"
    assert any(line.split()[:2] == ["ok", "throughput"] for line in lines)
    assert "throughput.log: left out: graph: wants a CUDA GPU" in text
    rows = read_rows(str(out / "ops.csv"))
    assert {row["status"] for row in rows} == {"timed"}
    assert {row["kernel_provider"] for row in rows} == {"eager", "mulki"}
    assert "mulki" in (out / "environment.log").read_text()
    assert "| dual_teacher_kl |" in (out / "tables.log").read_text()
    # The GPU tests too are collected with these packages alone, and are skipped by name.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/gpu"]
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    tests = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert tests.returncode == 0 and "needs a GPU" in tests.stdout, tests.stdout + tests.stderr
    assert " passed" not in tests.stdout


def test_without_a_folder_it_says_how_it_is_used() -> None:
    for arguments in ((), ("--rehearse",)):
        done = script(*arguments)
        assert done.returncode == 2 and "benchmarks/gpu.sh OUT" in done.stderr


def test_without_torch_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = script(str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "torch and mulki must be importable" in done.stderr


# --- the plan


def machine(**changes: str | None) -> Any:
    found = {"device": "a card", "no_gpu": None, "sanitizer": "/bin/cs", "no_figures": None}
    return module("probe").Machine(**{**found, **changes})


def planned(tmp_path: Path, rehearse: bool = False, **changes: str | None) -> dict[str, Any]:
    steps = module("plan").plan(machine(**changes), tmp_path, 400.0, rehearse)
    return {step.name: step for step in steps}


def test_with_all_there_nothing_is_skipped(tmp_path: Path) -> None:
    steps = planned(tmp_path)
    assert all(step.skip is None for step in steps.values())
    assert list(steps)[:3] == ["environment", "tests", "throughput"]
    assert module("plan").variables(machine()) == {"MULKI_BACKEND": "triton", "MULKI_STRICT": "1"}
    assert module("plan").TOTAL + module("steps").GRACE < 8 * 60


def test_reasons(tmp_path: Path) -> None:
    steps = planned(tmp_path, no_gpu="it is old", sanitizer=None)
    assert {name for name, step in steps.items() if step.skip is None} == {"environment"}
    assert steps["throughput"].skip == steps["memcheck"].skip == "it is old"
    assert steps["figures"].skip == "nothing was measured: it is old"
    assert module("plan").variables(machine(no_gpu="it is old")) == {}
    steps = planned(tmp_path, sanitizer=None, no_figures="no matplotlib")
    skipped = {name: step.skip for name, step in steps.items() if step.skip}
    assert set(skipped) == {"memcheck", "racecheck", "figures"}
    assert "compute-sanitizer is neither" in skipped["memcheck"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_the_commands_ask_for_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All options are right up to the device, which is not here."""
    steps = planned(tmp_path)
    for name in ("throughput", "losses", "more", "largest"):
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
    tests = steps["tests"].commands(100.0)
    assert len(tests) == 9
    assert not any("--output" in command for command in tests.values())
    files = {word for command in tests.values() for word in command if word.endswith(".py")}
    here = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/gpu/test_*.py")}
    assert files == here
    (sanitized,) = steps["racecheck"].commands(30.0).values()
    assert sanitized[:5] == ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "/bin/cs", "--tool"] + [
        "racecheck"
    ]


# --- steps


def step(code: str, seconds: float = 60.0, skip: str | None = None) -> Any:
    command = [sys.executable, "-c", code]
    return module("steps").Step("one", seconds, lambda seconds: {"one": command}, skip)


def test_what_a_step_says_is_in_the_summary(tmp_path: Path) -> None:
    steps = module("steps")
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
    found = steps.run_step(step(code), tmp_path, 100.0, {"ONE": "x"})
    assert found.status == "failed" and found.name == "one"
    told = [remark.removeprefix("one.log: ") for remark in found.remarks]
    assert told[:2] == list(lines[:2]) and told[2] == "ERROR SUMMARY: 3 errors"
    assert told[3] == "failed: loss: relative error 1" and told[4:6] == list(lines[4:6])
    assert told[6:] == ["exit status 3"]
    skipped = steps.run_step(step("", skip="no card"), tmp_path, 100.0, {})
    text = steps.summary([found, skipped], "a card", 12.0)
    assert text.startswith("benchmarks/gpu.sh on a card: 0 ok, 1 failed, 1 skipped in 12 s\n")
    assert "\n          one.log: exit status 3\n" in text and "\n          no card\n" in text


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(p.pid, flush=True)\ntime.sleep(600)"
    )
    start = time.monotonic()
    found = module("steps").run_step(step(code, seconds=6.0), tmp_path, 100.0, {}, grace=0.5)
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
    steps = module("steps")
    found = steps.run_step(step("raise SystemExit(1)"), tmp_path, 1.0, {})
    assert found.status == "skipped" and "no time" in found.remarks[0]
    keeping = dataclasses.replace(step("raise SystemExit(1)"), keeps=20.0)
    assert steps.run_step(keeping, tmp_path, 22.0, {}).status == "skipped"


def test_commands_know_when_to_end(tmp_path: Path) -> None:
    code = "import os, time\nprint(float(os.environ['MULKI_GPU_DEADLINE']) - time.time())"
    found = module("steps").run_step(step(code, seconds=50.0), tmp_path, 20.0, {})
    assert found.status == "ok" and 0 < float((tmp_path / "one.log").read_text()) <= 20


def test_a_failed_step_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = module("__main__")
    (tmp_path / "ops.csv").write_text("of another run")
    for code, status in (("", 0), ("raise SystemExit(1)", 1)):
        monkeypatch.setattr(main, "_machine", machine)
        monkeypatch.setattr(main, "plan", lambda *a, code=code: [step(code), step("print(1)")])
        assert main.main([str(tmp_path)]) == status
        assert "2 ok" in capsys.readouterr().out or status
    assert not (tmp_path / "ops.csv").exists()


# --- what runs under the sanitizer


def test_the_small_cases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = module("small")
    operators = {"siglip": 0, "dual_teacher_kl": 2}
    monkeypatch.setattr(small, "OPERATORS", operators)
    monkeypatch.setattr(small, "SHAPES", ((5, 7, 8), (6, 4, 3)))
    assert small.main(["--device", "cpu", "--verify"]) == 0
    assert small.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.count(": ran\n") == 2 * 8
    assert small.main(["--device", "cpu", "--seconds", "-1"]) == 0
    assert "left out: 8 cases, out of time" in capsys.readouterr().out
    right = MULKI["siglip"]
    monkeypatch.setitem(MULKI, "siglip", lambda *arguments: 1.1 * right(*arguments))
    assert small.main(["--device", "cpu", "--verify"]) == 1
    assert "siglip 5x5x8 float32: loss: relative error 0.1" in capsys.readouterr().out
