"""``--import``: what a user's own module adds, and what is said when it cannot be used."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from mulki import methods
from mulki.app.cli import run_command
from mulki.app.commands.run_options import run_options
from mulki.choices.registration import place_of
from mulki.data import transforms
from mulki.errors import InputError
from mulki.train.config.imports import import_modules
from mulki.train.config.run_config import read_config, resolve
from tests import import_helpers, train_helpers

registries = import_helpers.registries
tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model
task_folders = train_helpers.task_folders

METHOD = """
    from dataclasses import dataclass
    from mulki.methods import Method, option
    from mulki.methods.finetune import Finetune

    class Halved(Finetune):
        name = "halved"
        summary = "half of the loss"

        @dataclass(frozen=True)
        class Options(Finetune.Options):
            factor: float = option(0.5, "coefficient of the loss", above=0)

        def losses(self, student, teachers, target):
            found = super().losses(student, teachers, target)
            return {name: self.options.factor * loss for name, loss in found.items()}
"""
TRANSFORM = """
    import torch
    from mulki.data import register_transform

    class Noisy:
        def __init__(self, before):
            self.before = before

        def __call__(self, image):
            x = self.before(image)
            return x + 0.1 * torch.rand_like(x)

    @register_transform("noisy")
    def noisy(preprocess, size, mean, std):
        return Noisy(preprocess)
"""
SEQUENCE = """
    from mulki.data import folder_task, register_sequence

    @register_sequence("pair")
    def pair(order):
        tasks = [folder_task({0!r}), folder_task({1!r})]
        return tasks if order == "I" else tasks[::-1]
