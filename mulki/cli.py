"""The command ``mulki``; `mulki --help` lists what it does.

Bad input ends with one line on standard error and exit status 2, an error of the system with 1, and
a signal with 128 and its number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mulki.commands import completion
from mulki.commands.parsing import Parser, add_options, complete_by, with_hyphens
from mulki.errors import InputError, ProcessLost, Stopped, nearest
from mulki.options import field_name

if TYPE_CHECKING:
    from mulki.methods import Method


_EXAMPLES = """examples:
  mulki run embedded                              the bundled tasks with the bundled model
  mulki run embedded --method finetune --seed 1
  mulki run birds/ textures/ --model ViT-B-32 --pretrained laion2b_s34b_b79k
  mulki run --config logs/RUN/args.yaml --lr 1e-5
  mulki run --resume logs/RUN                     go on with a run that was stopped
  mulki run --method zscl --help                  the options of another method
  mulki run embedded --seeds 0 1 2 --orders I II  several runs, their means and intervals
"""

_BENCH_EXAMPLES = """Every point is verified against float64 first; status 1 if one failed.

examples:
  mulki bench --quick                             a few small shapes in a minute
  mulki bench --ops dual_teacher_kl --shapes 2048x345x768 512x1000
                                                  shapes of your own
  mulki bench --output ops.csv                    all shapes, kept
  mulki bench table ops.csv                       as Markdown
  mulki bench plot ops.csv figures                as figures and a page
