"""``mulki predict``: the likeliest classes of images without labels."""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mulki.app.commands.grid import whole
from mulki.app.commands.parsing import Parser, add_options, with_hyphens
from mulki.choices.options import check_options, convert
from mulki.console import Console
from mulki.data import BadImage
from mulki.data.unlabelled import find_images
from mulki.errors import InputError, counted
from mulki.files import check_regular, replacing
from mulki.printing import say
from mulki.runs.predictions import check_writable, csv_cells

if TYPE_CHECKING:
    from mulki.train.model import Prediction

#: Fields of `RunConfig` that are options here.
OPTIONS = (
    *("pretrained", "precision_eval", "batch_size_eval", "workers", "device"),
    *("max_pixels", "max_member_mb"),
)
_EXAMPLES = """examples:
  mulki predict logs/RUN photos/                       the classes that the run has learned
  mulki predict logs/RUN photos/ --csv photos.csv --top 3 --threshold 0.5
  mulki predict mulki-mini a.jpg b.jpg --classes names.txt
  find . -name '*.jpg' | mulki predict logs/RUN/checkpoints/latest -
"""


def predict(argv: list[str]) -> int:
    """Run the command with these arguments; return its exit status, 1 if images are unreadable.

    Raises:
        InputError: bad arguments, model or images, or a model without classes.
    """
    from mulki.train.config.run_config import RunConfig
    from mulki.train.config.tasks import limit_reading
    from mulki.train.display.progress import checking
    from mulki.train.learning.memory import keep_freed_memory
    from mulki.train.model import load

    parser = Parser(
        prog="mulki predict",
        description="The likeliest classes of images without labels",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the folder of a run, a checkpoint, or a model as mulki run --model takes it",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders, tar shards, or - for the paths in the lines of standard input",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="class names, one a line; if left out those that the model has learned",
    )
    parser.add_argument(
        "--top", metavar="N", default="5", help="classes to print for each image (default: 5)"
    )
    parser.add_argument(
        "--threshold",
        metavar="P",
        default="0",
        help="least probability, from 0 to 1, with which an image gets a class (default: 0)",
    )
    parser.add_argument("--csv", metavar="FILE.csv", type=Path, help="write a line for each image")
    parser.add_argument(
        "--no-head", action="store_true", help="answer by texts alone, without class statistics"
    )
    for name in OPTIONS:
        add_options(parser, RunConfig, only=name)
    given = vars(parser.parse_intermixed_args(with_hyphens(argv)))
    keep_freed_memory()
    chosen = {name: given[name] for name in OPTIONS if given[name] is not None}
    config = RunConfig(**convert(RunConfig, chosen))
    check_options(config)
    top = whole("--top", given["top"], 1)
    threshold = _probability("--threshold", given["threshold"])
    if given["no_head"] and given["classes"] is not None:
        raise InputError("--no-head: with --classes texts answer alone anyway; leave it out")
    classes = None if given["classes"] is None else _class_names(given["classes"])
    limit_reading(config)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as the paths in arguments come
    found = find_images(given["images"], sys.stdin or ())
    model = load(
        given["model"],
        pretrained=config.pretrained,
        device=config.device,
        precision_eval=chosen.get("precision_eval"),
        head=not given["no_head"],
    )
    good = bad = 0
    with _rows(given["csv"], top) as write, checking(Console(stderr=True), "predicting") as told:
        for each in model.predictions(
            found,
            classes=classes,
            top=top,
            threshold=threshold,
            batch_size=config.batch_size_eval,
            workers=config.workers,
            told=told,
        ):
            if isinstance(each, BadImage):
                bad += 1
                print(f"mulki: {each}", file=sys.stderr)
                continue
            good += 1
            write(each)
    if given["csv"] is not None:
        say(f"{given['csv']}: {counted(good, 'image')}")
    if bad:
        print(f"mulki: {counted(bad, 'image')} left out", file=sys.stderr)
    return int(bad > 0)


@contextmanager
def _rows(path: Path | None, top: int) -> Iterator[Callable[[Prediction], None]]:
    # What writes a prediction: a line of a CSV file, or of standard output.
    if path is None:
        yield lambda each: say(_line(each))
        return
    check_writable("--csv", path)
    with (
        replacing(path) as new,
        # A name of a file may have bytes that are no UTF-8.
        new.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        rows = csv.writer(stream, lineterminator="\n")
        numbers = range(1, top + 1)
        columns = [f"{what}_{n}" for n in numbers for what in ("class", "probability")]
        rows.writerow(["image", "label", *columns])

        def write(each: Prediction) -> None:
            cells = [each.image, each.label or ""]
            for name, chance in zip(each.classes, each.probabilities, strict=True):
                cells += [name, f"{chance:.4f}"]
            rows.writerow(csv_cells(cells + [""] * (2 * top + 2 - len(cells))))

        yield write


def _line(each: Prediction) -> str:
    said = ", ".join(
        f"{name} {100 * chance:.1f} %"
        for name, chance in zip(each.classes, each.probabilities, strict=True)
    )
    return f"{each.image}: {said}" if each.label is not None else f"{each.image}: - ({said})"


def _class_names(path: Path) -> list[str]:
    check_regular(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--classes: {path} cannot be read ({error}); pass a UTF-8 text file with a class name "
            "in each line"
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"--classes: {path} holds no name; write one in each line")
    return names


def _probability(option: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise InputError(f"{option}: got {value!r}, wanted a number from 0 to 1")
    return found
