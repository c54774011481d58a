from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from mulki import __version__
from mulki.cli import main, run_command
from mulki.data.sequences import load_sequence
from mulki.engine import sequence
from mulki.errors import InputError
from mulki.metrics import read_matrix
from tests import engine_helpers
from tests.engine_helpers import COLOURS, SHADES, without_figures, write_task

tiny_models = engine_helpers.tiny_models
start_model = engine_helpers.start_model
task_folders = engine_helpers.task_folders
ROOT = Path(__file__).parent.parent
MATRIX = "after_task,a,b\nzero-shot,10,20\na,80,18\nb,70,90\n"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task folder that a test may damage."""
    return write_task(tmp_path / "mine", COLOURS, train=2, test=2)


@pytest.fixture
def command(
    tmp_path: Path, start_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`mulki run` with the tiny model, its run folders in tmp_path/logs."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str, model: bool = True) -> int:
        chosen = ["--model", start_model["model"]] if model else []
        fixed = ["--device", "cpu", "--precision", "fp32", "--batch-size", "4"]
        with without_figures():
            return run_command(["run", *chosen, *fixed, *arguments])

    return go


# What a run says before an error: its plan, and results and progress so far.
SAID = re.compile(
    r"(run|model|device|kernels|steps|memory|results) +|after |expected: |\d\d:\d\d:\d\d |mulki: "
)


def without_progress(error: str) -> list[str]:
    """The lines of standard error from the error or interrupt on; the others are progress."""
    lines = error.splitlines()
    first = next(i for i, x in enumerate(lines) if re.match("mulki: (error|interrupted)", x))
    assert all(SAID.match(line) for line in lines[:first]), lines
    return lines[first:]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, error = capsys.readouterr()
    assert out == "" and error.endswith("\n"), (out, error)
    (line,) = without_progress(error)
    assert line.startswith("mulki: error: ")
    return line + "\n"


# --- runs


def test_run_of_own_folders(
    command: Callable[..., int], task_folders: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--method mulki --seed 0 --iterations 2 --logs logs --name first".split()
    assert command("--tasks", *task_folders, *given) == 0
    out = capsys.readouterr().out
    assert "colours" in out and "shades" in out and "Transfer" in out
    assert re.search(r"class-incremental .*: average [\d.]+, last [\d.]+\n", out)
    assert str(Path("logs") / "first") in out
    assert read_matrix("logs/first/matrix.csv").tasks == ("colours", "shades")
    assert json.loads(Path("logs/first/summary.json").read_text())["status"] == "complete"


def resolved_by(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]
) -> tuple[dict[str, object], int]:
    """The configuration that a command line would run."""
    seen: dict[str, object] = {}

    def note(settings: object, console: object, resume: str | None) -> None:
        seen.update(settings.to_dict())  # type: ignore[attr-defined]
        raise InputError("noted")

    monkeypatch.setattr(sequence, "run", note)
    return seen, run_command(["run", *arguments])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["a", "b"], {"tasks": ["a", "b"]}),
        (["--tasks", "a", "b", "--seed", "3"], {"tasks": ["a", "b"], "seed": 3}),
        (["--seed", "3", "a", "--lr", "1e-3", "b"], {"tasks": ["a", "b"], "lr": 1e-3}),
        (["--batch-size", "7"], {"batch_size": 7}),
        (["--batch_size", "7"], {"batch_size": 7}),
        (["--batch_size=7"], {"batch_size": 7}),
        (["--batch-size=7"], {"batch_size": 7}),
        (["--logs=my_logs/a-b", "--name", "a_b"], {"logs": "my_logs/a-b", "name": "a_b"}),
        (["my_task", "--method=zero_shot"], {"tasks": ["my_task"], "method": "zero_shot"}),
        (["--lock-text"], {"lock_text": True}),
        (["--lock_text"], {"lock_text": True}),
        (["--no-lock-text"], {"lock_text": False}),
        (["--no_save_checkpoints"], {"save_checkpoints": False}),
        (["--no-eliciting", "--gate", "uniform"], {"eliciting": False, "gate": "uniform"}),
        (
            ["--gate", "blend", "--gate-entropy", "0.5", "--gate_label=2"],
            {"gate": "blend", "gate_entropy": 0.5, "gate_label": 2.0},
        ),
        (["--method", "lwf", "--temperature", "3"], {"method": "lwf", "temperature": 3.0}),
        (["--grad-clip-norm", "none"], {"grad_clip_norm": None}),
        (["--epochs", "0.5"], {"epochs": 0.5}),
        (
            ["-b", "7", "-j", "2", "--weight-decay", "0.1"],
            {"batch_size": 7, "workers": 2, "wd": 0.1},
        ),
        (["--T", "3", "--ls", "0.1"], {"temperature": 3.0, "label_smoothing": 0.1}),
        (["--output", "elsewhere"], {"logs": "elsewhere"}),
        (["--avg_freq", "50", "--wise-ft-alpha", "0.8"], {"we_every": 50, "alpha": 0.8}),
    ],
)
def test_spellings(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], wanted: dict[str, object]
) -> None:
    seen, _ = resolved_by(monkeypatch, arguments)
    assert {key: seen[key] for key in wanted} == wanted


def test_command_line_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.yaml"
    content = {"lr": 0.1, "batch-size": 9, "method": "lwf", "temperature": 5, "iterations": 3}
    config.write_text(yaml.safe_dump(content))
    seen, _ = resolved_by(monkeypatch, ["--config", str(config), "--lr", "0.2", "--epochs", "2"])
    assert (seen["lr"], seen["batch_size"], seen["epochs"]) == (0.2, 9, 2.0)
    assert (seen["method"], seen["temperature"]) == ("lwf", 5.0)
    content = {"epochs": 2, "tasks": ["a"], "lock_text": True}
    config.write_text(yaml.safe_dump(content))
    seen, _ = resolved_by(
        monkeypatch, [f"--config={config}", "--iterations", "4", "--no-lock-text", "b"]
    )
    assert (seen["iterations"], seen["epochs"], seen["tasks"]) == (4, None, ["b"])
    assert seen["lock_text"] is False


def test_the_configuration_of_another_methods_run_is_taken_without_its_own_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("method: mulki\nlr: 0.1\ntemperature: 5\nalpha: 0.5\n")
    seen, _ = resolved_by(monkeypatch, ["--config", str(config), "--method", "lwf"])
    assert (seen["method"], seen["lr"], seen["temperature"]) == ("lwf", 0.1, 5.0)
    assert "alpha" not in seen


def test_saved_configuration_is_taken(
    command: Callable[..., int], task_folders: Sequence[str]
) -> None:
    assert command(*task_folders, "--epochs", "0.1", "--logs", "logs", "--name", "one") == 0
    assert command("--config", "logs/one/args.yaml", "--name", "two", model=False) == 0
    one, two = (Path("logs") / name / "matrix.csv" for name in ("one", "two"))
    assert one.read_text() == two.read_text()


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone"], ["gone"]),
        (["mine", "gone/further"], ["gone/further"]),
        (["embeded"], ["embeded", '"embedded"']),
        (["mine", "--method", "mulky"], ["method", "mulky", '"mulki"']),
        (["mine", "--model", "RN51"], ["--model", "RN51", '"RN50"']),
        (["mine", "--model", "local-dir:gone"], ["local-dir:gone"]),
        (["mine", "--model", "RN50", "--pretrained", "opanai"], ["opanai", '"openai"']),
        (["mine", "--model", "RN50", "--pretrained", "gone.pt"], ["--pretrained", "gone.pt"]),
        (["mine", "--learning-rate", "1"], ["--learning-rate", "mulki run --help"]),
        (["mine", "--btach_size=2"], ["--btach-size", '"batch-size"']),
        (["mine", "-x"], ["-x"]),
        (["mine", "--lr"], ["--lr", "mulki run --help"]),
        (["mine", "--method"], ["--method", "mulki run --help"]),
        (["mine", "--lr", "fast"], ["--lr", "fast"]),
        (["mine", "--lr", "0"], ["--lr"]),
        (["mine", "--iterations", "1.5"], ["--iterations", "1.5"]),
        (["mine", "--iterations", "-3"], ["--iterations", "-3"]),
        (["mine", "--beta1", "1"], ["--beta1"]),
        (["mine", "--seed", "9" * 30], ["--seed"]),
        (["mine", "--precision", "fp9"], ["--precision", "fp9"]),
        (["mine", "--iterations", "5", "--epochs", "1"], ["--iterations", "--epochs"]),
        (["mine", "--method", "finetune", "--alpha", "1"], ["--alpha", "belongs to mulki"]),
        (["mine", "--device", "toaster"], ["--device", "toaster"]),
        (["mine", "--tasks", "mine"], ["--tasks", "mine"]),
        (["mine", "copies/mine"], ["mine"]),
        (["mine", "--order", "II"], ["II"]),
        (["mine", "--seed", "0", "1", "2"], ["--seed: got 0 1 2, wanted one", "--seeds 0 1 2"]),
        (["mine", "--lora"], ["--lora: no such option; "]),
        (["mine", "--model", "a/b-c"], ["no model 'a/b-c'", "hf-hub:a/b-c"]),
        (["mine", "--name", "a/b"], ["--name", "a/b"]),
        (["mine", "--lock-text=yes"], ["--lock-text"]),
        (["mine", "--lock-text", "--lock-image"], ["--lock-text"]),
        (["mine", "--config", "gone.yaml"], ["--config", "gone.yaml"]),
    ],
)
def test_bad_arguments(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: list[str],
) -> None:
    shutil.copytree(task, task.parent / "copies" / "mine")
    assert command(*arguments, model="--model" not in arguments) == 2
    line = one_line(capsys)
    assert all(part in line for part in said), line
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lerning_rate: 1\n", ["--lerning-rate"]),
        ("batchsize: 1\n", ["--batchsize", '"batch-size"']),
        ("lr: fast\n", ["--lr", "fast"]),
        ("seed: -1\n", ["--seed", "-1"]),
        ("workers: [1]\n", ["--workers"]),
        ("method: mulky\n", ["mulky"]),
        ("method: lwf\nalpha: 0.5\n", ["--alpha", "belongs to mulki"]),
        ("iterations: 5\nepochs: 1\n", ["--iterations", "--epochs"]),
        ("- lr\n", ["--config"]),
        ("lr: [\n", ["--config"]),
        ("lr: 1\nseed: 1\nlr: 2\n", ["--config", "line 3: the option lr is given twice"]),
        ("batch_size: 1\nbatch-size: 2\n", ["line 2: the option batch-size is given twice"]),
        ('name: "a\\0b"\n', ["--name"]),
        ("seed: !!python/object/apply:os.system [touch made]\n", ["--config"]),
    ],
)
def test_bad_configuration(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    said: list[str],
) -> None:
    Path("bad.yaml").write_text(text)
    assert command(str(task), "--config", "bad.yaml") == 2
    line = one_line(capsys)
    assert all(part in line for part in said), line
    assert "bad.yaml" in line or "mulky" in text
    assert not Path("logs").exists()


def without_a_class(task: Path) -> str:
    for image in (task / "train" / "red").iterdir():
        image.unlink()
    return str(Path("mine") / "train" / "red")


def with_another_class(task: Path) -> str:
    (task / "test" / "red").rename(task / "test" / "pink")
    return "only in train: red; only in test: pink"


def without_test(task: Path) -> str:
    shutil.rmtree(task / "test")
    return "no test/"


def with_a_damaged_image(task: Path) -> str:
    (task / "test" / "blue" / "1.png").write_bytes(b"no image")
    return str(Path("mine") / "test" / "blue" / "1.png")


def as_a_file(task: Path) -> str:
    shutil.rmtree(task)
    task.write_text("a file")
    return "mine: a file"


@pytest.mark.parametrize(
    "damage",
    [without_a_class, with_another_class, without_test, with_a_damaged_image, as_a_file],
)
def test_bad_task_folders(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], str],
) -> None:
    said = damage(task)
    assert command("--tasks", "mine") == 2
    assert said in one_line(capsys)
    assert not Path("logs").exists()


def test_skipping_bad_images_goes_on(command: Callable[..., int], task: Path) -> None:
    with_a_damaged_image(task)
    assert command("mine", "--skip-bad-images", "--iterations", "1", "--name", "skipped") == 0
    assert "1 unreadable images left out" in Path("logs/skipped/out.log").read_text()


def test_taken_run_folder(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("logs/first").mkdir(parents=True)
    Path("logs/first/matrix.csv").write_text("mine")
    monkeypatch.setattr("mulki.models.load", lambda *a, **k: pytest.fail("loaded"))
    assert command("mine", "--name", "first") == 2
    line = one_line(capsys)
    assert str(Path("logs") / "first") in line and "--name" in line
    assert [p.name for p in Path("logs/first").iterdir()] == ["matrix.csv"]


def test_loss_that_is_not_finite(
    command: Callable[..., int], task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("mine", "--lr", "1e30", "--name", "first") == 2
    assert "--lr 1e+30" in one_line(capsys)
    assert json.loads(Path("logs/first/summary.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], ["rnu", '"run"']),
        (["--hepl"], ["--hepl", "mulki --help"]),
        (["metrics"], ["MATRIX"]),
        (["metrics", "gone.csv"], ["gone.csv"]),
        (["metrics", "a.csv", "b.csv"], ["b.csv"]),
        (["compare"], ["RUN"]),
        (["compare", "gone"], ["gone", "not the folder of a run"]),
        (["report"], ["RUN"]),
        (["report", "gone"], ["gone", "no such folder"]),
        (["tasks", "gone"], ["gone"]),
        (["tasks", "--jsn"], ["--jsn"]),
    ],
)
def test_bad_commands(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    assert run_command(arguments) == 2
    line = one_line(capsys)
    assert all(part in line for part in said), line


# --- processes

WAIT_S = 600  # of a busy machine; seconds otherwise


def program(*arguments: str) -> subprocess.Popen[str]:
    # A process that a shell or nohup has started in the background ignores some signals.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "hasattr(signal, 'SIGHUP') and signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from mulki.cli import main; main()"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupted_process(
    tmp_path: Path, start_model: dict[str, str], task_folders: Sequence[str]
) -> None:
    folder = tmp_path / "logs" / "first"
    given = ["run", *task_folders, "--model", start_model["model"], "--device", "cpu"]
    place = ["--logs", str(tmp_path / "logs"), "--name", "first"]
    endless = ["--iterations", "1000000", "--log-every-n-steps", "1"]
    process = program(*given, *place, *endless)
    try:
        deadline = time.monotonic() + WAIT_S
        log = folder / "out.log"
        while not (log.exists() and "colours step 3:" in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert without_progress(error) == [
        "mulki: interrupted",
        f"results so far: {folder / 'report.html'}",
        f"to go on: mulki run --resume {folder}",
    ]
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    matrix = read_matrix(folder / "matrix.csv")
    assert matrix.zero_shot is not None and matrix.tasks == ()
    assert "run stopped by Stopped: SIGINT" in log.read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_process_that_is_asked_to_end_goes_on_later(
    tmp_path: Path, start_model: dict[str, str], task_folders: Sequence[str], name: str
) -> None:
    folder = tmp_path / "logs" / "first"
    given = ["run", *task_folders, "--model", start_model["model"], "--device", "cpu"]
    place = ["--logs", str(tmp_path / "logs"), "--name", "first"]
    process = program(*given, *place, "--iterations", "100", "--log-every-n-steps", "1")
    try:
        deadline = time.monotonic() + WAIT_S
        log = folder / "out.log"
        while not (log.exists() and "colours step 3:" in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.Signals[name])
        _, error = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.Signals[name]
    assert without_progress(error) == [
        "mulki: interrupted",
        f"results so far: {folder / 'report.html'}",
        f"to go on: mulki run --resume {folder}",
    ]
    assert f"run stopped by Stopped: {name}" in log.read_text()
    for page in ("summary.md", "report.html"):
        assert "interrupted" in (folder / page).read_text()
    steps = re.findall(r"colours step (\d+):", log.read_text())
    assert run_command(["run", "--resume", str(folder)]) == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "complete"
    again = re.findall(r"colours step (\d+):", log.read_text())
    # It goes on after the step that the signal came in.
    assert list(map(int, again)) in (
        list(range(1, 101)), [*range(1, len(steps) + 1), *range(len(steps) + 2, 101)]
    )  # fmt: skip


def test_a_full_disk_is_one_line(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every file-system call fails from the first save within a task on, as on a full disk."""
    from mulki.engine import recovery

    def full(*given: object, **rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))

    def fill_up(path: Path, state: dict[str, object]) -> None:
        monkeypatch.setattr(os, "open", full)
        monkeypatch.setattr(os, "fsync", full)
        monkeypatch.setattr(Path, "write_text", full)
        full(path)

    monkeypatch.setattr(recovery, "write_state", fill_up)
    assert command("mine", "--iterations", "3", "--save-every", "2", "--name", "first") == 1
    monkeypatch.undo()
    place = Path("logs") / "first" / "recovery"
    assert one_line(capsys).startswith(f"mulki: error: {place}")
    assert read_matrix(task.parent / "logs" / "first" / "matrix.csv").zero_shot is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume", "gone"], "gone is not the folder of a run that has begun"),
        (["--resume", "gone", "--lr", "1"], "got --lr 1 beside it"),
        (["tasks", "--resume=gone"], "got tasks beside it"),
        (["--resume"], "expected one argument"),
    ],
)
def test_bad_ways_to_go_on(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run_command(["run", *arguments]) == 2
    assert said in one_line(capsys)


def test_bad_input_of_a_process_is_one_line(tmp_path: Path, task_folders: Sequence[str]) -> None:
    (tmp_path / "logs" / "taken").mkdir(parents=True)
    (tmp_path / "logs" / "taken" / "x").touch()
    place = ["--logs", str(tmp_path / "logs"), "--name", "taken"]
    process = program("run", *task_folders, "--model", "RN50", *place)
    out, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2 and out == ""
    assert len(error.splitlines()) == 1 and str(tmp_path / "logs" / "taken") in error


def test_trouble_in_a_run_is_one_line_too(
    tmp_path: Path, start_model: dict[str, str], task_folders: Sequence[str]
) -> None:
    given = ["run", *task_folders, "--model", start_model["model"], "--device", "cpu"]
    process = program(*given, "--lr", "1e30", "--logs", str(tmp_path / "logs"))
    out, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2 and out == ""
    (line,) = without_progress(error)
    assert "--lr 1e+30" in line


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mulki", "metrics", "gone.csv"])
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 2


def test_interrupt_outside_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mulki.metrics.read_matrix", interrupt)
    assert run_command(["metrics", "m.csv"]) == 130
    assert capsys.readouterr().err == "mulki: interrupted\n"


# --- the other commands


def test_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.csv"
    path.write_text(MATRIX)
    assert run_command(["metrics", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"transfer", "average", "last", "forgetting", "bwt"}
    assert found == read_matrix(path).metrics().to_dict()
    assert found["last"] == 80.0 and found["transfer"] == 18.0
    assert run_command(["metrics", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("Transfer", "Average", "Last", "Forgetting", "BWT", "zero-shot", "80.0"):
        assert words in out


def test_metrics_without_zero_shot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.csv"
    path.write_text(MATRIX.replace("zero-shot,10,20\n", ""))
    assert run_command(["metrics", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["last"] == 80.0


def test_compare(
    command: Callable[..., int], task_folders: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("finetune", "mulki"):
        given = f"--method {name} --iterations 2 --logs logs --name {name}".split()
        assert command(*task_folders, *given) == 0
    capsys.readouterr()
    assert run_command(["compare", "logs/finetune", "logs/mulki", "--json"]) == 0
    (section,) = json.loads(capsys.readouterr().out)["sections"]
    assert section["tasks"] == ["colours", "shades"] and section["baseline"] == "finetune"
    (difference,) = section["differences"]
    assert "images" in difference["over"] and difference["metrics"].keys() == {
        "transfer", "average", "last", "forgetting", "cil_average", "cil_last"
    }  # fmt: skip
    assert run_command(["compare", "logs/finetune", "logs/mulki", "--baseline", "mulki"]) == 0
    out = capsys.readouterr().out
    assert "colours, shades" in out and "less mulki" in out and "CIL average" in out
    assert run_command(["compare", "logs/mulki", "--baseline", "lwf"]) == 2
    assert "--baseline" in one_line(capsys)
    assert run_command(["compare", "--html", "logs", "logs/mulki"]) == 2
    assert "--html: logs is a folder" in one_line(capsys)
    # Numbers alone on standard output, with one run whose file is gone.
    Path("logs/finetune/args.yaml").rename("kept.yaml")
    given = ["logs/finetune", "logs/mulki", "--json", "--html", "all.html", "--figures", "drawn"]
    assert run_command(["compare", *given]) == 0
    out, error = capsys.readouterr()
    assert "args.yaml is not there" in json.loads(out)["warnings"][0]
    assert error == "page: all.html\nfigures: drawn\n"
    assert "<h2>colours, shades</h2>" in Path("all.html").read_text()
    assert {path.suffix for path in Path("drawn").iterdir()} == {".png", ".svg"}
    Path("kept.yaml").rename("logs/finetune/args.yaml")
    # A report of a run, and of one whose process was killed.
    Path("logs/finetune/matrix.csv").unlink()
    assert run_command(["report", "logs/mulki", "logs/finetune"]) == 0
    pages = capsys.readouterr().out.splitlines()
    assert pages == [str(Path("logs", name, "report.html")) for name in ("mulki", "finetune")]
    page, damaged = (Path(each).read_text() for each in pages)
    assert "Missing in this folder" not in page and page.count("<svg") == 10
    assert "matrix.csv is not there" in damaged
    assert (Path("logs/mulki/plots") / "losses.png").exists()


def test_tasks_of_folders(task_folders: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tasks", *task_folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "colours", "classes": sorted(COLOURS)},
        {"name": "shades", "classes": sorted(SHADES)},
    ]
    assert run_command(["tasks", *task_folders]) == 0
    out = capsys.readouterr().out
    assert re.search(r"colours\W+3\W+18\W+15\W+a photo of a \{\}\.", out)


def test_names_of_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tasks"]) == 0
    assert "embedded" in capsys.readouterr().out.splitlines()
    assert run_command(["tasks", "--json"]) == 0
    assert "embedded" in json.loads(capsys.readouterr().out)


def test_tasks_of_the_bundled_pack(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        load_sequence(["embedded"])
    except (InputError, ImportError):
        pytest.skip("the bundled pack is not in this checkout")
    names = []
    for order in ("I", "II"):
        assert run_command(["tasks", "embedded", "--order", order, "--json"]) == 0
        tasks = json.loads(capsys.readouterr().out)
        assert all(t.keys() == {"name", "classes"} and len(t["classes"]) >= 2 for t in tasks)
        names.append([t["name"] for t in tasks])
    assert len(names[0]) == 6 and sorted(names[0]) == sorted(names[1]) and names[0] != names[1]
    assert run_command(["tasks", "embedded", "--order", "IX"]) == 2
    assert "IX" in one_line(capsys)


@pytest.mark.parametrize("arguments", [["--version"], []])
def test_version_and_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run_command(arguments) == 0
    out = capsys.readouterr().out
    wanted = [__version__] if arguments else ["usage: mulki", "run ", "metrics ", "tasks "]
    assert all(words in out for words in wanted)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--help"], ["usage: mulki", "run"]),
        (["-h"], ["usage: mulki", "run"]),
        (["run", "--help"], ["--batch-size", "--skip-bad-images", "--eliciting", "default: 0.2"]),
        (["run", "--help", "--method", "lwf"], ["--distill-weight"]),
        (["metrics", "--help"], ["--json", "MATRIX"]),
        (["compare", "--help"], ["--baseline", "--html", "--json", "RUN"]),
        (["tasks", "--help"], ["--order", "NAME"]),
    ],
)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str], wanted: list[str]) -> None:
    try:
        assert run_command(arguments) == 0
    except SystemExit as leave:  # argparse's own way out
        assert leave.code == 0
    out, error = capsys.readouterr()
    assert all(words in out for words in wanted) and error == ""


def test_help_begins_with_a_short_usage_and_ends_with_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_command(["run", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "" and lines[0].startswith("usage: mulki run [TASKS ...]")
    examples = [line.split("   ")[0].strip() for line in lines[lines.index("examples:") + 1 :]]
    assert len(examples) >= 4 and all(line.startswith("mulki run") for line in examples if line)


def test_help_shows_the_options_of_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(["run", "--help", "--method", "finetune"])
    out = capsys.readouterr().out
    assert "--label-smoothing" in out and "--alpha" not in out
