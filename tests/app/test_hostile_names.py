"""Names of folders, files, members and classes that control a terminal, through all commands."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mulki.app.cli import run_command
from tests import cli_helpers, train_helpers
from tests.train_helpers import COLOURS, write_task

command = cli_helpers.command
tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model

RED, SHOWN = "\x1b[31m", r"\x1b[31m"
RAW = ("\x1b", "\a", "\x9b", "\u202e")


def nothing_raw(capfd: pytest.CaptureFixture[str]) -> str:
    """What was printed, by libraries too; no control character is raw in it."""
    printed = "".join(capfd.readouterr())
    assert printed and not any(raw in printed for raw in RAW), printed
    return printed


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A task whose folder and whose classes have escapes in their names."""
    colours = {f"{RED}{name}\a\x9b\u202e": colour for name, colour in COLOURS.items()}
    return write_task(tmp_path / f"of{RED}\a" / "mine", colours, train=2, test=2)


def test_a_run_and_what_reads_it(
    hostile: Path, command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(hostile), "--iterations", "2", "--logs", f"logs{RED}", "--name", "one"]
    assert command(*arguments) == 0
    assert SHOWN in nothing_raw(capfd)
    run = f"logs{RED}/one"
    log = Path(run, "out.log").read_text(encoding="utf-8")
    assert not any(raw in log for raw in RAW) and SHOWN in log
    for words in (
        ["report", run, "--no-figures"],
        ["eval", run, "--device", "cpu"],
        ["metrics", f"{run}/matrix.csv"],
        ["compare", run, "--html", f"page{RED}.html"],
        ["tasks", str(hostile)],
        ["predict", run, str(hostile / "test")],
        ["run", "--resume", run],
    ):
        assert run_command(words) == 0
        nothing_raw(capfd)


def damaged_image(hostile: Path) -> list[str]:
    next(hostile.glob("train/*/0.png")).write_bytes(b"no image")
    return ["run", str(hostile)]


def damaged_member(hostile: Path) -> list[str]:
    folder = hostile.parent / "pets"
    folder.mkdir()
    (folder / "classes.txt").write_text("owl\nhawk\n")
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for name in (f"a{RED}0.png", f"a{RED}0.cls"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"no"))
    return ["tasks", str(folder), "--test-fraction", "0.5"]


def no_such_image(hostile: Path) -> list[str]:
    (hostile.parent / "names.csv").write_text(f"path,label,split\nx{RED}.png,owl,train\n")
    return ["tasks", str(hostile.parent / "names.csv")]


def option(hostile: Path) -> list[str]:
    return ["run", f"--lr{RED}", "1"]


def config(hostile: Path) -> list[str]:
    (hostile / "a.yaml").write_text('method: "\\e[31m\\a"\n')
    return ["run", "--config", str(hostile / "a.yaml")]


def header(hostile: Path) -> list[str]:
    (hostile / "matrix.csv").write_text(f"after_task,a\n{RED},x\n")
    return ["metrics", str(hostile / "matrix.csv")]


def unknown_command(hostile: Path) -> list[str]:
    return [RED]


def missing_file(hostile: Path) -> list[str]:
    return ["export", str(hostile / "none"), "--to", "huggingface", "out"]


@pytest.mark.parametrize(
    "words",
    [
        damaged_image,
        damaged_member,
        no_such_image,
        option,
        config,
        header,
        unknown_command,
        missing_file,
    ],
)
def test_what_is_refused(
    words: Callable[[Path], list[str]], hostile: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(words(hostile)) == 2
    assert SHOWN in nothing_raw(capfd)
