"""The options of ``mulki run`` and ``mulki plan``: of the command line, of a file, of a folder."""

from __future__ import annotations

import argparse
import contextlib
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mulki.app.commands import completion
from mulki.app.commands.parsing import Parser, add_options, complete_by, with_hyphens
from mulki.choices.options import field_name, flag
from mulki.errors import InputError

if TYPE_CHECKING:
    from mulki.methods import Method

_EXAMPLES = {
    "run": """examples:
  mulki run embedded                              the bundled tasks with the bundled model
  mulki run embedded --method finetune --seed 1
  mulki run birds/ textures/ --model ViT-B-32 --pretrained laion2b_s34b_b79k
  mulki run --config logs/RUN/args.yaml --lr 1e-5
  mulki run mahjong/ --continue logs/RUN          new tasks, for the model of a finished run
  mulki run --resume logs/RUN                     go on with a run that was stopped
  mulki run --method zscl --help                  the options of another method
  mulki run embedded --seeds 0 1 2 --orders I II  several runs, their means and intervals
""",
    "plan": """examples:
  mulki plan embedded                             the bundled tasks with the bundled model
  mulki plan birds/ textures/ --model ViT-B-32 --pretrained laion2b_s34b_b79k
  mulki plan --config logs/RUN/args.yaml --batch-size 8
  mulki plan birds/ --model ViT-H-14 --pretrained none --card-gb 24
  mulki plan --method zscl --help                 the options of another method
""",
}

# The options of `RunConfig` in the groups of the help. What is in none is in the group training.
GROUPS = {
    "data": (
        *("tasks", "continue_", "test_tasks", "order", "data_root", "protocol", "test_fraction"),
        *("csv_img_key", "csv_caption_key", "csv_separator"),
        *("shots", "scenario", "increments", "base_classes", "label_space", "limit_images"),
        *("sampling", "skip_bad_images", "max_pixels", "augment", "workers", "import_"),
    ),
    "model": (
        *("model", "pretrained", "original", "original_pretrained", "lock_text", "lock_image"),
        *("precision", "precision_eval", "device", "torchcompile", "fsdp", "grad_checkpointing"),
    ),
    "training": ("method", "iterations", "epochs", "batch_size", "lr", "seed", "preset"),
    "distillation": (
        *("reference", "reference_batch_size", "vocabulary", "anchors_per_step", "teacher_cache"),
    ),
    "output": ("logs", "name", "report_to", "log_every_n_steps", "save_every", "save_checkpoints"),
}
# Those that --help shows; --help-all shows all.
OFTEN = frozenset(
    {"tasks", "continue_", "test_fraction", "model", "pretrained", "device", "method"}
    | {"iterations", "epochs", "batch_size", "lr", "seed", "preset", "vocabulary", "logs", "name"}
)


def run_options(
    argv: list[str], command: str = "run", description: str | None = None
) -> tuple[dict[str, Any], str | None]:
    """The options of a run, and the folder of one that goes on.

    Args:
        argv: what comes after the command.
        command: run or plan.
        description: of the command, for its help.

    Raises:
        InputError: bad arguments, a file or folder that cannot be read.
    """
    from mulki.app.commands.grid import check_lists
    from mulki.train.config.run_config import options_for, resolve, unknown_option

    argv = with_hyphens(argv)
    resume = _resume(argv)
    if resume is not None:
        return options_of_folder(resume), resume
    config, from_file, chosen_methods = _methods_and_file(argv)
    method = chosen_methods[0]
    parser = _parser(command, description, chosen_methods, argv)
    parsed, unknown = parser.parse_known_intermixed_args(argv)
    for word in unknown:
        if word.startswith("--"):
            raise unknown_option(field_name(word[2:].split("=")[0]), method.name)
        raise InputError(f"{word}: was not expected here; mulki run --help shows the usage")
    apart = ("config", "resume", "import_", "continue_")
    given = {k: v for k, v in vars(parsed).items() if v is not None and k not in apart}
    tasks = _without_methods(given.pop("words", None) or [], given)
    check_lists(given)
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
        of_first = options_for(from_file, [method.name], [each.name for each in chosen_methods])
        resolve(of_first | {"method": method.name})
    chosen = from_file | given
    if (goes_on := parsed.continue_) is not None:
        from mulki.train.start.continuation import continued_options

        chosen = continued_options(Path(goes_on), chosen)
    return chosen, None


def _resume(argv: list[str]) -> str | None:
    # The folder of a run that goes on.
    parser = Parser(prog="mulki run", add_help=False)
    parser.add_argument("--resume")
    given, others = parser.parse_known_args(argv)
    if given.resume is not None and others:
        raise InputError(
            f"--resume: got {' '.join(others)} beside it, but a run goes on with the options "
            "it began with; leave the rest out"
        )
    return given.resume


