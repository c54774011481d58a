"""The command ``mulki``; `mulki --help` lists what it does.

Bad input ends with one line on standard error and exit status 2, an error of the system with 1, and
a signal with 128 and its number.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mulki.app.commands import completion
from mulki.app.commands.parsing import Parser, add_options, with_hyphens
from mulki.errors import InputError, ProcessLost, Stopped, counted, nearest, says_no_memory
from mulki.printing import say

_COMPLETION_EXAMPLES = """run once, or put it into the shell's start file:
  bash, ~/.bashrc                    eval "$(mulki completion bash)"
  zsh, ~/.zshrc after compinit       eval "$(mulki completion zsh)"
  fish, ~/.config/fish/config.fish   mulki completion fish | source
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with the status of the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may be unable to show a name; a run must not fail at its end for that.
        sys.stdout.reconfigure(errors="backslashreplace")
    status = run_command(sys.argv[1:] if argv is None else argv)
    try:
        if sys.stdout is not None:  # as it is where the program was started without one
            sys.stdout.flush()
    except OSError as error:
        # Python would try again while it ends, and complain in many lines.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not (status or isinstance(error, BrokenPipeError)):
            _print_error(f"standard output: {error.strerror}")
        status = status or 1
    sys.exit(status)


def run_command(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    try:
        return _dispatch(list(argv))
    except InputError as error:
        _print_error(str(error))
        return 2
    except ProcessLost as lost:
        if not lost.quiet:
            say(f"mulki: error: {lost}", sys.stderr)
        _print_way_on(lost)
        return 1
    except Stopped as stopped:
        print("mulki: interrupted", file=sys.stderr)
        _print_way_on(stopped)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("mulki: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The program that reads our output has ended, as `head` does after its lines.
        return 1
    except OSError as error:
        # The disk is full, or a file cannot be read; out.log of a run has the traceback.
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}")
        return 1
    except Exception as error:
        if says_no_memory(error):
            # As on a full disk, out.log of a run has the traceback.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            _print_error(
                f"out of memory ({reason}); end other programs, or lower --batch-size or "
                "--micro-batch"
            )
            return 1
        if _is_one_of_several():
            # The traceback that follows does not say whose it is.
            _print_error(f"{type(error).__name__}: {error}")
        raise


def _print_error(message: str) -> None:
    where = f" in process {os.environ.get('RANK', '0')}" if _is_one_of_several() else ""
    say(f"mulki: error{where}: {message}", sys.stderr)


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _print_way_on(ended: Stopped | ProcessLost) -> None:
    if ended.results:
        say(f"results so far: {os.path.join(ended.results, 'report.html')}", sys.stderr)
    if ended.resume:
        say(f"to go on: mulki run --resume {shlex.quote(ended.resume)}", sys.stderr)


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "plan": _plan,
        "predict": _predict,
        "eval": _eval,
        "export": _export,
        "metrics": _metrics,
        "compare": _compare,
        "report": _report,
        "reproduce": _reproduce,
        "tasks": _tasks,
        "bench": _bench,
        "doctor": _doctor,
        "completion": _completion,
    }
    if completion.is_asked():
        return completion.complete(commands)
    if argv[:1] == ["--"]:
        # In `torchrun -m mulki -- run ...` it separates our options from those of torchrun.
        argv = argv[1:]
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_usage(commands))
        return 0
    if name == "--version":
        from mulki import __version__

        print(f"mulki {__version__}")
        return 0
    if name not in commands:
        raise InputError(
            f"command {name}: does not exist{nearest(name, commands)}; mulki --help lists them"
        )
    return commands[name](argv[1:])