"""

_COMPLETION_EXAMPLES = """run once, or put it into the shell's start file:
  bash, ~/.bashrc                    eval "$(mulki completion bash)"
  zsh, ~/.zshrc after compinit       eval "$(mulki completion zsh)"
  fish, ~/.config/fish/config.fish   mulki completion fish | source
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with the status of the command."""
    sys.exit(run_command(sys.argv[1:] if argv is None else argv))


def run_command(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    try:
        return _dispatch(list(argv))
    except InputError as error:
        _print_error(str(error))
        return 2
    except ProcessLost as lost:
        if not lost.quiet:
            print(f"mulki: error: {lost}", file=sys.stderr)
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
        sys.stderr.close()
        return 1
    except OSError as error:
        # The disk is full, or a file cannot be read; out.log of a run has the traceback.
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}")
        return 1
    except Exception as error:
        if _is_one_of_several():
            # The traceback that follows does not say whose it is.
            _print_error(f"{type(error).__name__}: {error}")
        raise


def _print_error(message: str) -> None:
    where = f" in process {os.environ.get('RANK', '0')}" if _is_one_of_several() else ""
    print(f"mulki: error{where}: {message}", file=sys.stderr)


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _print_way_on(ended: Stopped | ProcessLost) -> None:
    if ended.results:
        print(f"results so far: {os.path.join(ended.results, 'report.html')}", file=sys.stderr)
    if ended.resume:
        print(f"to go on: mulki run --resume {shlex.quote(ended.resume)}", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "plan": _plan,
        "eval": _eval,
        "export": _export,
        "metrics": _metrics,
        "compare": _compare,
        "report": _report,
        "reproduce": _reproduce,
        "tasks": _tasks,
        "bench": _bench,
        "prove": _prove,
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
    from rich.console import Console

    from mulki.commands.grid import is_grid, run_grid
    from mulki.commands.training import prepare_process
    from mulki.engine.config import resolve
    from mulki.engine.resuming import folder_of_restart
    from mulki.engine.sequence import run
    from mulki.report.tables import print_matrix
    from mulki.results import read_evaluations

    prepare_process()
    console = Console()
    given, resume = _given(argv)
    if is_grid(given):
        run_grid(given, console)
        return 0
    settings = resolve(given)
    if resume is None and (restarted := folder_of_restart(settings)) is not None:
        settings, resume = resolve(_of_folder(str(restarted))), str(restarted)
    folder = run(settings, Console(stderr=True), resume=resume)
    if folder is None:  # another process of the run prints
        return 0
    lines = read_evaluations(folder.path / "results.jsonl")
    print_matrix(folder.matrix, console, folder.class_incremental, lines)
    console.print(f"run folder: {folder.path}", soft_wrap=True, highlight=False)
    return 0


def _plan(argv: list[str]) -> int:
    """What a run would do, need and take, without making it: mulki plan embedded --json"""
    from rich.console import Console

    from mulki.commands.plan import show_plan
    from mulki.commands.training import prepare_process

    prepare_process()
    given, resume = _given(argv, "plan")
    if resume is not None:
        raise InputError("mulki plan: got --resume, but a plan is of a run from its start")
    as_json = given.pop("json", False)
    show_plan(given, Console(stderr=True), as_json=as_json)
    return 0


def _given(argv: list[str], command: str = "run") -> tuple[dict[str, Any], str | None]:
    # The options of a run, and the folder of one that goes on.
    from mulki.commands.grid import add_grid_options, check_lists
    from mulki.data import sequence_names
    from mulki.engine.config import RunConfig, resolve, unknown_option

    argv = with_hyphens(argv)
    first = Parser(prog="mulki run", add_help=False)
    first.add_argument("--resume")
    resumed, others = first.parse_known_args(argv)
    if resumed.resume is not None:
        if others:
            raise InputError(
                f"--resume: got {' '.join(others)} beside it, but a run goes on with the options "
                "it began with; leave the rest out"
            )
        return _of_folder(resumed.resume), resumed.resume
    config, from_file, method = _method_and_file(argv)
    goes_on = "; run --resume DIR" if command == "run" else ""
    parser = Parser(
        prog=f"mulki {command}",
        usage=f"mulki {command} [TASKS ...] [--config FILE] [--method METHOD] "
        f"[--OPTION VALUE ...]{goes_on}",
        description={"run": _run, "plan": _plan}[command].__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sequence_names()
    words = parser.add_argument(
        "words",
        nargs="*",
        metavar="TASKS",
        help=f"same as --tasks; sequences: {', '.join(names)}",
    )
    complete_by(words, names)
    parser.add_argument("--config", metavar="FILE", help="a YAML file of options")
    parser.add_argument(
        "--resume", metavar="DIR", help="go on with the run in this folder, without other options"
    )
    if command == "plan":
        text = "print the numbers as JSON"
        parser.add_argument("--json", action="store_const", const=True, help=text)
    add_grid_options(parser)
    add_options(parser.add_argument_group("run"), RunConfig)
    group = parser.add_argument_group(f"method {method.name}", method.summary)
    try:
        add_options(group, method.Options)
    except argparse.ArgumentError as error:
        raise InputError(
            f"method {method.name}: {error}; the run has an option of that name, so rename it"
        ) from None
    parsed, unknown = parser.parse_known_intermixed_args(argv)
    for word in unknown:
        if word.startswith("--"):
            raise unknown_option(field_name(word[2:].split("=")[0]), method.name)
        raise InputError(f"{word}: was not expected here; mulki run --help shows the usage")
    apart = ("config", "resume", "import_")
    given = {k: v for k, v in vars(parsed).items() if v is not None and k not in apart}
    check_lists(given)
    tasks = given.pop("words", None)
    if tasks and "tasks" in given:
        raise InputError(f"--tasks: given beside {' '.join(tasks)}; name the tasks in one place")
    if tasks:
        _check_words(tasks, given)
        given["tasks"] = tasks
    # The command line wins over the file, also where the two exclude each other.
    for one, other in (("iterations", "epochs"), ("epochs", "iterations")):
        if one in given and other not in given:
            from_file.pop(other, None)
    with _naming(config):
        resolve(from_file | {"method": method.name})
    return from_file | given, None


def _check_words(words: list[str], given: dict[str, Any]) -> None:
    # `--seed 0 1 2` leaves two numbers behind, which are no tasks.
    numbers = [word for word in words if word.isdecimal() and not os.path.exists(word)]
    if numbers and "seed" in given:
        raise InputError(
            f"--seed: got {' '.join([given['seed'], *numbers])}, wanted one; several runs are "
            f"--seeds {' '.join([given['seed'], *numbers])}"
        )


def _of_folder(folder: str) -> dict[str, Any]:
    from mulki.engine.config import read_config

    path = os.path.join(folder, "args.yaml")
    if not os.path.isfile(path):
        raise InputError(
            f"--resume: {folder} is not the folder of a run that has begun, it has no args.yaml; "
            "start the run again, its name is free"
        )
    return read_config(path)


def _method_and_file(argv: list[str]) -> tuple[str | None, dict[str, Any], type[Method]]:
    """The configuration file, its options with all modules to import, and the method of a run.

    The method decides which options exist, and a module of the user's may define the method, so
    these are looked for before the rest is parsed.
    """
    from mulki import methods
    from mulki.engine.config import RunConfig, field_names, import_given, read_config
    from mulki.engine.presets import method_of

    parser = Parser(prog="mulki run", add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--method")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--preset")
    add_options(parser, RunConfig, only="import_")
    given, _ = parser.parse_known_args(argv)
    from_file: dict[str, Any] = read_config(given.config) if given.config is not None else {}
    with _naming(given.config):
        modules = import_given(from_file)
    # Modules of the file and of the command line are both imported: one does not exclude another.
    modules = import_given({"import_": (*modules, *(given.import_ or ()))})
    preset = given.preset or from_file.get("preset")
    named = given.method or (given.methods or [None])[0]
    method = methods.get(named or str(from_file.get("method") or method_of(preset)))
    if from_file.get("method", method.name) != method.name:
        # The file of another method's run: the options that only that method has are left out.
        others = field_names(methods.get(str(from_file["method"])).Options)
        known = field_names(RunConfig) | field_names(method.Options)
        from_file = {k: v for k, v in from_file.items() if k in known or k not in others}
    if modules:
        from_file["import_"] = modules
    return given.config, from_file, method


@contextmanager
def _naming(config: str | None) -> Iterator[None]:
    # Errors in the options of a configuration file begin with its name.
    try:
        yield
    except InputError as error:
        if config is None:
            raise
        raise InputError(f"{config}: {error}") from None


def _eval(argv: list[str]) -> int:
    """A checkpoint on its tasks or on others: mulki eval logs/RUN, or CHECKPOINT --tasks DIR"""
    from mulki.commands.evaluate import evaluate

    return evaluate(argv)


def _export(argv: list[str]) -> int:
    """A checkpoint for other programs: mulki export CHECKPOINT --to huggingface DIR, or onnx"""
    from mulki.commands.export import export

    return export(argv)


def _metrics(argv: list[str]) -> int:
    """Transfer, Average, Last, forgetting and BWT of a matrix: mulki metrics matrix.csv"""
    from rich.console import Console

    from mulki.metrics import read_matrix
    from mulki.report.tables import print_matrix

    parser = Parser(prog="mulki metrics", description=_metrics.__doc__)
    parser.add_argument("matrix", metavar="MATRIX", help="a matrix.csv, as a run folder holds it")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    arguments = parser.parse_args(argv)
    matrix = read_matrix(arguments.matrix)
    if arguments.json:
        print(json.dumps(matrix.metrics().to_dict()))
    else:
        print_matrix(matrix, Console())
    return 0


def _compare(argv: list[str]) -> int:
    """Means over seeds and paired differences of runs: mulki compare logs/* --baseline finetune"""
    from rich.console import Console

    from mulki.report.compare import compare
    from mulki.report.comparison_html import check_page, figures, write_comparison
    from mulki.report.comparison_tables import print_comparison

    parser = Parser(prog="mulki compare", description=_compare.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that mulki run has written")
    parser.add_argument(
        "--baseline", metavar="NAME", help="a method or a label (default: that of the first run)"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--html", metavar="FILE", help="write one page with tables and curves")
    parser.add_argument("--figures", metavar="DIR", help="write the curves as PNG and SVG")
    arguments = parser.parse_args(argv)
    if arguments.html is not None:
        check_page(arguments.html)
    comparison = compare(arguments.runs, arguments.baseline)
    if arguments.json:
        print(json.dumps(comparison.to_dict()))
    else:
        print_comparison(comparison, Console())
    if arguments.html is not None:
        write_comparison(comparison, arguments.html)
        print(f"page: {arguments.html}", file=sys.stderr)
    if arguments.figures is not None:
        folder = Path(arguments.figures)
        folder.mkdir(parents=True, exist_ok=True)
        for plot in figures(comparison):
            plot.write(folder)
        print(f"figures: {folder}", file=sys.stderr)
    return 0


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
        print(write_report(run, figures=arguments.figures))
    return 0


def _reproduce(argv: list[str]) -> int:
    """Published rows, and a verdict on our runs of one: mulki reproduce --list, or a row's name"""
    from mulki.commands.reproduce import reproduce

    return reproduce(argv)


def _tasks(argv: list[str]) -> int:
    """The tasks of a sequence, with their classes: mulki tasks embedded --json"""
    from mulki.data import Source
    from mulki.engine.config import RunConfig
    from mulki.imports import import_modules
    from mulki.listing import list_tasks

    parser = Parser(prog="mulki tasks", description=_tasks.__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a sequence, or folders, CSV files and captions:PATH",
    )
    for name in ("import_", "order", "data_root", "protocol"):
        add_options(parser, RunConfig, only=name)
    parser.add_argument("--json", action="store_true", help="print names and classes as JSON")
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="download published data sets to --data-root, check them and say what is missing",
    )
    given = parser.parse_args(with_hyphens(argv))
    import_modules(given.import_ or ())
    return list_tasks(
        given.names,
        given.order or RunConfig.order,
        Source(given.data_root, given.protocol),
        as_json=given.json,
        download=given.prepare,
    )


def _bench(argv: list[str]) -> int:
    """Time and memory of the operators: mulki bench --quick, or bench plot FILE.csv FOLDER"""
    from mulki.bench.cases import MODES
    from mulki.bench.report import markdown, read_rows
    from mulki.bench.run import BenchOptions, run
    from mulki.options import convert

    if argv[:1] == ["table"]:
        parser = Parser(prog="mulki bench table", description="Markdown tables from a CSV")
        parser.add_argument("file", metavar="CSV", help="as mulki bench --output writes it")
        print(markdown(read_rows(parser.parse_args(argv[1:]).file)), end="")
        return 0
    if argv[:1] == ["plot"]:
        from mulki.bench.plots import plot

        parser = Parser(
            prog="mulki bench plot",
            description="Figures from a CSV as PNG and SVG, on one page, and their numbers",
        )
        parser.add_argument("file", metavar="CSV", help="as mulki bench --output writes it")
        parser.add_argument("folder", metavar="FOLDER", help="where the figures go")
        parser.add_argument(
            "--mode", default="both", choices=MODES, help="what is drawn (default: both)"
        )
        arguments = parser.parse_args(argv[1:])
        made = plot(read_rows(arguments.file), arguments.folder, arguments.mode)
        print(f"{made[0]}, with {len(made) - 1} files beside it")
        return 0
    parser = Parser(
        prog="mulki bench",
        usage="mulki bench [--OPTION VALUE ...]; bench table CSV; bench plot CSV FOLDER",
        description=_bench.__doc__,
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser.add_argument_group("bench"), BenchOptions)
    if completion.is_asked():
        parser.add_argument("words", nargs="?", choices=("table", "plot"))
    given = vars(parser.parse_args(with_hyphens(argv)))
    options = convert(BenchOptions, {k: v for k, v in given.items() if v is not None})
    return run(BenchOptions(**options))


def _completion(argv: list[str]) -> int:
    """Completion of commands and options by a shell: eval "$(mulki completion bash)\""""
    parser = Parser(
        prog="mulki completion",
        description="Print what makes a shell complete commands and options of mulki",
        epilog=_COMPLETION_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=completion.SHELLS)
    return completion.print_code(parser.parse_args(argv).shell)


def _prove(argv: list[str]) -> int:
    """Show where the Triton kernels are right and faster on this GPU: mulki prove"""
    from mulki.prove import report

    parser = Parser(prog="mulki prove", description=_prove.__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "xpu"))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for timing; compiling comes on top"
    )
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds for all; what is left is not tried"
    )
    arguments = parser.parse_args(argv)
    return report(arguments.device, arguments.seconds, arguments.limit)


def _doctor(argv: list[str]) -> int:
    """What this installation can do, and what mends what it cannot: mulki doctor"""
    import textwrap

    from mulki.doctor import examine

    parser = Parser(prog="mulki doctor", description=_doctor.__doc__)
    parser.add_argument("--logs", default="logs", help="where runs are to be written")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for the self-test; 0 leaves it out"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args(argv)
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
    if arguments.json:
        print(json.dumps([finding.to_dict() for finding in findings]))
    return int(any(finding.level == "problem" for finding in findings))