def _parser(
    command: str, description: str | None, methods: Sequence[type[Method]], argv: list[str]
) -> Parser:
    from mulki.app.commands.grid import add_grid_options
    from mulki.data import sequence_names
    from mulki.train.config.run_config import RunConfig

    goes_on = "; run --resume DIR" if command == "run" else ""
    parser = Parser(
        prog=f"mulki {command}",
        usage=f"mulki {command} [TASKS ...] [--OPTION VALUE ...]{goes_on}",
        description=description,
        epilog=f"{_with_bundled_model(methods[0].name)}\n\n{_EXAMPLES[command]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sequence_names()
    text = f"same as --tasks; sequences: {', '.join(names)}"
    complete_by(parser.add_argument("words", nargs="*", metavar="TASKS", help=text), names)
    parser.add_argument("--config", metavar="FILE", help="a YAML file of options")
    if command == "run":
        text = "go on with the run in this folder, without other options"
        parser.add_argument("--resume", metavar="DIR", help=text)
    else:
        text = "print the numbers as JSON"
        parser.add_argument("--json", action="store_const", const=True, help=text)
        text = (
            "count what a step needs on a card of so many GB, and which options help; no step runs"
        )
        parser.add_argument("--card-gb", type=_gigabytes, metavar="GB", help=text)
    add_grid_options(parser, hidden=command != "run")
    # A shell completes all options.
    every = "--help-all" in argv or completion.is_asked()
    text = "show all options, with those of the method"
    parser.add_argument("--help-all", action="help", help=text)
    named = {name for names in GROUPS.values() for name in names}
    others = [item.name for item in fields(RunConfig) if item.name not in named]
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in (*names, *(others if title == "training" else ())):
            add_options(group, RunConfig, only=name, hidden=not every and name not in OFTEN)
    chosen = every or any(word.partition("=")[0] == "--method" for word in argv)
    added: set[str] = set()
    for method in methods:
        summary = method.summary if chosen else f"{method.summary}; --help-all shows its options"
        group = parser.add_argument_group(f"method {method.name}", summary)
        try:
            # An option that several methods have is in the group of the first.
            add_options(group, method.Options, hidden=not chosen, skipped=added)
        except argparse.ArgumentError as error:
            raise InputError(
                f"method {method.name}: {error}; the run has an option of that name, so rename it"
            ) from None
        added |= {item.name for item in fields(method.Options)}
    return parser


def _gigabytes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, wanted gigabytes of a card, such as 24")


def _with_bundled_model(method: str) -> str:
    # Beside its option the help has the default for all other models.
    from mulki.train.config.presets import lookup

    given = lookup(None, method, "default")
    # Lines are not broken between an option and its value.
    words = [flag(k) if v is True else f"{flag(k)}\xa0{v}" for k, v in given.items()]
    lines = textwrap.wrap(" ".join(words), 78, break_on_hyphens=False)
    return "\n".join(
        [
            "with the bundled model, mulki-mini, the defaults are",
            *(f"  {line}".replace("\xa0", " ") for line in lines),
            "A preset has values of its own. args.yaml in a run's folder has all that it used.",
        ]
    )


def _without_methods(words: list[str], given: dict[str, Any]) -> list[str]:
    # `--method finetune mulki` leaves a method among the words, and asks for a grid. A folder of
    # that name is ./mulki.
    names = _names_of_methods()
    more = [word for word in words if word in names]
    if "method" in given and more:
        given["methods"] = [given.pop("method"), *more]
        return [word for word in words if word not in more]
    return words


def _names_of_methods() -> set[str]:
    # Of a sequence of the same name, the word is the sequence.
    from mulki import methods
    from mulki.data import sequence_names

    return set(methods.available()) - set(sequence_names())


def _check_words(words: list[str], given: dict[str, Any]) -> None:
    # `--seed 0 1 2` leaves two numbers behind, which are not tasks.
    numbers = [word for word in words if word.isdecimal() and not os.path.exists(word)]
    if numbers and "seed" in given:
        raise InputError(
            f"--seed: got {' '.join([given['seed'], *numbers])}, wanted one; several runs are "
            f"--seeds {' '.join([given['seed'], *numbers])}"
        )


def options_of_folder(folder: str) -> dict[str, Any]:
    """The options that the run in this folder began with.

    Raises:
        InputError: it has none.
    """
    from mulki.train.config.run_config import read_config

    path = os.path.join(folder, "args.yaml")
    if not os.path.isdir(folder):
        raise InputError(f"--resume: no folder {folder}; pass that of a run that was stopped")
    if not os.path.isfile(path):
        raise InputError(
            f"--resume: {folder} is not the folder of a run that has begun, it has no args.yaml; "
            "start the run again, its name is free"
        )
    return read_config(path)


def _methods_and_file(
    argv: list[str],
) -> tuple[str | None, dict[str, Any], Sequence[type[Method]]]:
    """The configuration file, its options with all modules to import, and the methods of the runs.

    The methods decide which options exist, and a module of the user's may define the method, so
    these are looked for before the rest is parsed.
    """
    from mulki import methods
    from mulki.train.config.presets import method_of
    from mulki.train.config.run_config import RunConfig, import_given, options_for, read_config

    parser = Parser(prog="mulki run", add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--method", nargs="+")
    parser.add_argument("--continue", dest="continue_")
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
    # What else stands behind `--method NAME` is further methods, or tasks.
    first, *rest = given.method or given.methods or [None]
    more = [word for word in rest if given.methods or word in _names_of_methods()]
    if first is None and given.continue_ is not None and "method" not in from_file:
        from mulki.train.start.continuation import continuation

        first = str(continuation(Path(given.continue_)).said.recipe["method"])
    first = first or str(from_file.get("method") or method_of(preset))
    chosen = [methods.get(name) for name in (first, *more)]
    if "method" in from_file:
        # The file of another method's run: the options that only that method has are left out.
        of_file = methods.get(str(from_file["method"])).name
        from_file = options_for(from_file, [each.name for each in chosen], [of_file])
    if modules:
        from_file["import_"] = modules
    return given.config, from_file, chosen


@contextmanager
def _naming(config: str | None) -> Iterator[None]:
    # Errors in the options of a configuration file begin with its name.
    try:
        yield
    except InputError as error:
        if config is None:
            raise
        raise InputError(f"{config}: {error}") from None