def _usage(commands: dict[str, Callable[[list[str]], int]]) -> str:
    lines = ["usage: mulki COMMAND ..., mulki COMMAND --help", ""]
    for name, command in commands.items():
        lines.append(f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def _run(argv: list[str]) -> int:
    """Learn a sequence of tasks: mulki run embedded, or mulki run --tasks DIR1 DIR2"""
    from rich.text import Text

    from mulki.app.commands.grid import is_grid, run_grid
    from mulki.app.commands.run_options import run_options
    from mulki.app.commands.training import prepare_process
    from mulki.console import Console
    from mulki.report.tables import print_matrix
    from mulki.runs.results import read_evaluations
    from mulki.train.config.run_config import resolve
    from mulki.train.saving.restarts import restart_of
    from mulki.train.sequence import run

    prepare_process()
    console = Console()
    given, resume = run_options(argv, description=_run.__doc__)
    if is_grid(given):
        run_grid(given, console)
        return 0
    settings = resolve(given)
    if resume is None and (again := restart_of(settings)) is not None:
        settings, resume = again[0], str(again[1])
    folder = run(settings, Console(stderr=True), resume=resume)
    if folder is None:  # another process of the run prints
        return 0
    lines = read_evaluations(folder.path / "results.jsonl")
    method = settings.run.method
    print_matrix(folder.matrix, console, folder.class_incremental, lines, folder.with_head, method)
    for line in _next_steps(folder.path):
        console.print(Text(line), soft_wrap=True)
    return 0


def _next_steps(folder: Path) -> list[str]:
    # What there is now, and what can be done with it.
    named = shlex.quote(str(folder))
    lines = [f"run folder: {folder}", f"open:       {folder / 'report.html'}"]
    if (folder / "checkpoints" / "latest").is_dir():
        lines += [
            f"predict:    mulki predict {named} IMAGES",
            f"go on:      mulki run NEW_TASKS --continue {named}",
        ]
    return lines


def _plan(argv: list[str]) -> int:
    """What a run would do, need and take, without making it: mulki plan embedded --json"""
    from mulki.app.commands.plan import show_plan
    from mulki.app.commands.run_options import run_options
    from mulki.app.commands.training import prepare_process
    from mulki.console import Console

    prepare_process()
    given, resume = run_options(argv, "plan", _plan.__doc__)
    if resume is not None:
        raise InputError("mulki plan: got --resume, but a plan is of a run from its start")
    as_json = given.pop("json", False)
    card = given.pop("card_gb", None)
    show_plan(given, Console(stderr=True), as_json=as_json, card=card)
    return 0


def _predict(argv: list[str]) -> int:
    """The likeliest classes of images without labels: mulki predict logs/RUN photos/"""
    from mulki.app.commands.predict import predict

    return predict(argv)


def _eval(argv: list[str]) -> int:
    """A checkpoint on its tasks or on others: mulki eval logs/RUN, or CHECKPOINT --tasks DIR"""
    from mulki.app.commands.eval import evaluate

    return evaluate(argv)


def _export(argv: list[str]) -> int:
    """A checkpoint for other programs: mulki export CHECKPOINT --to huggingface DIR, or onnx"""
    from mulki.app.commands.export import export

    return export(argv)


def _metrics(argv: list[str]) -> int:
    """Transfer, Average, Last, forgetting and BWT of a matrix: mulki metrics matrix.csv"""
    from rich.text import Text

    from mulki.console import Console
    from mulki.report.tables import definition_lines, print_matrix
    from mulki.runs.metrics import read_matrix

    parser = Parser(prog="mulki metrics", description=_metrics.__doc__)
    parser.add_argument("matrix", metavar="MATRIX", help="a matrix.csv, as a run folder holds it")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    arguments = parser.parse_args(argv)
    matrix = read_matrix(arguments.matrix)
    if arguments.json:
        print(json.dumps(matrix.metrics().to_dict()))
    else:
        console = Console()
        print_matrix(matrix, console)
        for line in definition_lines():
            console.print(Text(line), style="dim")
    return 0


def _compare(argv: list[str]) -> int:
    """Means over seeds and paired differences of runs: mulki compare logs/* --baseline finetune"""
    from mulki.app.commands.compare import compare_runs

    return compare_runs(argv)


def _report(argv: list[str]) -> int:
    """The page of a run, also of an unfinished or damaged one: mulki report logs/RUN"""
    from mulki.report.write import PLOTS, write_report

    parser = Parser(prog="mulki report", description=_report.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that mulki run has written")
    parser.add_argument(
        "--figures",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"write the figures into {PLOTS}/ too, as PNG and SVG (default: True)",
    )
    arguments = parser.parse_args(argv)
    for run in arguments.runs:
        say(str(write_report(run, figures=arguments.figures)))
    return 0


def _reproduce(argv: list[str]) -> int:
    """Published rows, and a verdict on our runs of one: mulki reproduce --list, or a row's name"""
    from mulki.app.commands.reproduce import reproduce

    return reproduce(argv)


def _tasks(argv: list[str]) -> int:
    """The tasks of a sequence, with their classes: mulki tasks embedded --json"""
    from mulki.app.listing import list_tasks
    from mulki.choices.options import check_options, convert
    from mulki.train.config.imports import import_modules
    from mulki.train.config.run_config import RunConfig
    from mulki.train.config.tasks import limit_reading

    options = (
        *("order", "data_root", "protocol", "test_fraction", "skip_bad_images", "max_pixels"),
        *("max_member_mb", "csv_img_key", "csv_caption_key", "csv_separator"),
    )
    parser = Parser(prog="mulki tasks", description=_tasks.__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a sequence, or folders (class folders, tar shards, data sets of Hugging Face), CSV "
        "files and captions:PATH",
    )
    for name in ("import_", *options):
        add_options(parser, RunConfig, only=name)
    parser.add_argument("--json", action="store_true", help="print names and classes as JSON")
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="download published data sets to --data-root, check them and say what is missing",
    )
    given = parser.parse_args(with_hyphens(argv))
    import_modules(given.import_ or ())
    chosen = {k: v for k, v in vars(given).items() if k in options and v is not None}
    config = RunConfig(**convert(RunConfig, chosen | {"tasks": given.names}))
    check_options(config)
    limit_reading(config)
    return list_tasks(config, as_json=given.json, download=given.prepare)


def _bench(argv: list[str]) -> int:
    """Time and memory of the operators: mulki bench --quick, or bench plot FILE.csv FOLDER"""
    from mulki.app.commands.bench import bench

    return bench(argv)


def _completion(argv: list[str]) -> int:
    """Completion of commands and options by a shell: eval "$(mulki completion bash)\""""
    parser = Parser(
        prog="mulki completion",
        description="Print what makes a shell complete commands and options of mulki",
        epilog=_COMPLETION_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=completion.SHELLS)
    import argcomplete

    print(argcomplete.shellcode(["mulki"], shell=parser.parse_args(argv).shell))
    return 0


def _doctor(argv: list[str]) -> int:
    """What this installation can do, and what mends what it cannot: mulki doctor"""
    import textwrap

    from mulki.app.doctor import examine

    parser = Parser(prog="mulki doctor", description=_doctor.__doc__)
    parser.add_argument(
        "--logs", default="logs", help="where runs are to be written (default: logs)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of the self-test; 0: none (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--kernels",
        nargs="?",
        const="",
        metavar="FILE",
        help="instead: where the Triton kernels are right and faster on this GPU, kept in FILE "
        "(default: where the backend auto reads it, in MULKI_CACHE_DIR)",
    )
    arguments = parser.parse_args(argv)
    if arguments.kernels is not None:
        from mulki.app import kernels

        return kernels.report(arguments.kernels)
    if not 0 <= arguments.seconds < math.inf:
        raise InputError(f"--seconds: got {arguments.seconds}, wanted a number of at least 0")
    findings = []
    for finding in examine(arguments.logs, arguments.seconds):
        findings.append(finding)
        if not arguments.json:
            head = f"{finding.level:<8} {finding.topic:<12} "
            line = textwrap.TextWrapper(80, head, " " * 22, break_on_hyphens=False)
            print(line.fill(finding.text), flush=True)
            if finding.remedy:
                # Not wrapped: it may be a command.
                print(f"{' ' * 22}-> {finding.remedy}", flush=True)
    problems = sum(finding.level == "problem" for finding in findings)
    if arguments.json:
        print(json.dumps([*map(asdict, findings)]))
    else:
        print(counted(problems, "problem") if problems else "no problems")
    return int(problems > 0)
