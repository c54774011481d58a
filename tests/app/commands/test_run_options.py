from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mulki.app.cli import run_command
from mulki.app.commands.run_options import GROUPS, OFTEN, run_options
from mulki.choices.options import flag
from mulki.errors import InputError
from mulki.methods.mulki import MulKI
from mulki.train import sequence
from mulki.train.config.run_config import RunConfig, resolve
from tests import cli_helpers
from tests.cli_helpers import one_line

task = cli_helpers.task
command = cli_helpers.command


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
        (["mine", "--lora"], ['--lora: no such option (did you mean "lora-rank"?)']),
        (["mine", "--blur"], ["--blur: no such option; "]),
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume", "gone"], "--resume: no folder gone; pass that of a run"),
        (["--resume", "/"], "/ is not the folder of a run that has begun"),
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


def test_help_begins_with_a_short_usage_and_ends_with_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_command(["run", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "" and lines[0].startswith("usage: mulki run [TASKS ...]")
    examples = [line.split("   ")[0].strip() for line in lines[lines.index("examples:") + 1 :]]
    assert len(lines[0]) <= 80 and not any("None" in line for line in lines)
    assert len(examples) >= 4 and all(line.startswith("mulki run") for line in examples if line)


def test_help_has_the_defaults_with_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(["run", "--help", "--method", "mulki"])
    out = capsys.readouterr().out
    told = out[out.index("with the bundled model") : out.index("A preset has")].split()
    settings = resolve({"method": "mulki"})
    values = vars(settings.run) | vars(settings.method)
    found = dict(pairwise(told))
    for name in ("iterations", "lr", "precision", "text_text", "l2"):
        assert found[f"--{name.replace('_', '-')}"] == str(values[name])
    assert "--lock-text" in told and values["lock_text"] is True


def test_help_of_a_plan_has_no_option_that_a_plan_refuses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_command(["plan", "--help"])
    out = capsys.readouterr().out
    assert "--json" in out and "mulki run" not in out
    for refused in ("--resume", "--seeds", "--orders", "--methods", "--jobs"):
        assert f"  {refused} " not in out


def test_help_shows_the_options_of_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(["run", "--help", "--method", "finetune"])
    out = capsys.readouterr().out
    assert "--label-smoothing" in out and "--alpha" not in out


def test_going_on_from_a_run(
    finished: Path, refused: Callable[[Sequence[object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = resolved_by(monkeypatch, ["sizes/", "--continue", str(finished)])
    assert (seen["method"], seen["tasks"], seen["lr"]) == ("finetune", ["sizes/"], 1e-3)
    assert seen["continue"] == str(finished) and len(seen["test_tasks"]) == 2  # type: ignore[arg-type]
    seen, _ = resolved_by(
        monkeypatch,
        [
            "sizes/",
            "--continue",
            str(finished),
            "--method",
            "mulki",
            "--l2",
            "0.5",
            "--epochs",
            "2",
        ],
    )
    assert (seen["method"], seen["l2"], seen["epochs"], seen["lr"]) == ("mulki", 0.5, 2.0, 1e-3)
    assert "got no tasks to learn" in refused(["run", "--continue", finished])
    assert "--continue: nowhere: no such file" in refused(["run", "a", "--continue", "nowhere"])


def test_a_run_that_went_on_says_all_its_options(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its args.yaml makes it again."""
    words = ["sizes/", "--continue", str(finished), "--seed", "4"]
    seen, _ = resolved_by(monkeypatch, words)
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(seen))
    again, _ = resolved_by(monkeypatch, ["--config", str(tmp_path / "args.yaml")])
    assert again == seen


def test_help_is_short_and_help_all_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> tuple[set[str], list[str]]:
        with pytest.raises(SystemExit):
            run_command(["run", *words])
        out = capsys.readouterr().out
        lines = out[: out.index("with the bundled model")].splitlines()
        options = {w for line in lines for w in line[:40].split() if line.startswith("  -")}
        return {w.rstrip(",") for w in options if w.startswith("--")}, lines

    short, lines = shown("--help")
    often = {flag(name) for name in OFTEN}
    assert often <= short and len(lines) < 90
    # Beside these the help itself, files, and the options of a grid.
    assert len(short - often) < 12 and "--lock-text" not in short
    every, more = shown("--help-all")
    wanted = {flag(item.name) for of in (RunConfig, MulKI.Options) for item in fields(of)}
    assert wanted <= every and len(more) > 2 * len(lines)
    assert [*GROUPS] == ["data", "model", "training", "distillation", "output"]
    for title in GROUPS:
        assert f"{title}:" in lines and f"{title}:" in more


def test_every_option_is_in_one_group() -> None:
    names = [name for group in GROUPS.values() for name in group]
    known = {item.name for item in fields(RunConfig)}
    assert len(names) == len(set(names)) and set(names) | OFTEN <= known


def test_several_methods_are_a_grid() -> None:
    given, _ = run_options(["embedded", "--method", "finetune", "mulki", "--seed", "3"])
    assert given["methods"] == ["finetune", "mulki"] and given["tasks"] == ["embedded"]
    assert "method" not in given
    given, _ = run_options(["--method", "finetune", "embedded"])
    assert (given["method"], given["tasks"]) == ("finetune", ["embedded"])