"""


def write(name: str, code: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(textwrap.dedent(code))
    return name


def refused(module: str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        import_modules([module])
    message = str(caught.value)
    assert message.startswith("--import: ") and all(word in message for word in words), message


# --- what is found


def test_a_run_with_a_method_a_sequence_and_a_transform_of_ones_own(
    start_model: dict[str, str], task_folders: Sequence[str]
) -> None:
    write("my_method.py", METHOD)
    write("my_package/__init__.py", "")
    write("my_package/images.py", TRANSFORM + SEQUENCE.format(*task_folders))
    given = ["--import", "./my_method.py", "pair", "--import=my_package.images"]
    chosen = ["--method", "halved", "--factor", "0.25", "--augment", "noisy", "--order", "II"]
    fixed = ["--model", start_model["model"], "--device", "cpu", "--iterations", "2", "-b", "4"]
    assert run_command(["run", *given, *chosen, *fixed, "--name", "first"]) == 0

    saved = yaml.safe_load(Path("logs/first/args.yaml").read_text())
    assert saved["import"] == [str(Path("my_method.py").resolve()), "my_package.images"]
    assert (saved["method"], saved["factor"], saved["augment"]) == ("halved", 0.25, "noisy")
    assert run_command(["run", "--config", "logs/first/args.yaml", "--name", "second"]) == 0
    first, second = (Path("logs", name, "matrix.csv").read_text() for name in ("first", "second"))
    assert first == second and first.splitlines()[2].startswith("shades")


@pytest.mark.long
def test_a_saved_configuration_imports_in_a_process_of_its_own(
    start_model: dict[str, str], task_folders: Sequence[str]
) -> None:
    """With workers that start a new interpreter and have to unpickle the transform of the file."""
    write("my_transform.py", TRANSFORM)
    config = {
        "import": "my_transform.py",
        "tasks": list(task_folders)[:1],
        "model": start_model["model"],
        "method": "finetune",
        "augment": "noisy",
        "iterations": 2,
        "batch-size": 4,
        "device": "cpu",
        "save_checkpoints": False,
        "head": False,
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))
    code = (
        "import multiprocessing, sys\n"
        "from mulki.app.cli import run_command\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    sys.exit(run_command(sys.argv[1:]))\n"
    )
    write("start.py", code)
    assert run_command(["run", "--config", "c.yaml", "--name", "0"]) == 0
    done = subprocess.run(
        [sys.executable, "start.py", "run", "--config", "c.yaml", "--workers", "1", "--name", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    zero, one = (Path("logs", name, "matrix.csv").read_text() for name in "01")
    assert zero == one


def test_help_lists_what_was_imported(capsys: pytest.CaptureFixture[str]) -> None:
    write("mine.py", METHOD + TRANSFORM + SEQUENCE.format("a", "b"))
    with pytest.raises(SystemExit):
        run_command(["run", "--help-all", "--import", "mine.py", "--method", "halved"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"{{{','.join(methods.available())}}}" in out and "half of the loss" in out
    assert "halved" in methods.available()
    assert "noisy" in out
    assert {"embedded", "mtil", "pair"} <= set(re.split("[, ]+", out[out.index("sequences:") :]))
    assert "--factor FACTOR" in out and "coefficient of the loss" in out
    assert "--import MODULE" in out


def test_errors_offer_what_was_imported(capsys: pytest.CaptureFixture[str]) -> None:
    mine = write("mine.py", METHOD + TRANSFORM + SEQUENCE.format("a", "b"))
    for arguments, said in (
        (["--method", "halfed"], '(did you mean "halved"?)'),
        (["--augment", "noise"], '(did you mean "noisy"?), wanted one of none, crop, flip'),
        (["--factor", "2"], "it belongs to halved"),
        (["--method", "halved", "--factor", "0"], "--factor: got 0.0, wanted a number above 0"),
        (["pear", "--model", "mulki-mini"], '(did you mean "pair"?)'),
        (["pair", "--imports", "x"], '--imports: no such option (did you mean "import"?)'),
    ):
        assert run_command(["run", "--import", mine, *arguments]) == 2
        assert said in capsys.readouterr().err


def test_tasks_of_an_imported_sequence(
    capsys: pytest.CaptureFixture[str], task_folders: Sequence[str]
) -> None:
    mine = write("mine.py", SEQUENCE.format(*task_folders))
    assert run_command(["tasks", "--import", mine, "pair", "--order", "II", "--json"]) == 0
    assert [task["name"] for task in json.loads(capsys.readouterr().out)] == ["shades", "colours"]
    assert run_command(["tasks", "--import", mine]) == 0
    names = capsys.readouterr().out.split()
    assert "pair" in names and names == sorted(names)


def test_the_configuration_and_the_command_line_both_import() -> None:
    write("one.py", TRANSFORM)
    write("two.py", METHOD)
    Path("c.yaml").write_text("import: [one.py]\nmethod: halved\naugment: noisy\n")
    assert run_command(["run", "--config", "c.yaml", "--import", "two.py", "gone"]) == 2
    settings = resolve(read_config("c.yaml"))
    one = str(Path("one.py").resolve())
    assert settings.run.import_ == (one,) and settings.method.factor == 0.5
    assert resolve({"import": ["one.py", "./one.py", one]}).to_dict()["import"] == [one]


def test_the_class_of_a_file_pickles_under_the_name_of_the_file() -> None:
    import_modules([write("deep/my_transform.py", TRANSFORM)])
    noisy = transforms._BUILDERS["noisy"](str, 1, [], [])
    assert type(noisy).__module__ == "my_transform"
    assert place_of(type(noisy)) == str(Path("deep/my_transform.py, line 5"))


def test_an_option_named_as_a_keyword_of_python() -> None:
    mine = write("mine.py", METHOD.replace("factor: ", "lambda_: ").replace(".factor", ".lambda_"))
    Path("c.yaml").write_text("method: halved\nlambda: 0.75\n")
    settings = resolve({"import": mine} | read_config("c.yaml"))
    assert settings.method.lambda_ == 0.75 and settings.to_dict()["lambda"] == 0.75
    given, _ = run_options(["--config", "c.yaml", "--import", mine, "--method", "lwf"])
    assert resolve(given).to_dict().keys() & {"lambda", "lambda_"} == set()
    given, _ = run_options(["--config", "c.yaml", "--import", mine, "--lambda", "0.2"])
    assert resolve(given).method.lambda_ == 0.2


def test_a_second_import_costs_nothing() -> None:
    write("mine.py", "import sys\nsys.imported = getattr(sys, 'imported', 0) + 1\nx = 1\n")
    try:
        import_modules(["mine.py", "./mine.py", "mine"])
        assert sys.imported == 1  # type: ignore[attr-defined]
    finally:
        del sys.imported  # type: ignore[attr-defined]


def test_nothing_registered_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    mine = write("mine.py", "x = 1\n")
    with caplog.at_level(logging.WARNING):
        import_modules([mine])
    assert "mine.py registers nothing" in caplog.text and "training transform" in caplog.text
    caplog.clear()
    import_modules([write("another.py", TRANSFORM)])
    assert not caplog.text


def test_the_same_file_is_found_from_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    write("mine.py", TRANSFORM)
    saved = resolve({"import": "mine.py", "augment": "noisy"}).to_dict()
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert resolve(saved).to_dict()["import"] == saved["import"]


def test_run_and_tasks_say_the_same_of_import(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["run", "--help-all"], ["tasks", "--help"]):
        with pytest.raises(SystemExit):
            run_command(command)
        out = " ".join(capsys.readouterr().out.split())
        assert "a Python file or module with methods, sequences, transforms or gates" in out


# --- what is refused


@pytest.mark.parametrize("module", ["", ".pkg", "pkg.", "a..b"])
def test_an_import_path_that_cannot_be_one(module: str) -> None:
    refused(module, f"got {module!r}, wanted a Python file", "as pkg.module")


def test_a_file_of_a_package_needs_its_import_path() -> None:
    write("pkg/__init__.py", "")
    write("pkg/other.py", "x = 1\n")
    refused(write("pkg/mine.py", "from . import other\n"), "line 1", "give its import path, as")


@pytest.mark.parametrize("code", [METHOD, TRANSFORM, SEQUENCE.format("a", "b")])
def test_a_module_that_failed_half_way_says_so_again(code: str) -> None:
    mine = write("mine.py", textwrap.dedent(code) + "\nraise ValueError('half')\n")
    refused(mine, "mine.py fails at mine.py, line ", "(ValueError: half)")
    refused(mine, "mine.py fails at mine.py, line ", "(ValueError: half)", "start Python again")


def test_two_names_in_one_module_are_refused_again() -> None:
    mine = write("mine.py", METHOD.replace('"halved"', '"lwf"'))
    refused(mine, 'method "lwf"')
    refused(mine, 'method "lwf"', "start Python again")


def test_a_file_that_cannot_be_one() -> None:
    refused("./gone.py", "./gone.py: no such file")
    refused("gone.py", "gone.py: no such file")
    Path("folder").mkdir()
    refused("./folder", "./folder: a folder", "Python file")
    refused(write("my-gate.py", ""), "my-gate.py", "rename")
    refused(write("notes/mine.txt", ""), "mine.txt", "rename")


@pytest.mark.parametrize("name", ["json", "sys", "yaml", "textwrap"])
def test_a_file_named_as_another_module(name: str) -> None:
    refused(write(f"{name}.py", TRANSFORM), f"the name {name} belongs to another module", "rename")


def test_two_files_of_one_name() -> None:
    import_modules([write("a/mine.py", TRANSFORM)])
    refused(write("b/mine.py", METHOD), "b/mine.py", str(Path("a/mine.py")), "rename")


def test_a_module_that_does_not_exist() -> None:
    refused("gone_package.gone", "there is no module 'gone_package'", "./gone_package/gone.py")
    refused("json.gone", "there is no module 'json.gone'")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1\ny = z\n", "line 2 (NameError: name 'z' is not defined)"),
        ("x = 1\n\ndef f(:\n", "line 3 ("),
        ("import gone_package\n", "line 1 (ModuleNotFoundError: No module named 'gone_package')"),
        ("def f():\n    raise ValueError\n\nf()\n", "line 4 (ValueError)"),
        ("import sys\nsys.exit('usage')\n", "line 2 (SystemExit: usage)"),
    ],
)
def test_a_module_that_fails(code: str, said: str) -> None:
    refused(write("mine.py", code), "mine.py fails at mine.py, ", said, "correct it")


@pytest.mark.parametrize(
    ("one", "two", "kind"),
    [
        (METHOD, METHOD.replace("Halved", "Other"), 'method "halved"'),
        (TRANSFORM, TRANSFORM, 'training transform "noisy"'),
        (SEQUENCE.format("a", "b"), SEQUENCE.format("b", "a"), 'task sequence "pair"'),
    ],
)
def test_one_name_registered_twice(one: str, two: str, kind: str) -> None:
    import_modules([write("one.py", one)])
    refused(write("two.py", two), kind, "one.py, line ", "two.py, line ", "rename one of the two")


def test_a_name_of_our_own_registered_again() -> None:
    again = METHOD.replace('"halved"', '"lwf"')
    refused(write("mine.py", again), 'method "lwf"', str(Path("methods/lwf.py")), "mine.py, line ")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('summary = "half of the loss"', "", None),
        ('option(0.5, "coefficient of the loss", above=0)', "0.5", "option factor"),
        ("@dataclass(frozen=True)", "", "option factor"),
        ("(Finetune):\n        name", "(Method):\n        name", None),
    ],
)
def test_a_method_that_lacks_something(old: str, new: str, said: str | None) -> None:
    code = METHOD.replace(old, new)
    assert code != METHOD
    if said is None:
        # A subclass of a built-in method inherits what it does not define.
        code = code.replace("Finetune.Options", "Method.Options").replace("(Finetune)", "(Method)")
        code = code.replace('summary = "half of the loss"', "")
        said = "has no summary"
    refused(write("mine.py", code), 'method "halved" (mine.py, line ', said)


def test_an_option_that_the_run_has(capsys: pytest.CaptureFixture[str]) -> None:
    mine = write("mine.py", METHOD.replace("factor", "lr"))
    assert run_command(["run", "--import", mine, "--method", "halved"]) == 2
    error = capsys.readouterr().err
    assert "method halved" in error and "--lr" in error and "rename" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [("import: 3\n", "--import: got 3"), ("import: [gone.py]\n", "gone.py: no such file")],
)
def test_errors_name_the_configuration(
    capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    Path("c.yaml").write_text(text)
    assert run_command(["run", "--config", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert "c.yaml: --import: " in error and said in error and error.count("\n") == 1
