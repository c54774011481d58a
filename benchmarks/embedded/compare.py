"""Compare methods on the bundled tasks: choose, compare, and write the tables.

    python -m benchmarks.embedded.compare compare   # methods at their presets, and variants
    python -m benchmarks.embedded.compare held      # a study: its runs once more
    python -m benchmarks.embedded.compare vit --model local-dir:CACHE/mulki-vit-112
    python -m benchmarks.embedded.compare tables    # RESULTS.md from the runs so far
    python -m benchmarks.embedded.compare figures   # learning curves from the runs so far

The studies are in `studies.py` beside this file. Every finished run is a line of
`results/STUDY.jsonl`; a run that is there already, with the same settings and the same start model
and images, is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.embedded.studies import (
    BESIDE_AGAIN,
    DRAWN_ROWS,
    FORM_ORDERS,
    ORDERS,
    ROWS,
    SEEDS,
    SEQUENCES,
    STUDIES,
    Options,
    Run,
    comparison,
)
from mulki.clip.models import BUNDLED
from mulki.data.shards import ShardImages
from mulki.data.subset import Subset
from mulki.data.task import Task
from mulki.errors import InputError
from mulki.report.comparison.groups import NEUTRAL
from mulki.runs.intervals import mean_interval

Line = Mapping[str, Any]
Column = Callable[[Line], float]

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"  # a file for each study
TABLES = FOLDER / "RESULTS.md"
COMMAND = "python -m benchmarks.embedded.compare"
# Options that change no result.
WITHOUT_A_SAY = NEUTRAL - {"seed", "tasks", "order"}
# Nor do these in a method that looks at no reference set.
OF_REFERENCE = {"reference", "reference_changes", "reference_batch_size"}
# Options of every run. Those of the head are its defaults from before they were chosen anew.
SHARED = {"tasks": ("embedded",), "preset": "small", "head_weight": 0.25, "head_shrinkage": 0.1}
# Of the training images, what is held out for tuning.
SHARE, HELD_OUT_SEED = 0.2, 100


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study, or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", choices=("compare", *STUDIES, "tables", "figures"))
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="0 1 2 for compare; for a study those that it has"
    )
    of_vit = [name for name, study in STUDIES.items() if study.of_vit]
    parser.add_argument(
        "--model", help=f"for {', '.join(of_vit)}: the transformer (docs/more-results.md)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    a = parser.parse_args(argv)
    if (a.study in of_vit) != (a.model is not None):
        parser.error(f"--model belongs to {', '.join(of_vit)}, and they need it")
    if a.study == "tables":
        TABLES.write_text(page(standing(read_results())))
        print(TABLES.read_text())
    elif a.study == "figures":
        for path in draw(standing(read_results()), FOLDER):
            print(path)
    elif a.study == "compare":
        carry_out(comparison(tuple(a.seeds or SEEDS)), a.jobs)
    else:
        runs = [
            Run(a.study, r["variant"], r["options"], a.model or BUNDLED)
            for r in read_results()
            if r["study"] == a.study and (a.seeds is None or r["options"]["seed"] in a.seeds)
        ]
        carry_out(runs, a.jobs)


# --- Runs


def carry_out(runs: list[Run], jobs: int) -> None:
    """Run what has no result yet, `jobs` at a time, one share of the cores each.

    Args:
        runs: of one start model.
        jobs: processes at a time.

    Raises:
        RuntimeError: runs have failed; the others have their lines.
    """
    pack = fingerprint(runs[0].model if runs else BUNDLED)
    done = [r for r in read_results() if r["pack"] == pack]
    pending = []
    for run in runs:
        settings = settings_of(run)
        if not any(r["study"] == run.study and has_settings(r, settings) for r in done):
            pending.append(run)
    print(f"{len(runs)} runs, {len(pending)} to do", flush=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        runs_of = {pool.submit(one_run, run, pack, threads): run for run in pending}
        failed = []
        for future in as_completed(runs_of):
            if (error := future.exception()) is not None:
                failed.append(f"{runs_of[future]}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                continue
            result = future.result()
            with (RESULTS / f"{result['study']}.jsonl").open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            shown = " ".join(f"{k} {result[k]:.2f}" for k in ("transfer", "average", "last"))
            print(f"{result['variant']} {result['options']}: {shown}", flush=True)
    if failed:
        raise RuntimeError(f"runs failed: {'; '.join(failed)}")


def one_run(run: Run, pack: str, threads: int) -> dict[str, Any]:
    """Carry out a run in this process and return its line of the results file."""
    import torch

    from mulki.train.config.run_config import resolve
    from mulki.train.config.tasks import load_tasks
    from mulki.train.learning.memory import keep_freed_memory
    from mulki.train.sequence import run as learn

    keep_freed_memory()
    torch.set_num_threads(threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as logs:
        here = {"logs": logs, "name": "run", "save_checkpoints": False, "save_every": 0}
        settings = resolve(SHARED | run.options | {"model": run.model} | here)
        tasks = load_tasks(settings.run)
        if chooses(run.study):
            tasks = [held_out(task) for task in tasks]
        folder = learn(settings, tasks=tasks)
        if fingerprint(run.model) != pack:
            raise RuntimeError("the start model or the images have changed since the study began")
        environment = json.loads((folder.path / "env.json").read_text())
        summary = json.loads((folder.path / "summary.json").read_text())
    matrix = folder.matrix
    unlearned = matrix.zero_shot_metrics()
    return {
        "pack": pack,
        "study": run.study,
        "variant": run.variant,
        "options": _plain(run.options),
        "settings": settings_of(run),
        **matrix.metrics().to_dict(),
        **({} if folder.with_head is None else folder.with_head.metrics()),
        "zero_shot_transfer": None if unlearned is None else unlearned.transfer,
        **folder.class_incremental.metrics(),
        "uses": summary["uses"],
        "tasks": list(matrix.tasks),
        "matrix": [list(row) for row in matrix.rows],
        "zero_shot": list(matrix.zero_shot or ()),
        "seconds": round(time.perf_counter() - started, 1),
        "threads": threads,
        "cpu": environment["cpu"],
        "commit": environment["git_commit"],
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
    }


def chooses(study: str) -> bool:
    """Whether something is chosen by a study, so that no test image may have a say in it."""
    return study in STUDIES and STUDIES[study].chooses


def held_out(task: Task) -> Task:
    """The task with a share of its training images as test images, and without its own test images.

    Whole groups (fonts, clusters of near duplicates, ...) move, as when the pack was split, until
    each class has given its share.

    Raises:
        ValueError: a class has a single group, so that nothing of it can be held out.
    """
    assert isinstance(task.train, ShardImages)
    # By sample key, from the `.json` members that the package's own reader has no use for.
    with tarfile.open(task.train.path) as tar:
        groups = {
            Path(member.name).stem: str(json.load(content)["group"])
            for member in tar
            if member.name.endswith(".json") and (content := tar.extractfile(member)) is not None
        }
    members: dict[str, list[int]] = {}
    for index, name in enumerate(task.train.members):
        members.setdefault(groups[Path(name).stem], []).append(index)
    order = sorted(members)
    random.Random(HELD_OUT_SEED).shuffle(order)
    targets = task.train.targets
    wanted = {c: max(1, round(SHARE * targets.count(c))) for c in set(targets)}
    moved: set[int] = set()
    for group in order:
        classes = [targets[i] for i in members[group]]
        # A group goes if every class in it still lacks images; fonts hold all letters at once.
        if all(wanted[c] > 0 for c in classes):
            moved.update(members[group])
            for c in classes:
                wanted[c] -= 1
    rest = [i for i in range(len(targets)) if i not in moved]
    for indices in (moved, rest):
        if {targets[i] for i in indices} != set(targets):
            raise ValueError(f"task {task.name}: a class has too few groups to hold some out")
    test = Subset(task.train, sorted(moved))
    return dataclasses.replace(task, train=Subset(task.train, rest), test=test)


# --- Lines of results


def read_results() -> list[dict[str, Any]]:
    """Every finished run."""
    files = sorted(RESULTS.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def fingerprint(model: str = BUNDLED) -> str:
    """Of the images and the start model, so that results of others are not mistaken for theirs."""
    from mulki.data.embedded import embedded_root

    root = embedded_root()
    tasks = json.loads((root / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    digest = hashlib.sha256(json.dumps(tasks, sort_keys=True).encode())
    folder = root / model if model == BUNDLED else _folder(model)
    digest.update((folder / "open_clip_model.safetensors").read_bytes())
    return digest.hexdigest()[:12]


def settings_of(run: Run) -> Options:
    """All options of a run that have a say in its result, as JSON gives them back."""
    from mulki.methods import get
    from mulki.train.config.run_config import resolve

    settings = resolve(SHARED | run.options | {"model": run.model})
    values = dataclasses.asdict(settings.run) | dataclasses.asdict(settings.method)
    # The name of a model's folder alone; which weights it has says the fingerprint.
    values["model"] = _folder(run.model).name
    needs = get(settings.run.method)(settings.method).needs
    idle = WITHOUT_A_SAY if needs.reference else WITHOUT_A_SAY | OF_REFERENCE
    return _plain({name: value for name, value in values.items() if name not in idle})


def has_settings(result: Line, settings: Options) -> bool:
    """Whether a line of results was made with these settings.

    A line that is older than an option was made with what is the default of the option now.
    """
    defaults = _defaults(settings["method"])
    return all(
        result["settings"].get(name, defaults[name]) == value for name, value in settings.items()
    )


@functools.cache
def _defaults(method: str) -> Options:
    from mulki.methods import get
    from mulki.train.config.run_config import RunConfig

    options = (RunConfig, get(method).Options)
    return _plain({item.name: item.default for of in options for item in dataclasses.fields(of)})


def standing(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results that hold for the present start models, images, presets and defaults.

    Studies by which a preset was chosen began from the preset before it; their results stay. The
    transformer is that of the study's last line, since its weights are not here to be looked at.
    Of equal runs the last counts.
    """
    bundled = fingerprint()
    packs = {r["study"]: r["pack"] for r in results if r["study"] != "compare"}
    packs |= {name: bundled for name, study in STUDIES.items() if not study.of_vit}
    seeds = tuple({r["options"]["seed"] for r in results if r["study"] == "compare"})
    rows = {(r.variant, place_of(r.options), r.options["seed"]): r for r in comparison(seeds)}

    def holds(result: dict[str, Any]) -> bool:
        study, options = result["study"], result["options"]
        if result["pack"] != packs.get(study, bundled):
            return False
        if chooses(study):
            return True
        if study == "compare":
            run = rows.get((result["variant"], place_of(options), options["seed"]))
        else:
            model = result["settings"]["model"]
            named = model if model == BUNDLED else f"local-dir:{model}"
            run = Run(study, result["variant"], options, named)
        return run is not None and has_settings(result, settings_of(run))

    held = {
        (r["study"], r["variant"], json.dumps(r["options"], sort_keys=True)): r
        for r in results
        if holds(r)
    }
    return list(held.values())


def place_of(options: Mapping[str, Any]) -> str:
    """The order or the sequence of a run's options."""
    (sequence,) = options.get("tasks", ("embedded",))
    return sequence if sequence != "embedded" else options.get("order", "I")


def _folder(model: str) -> Path:
    return Path(model.removeprefix("local-dir:"))


def _plain(values: Options) -> Options:
    plain: Options = json.loads(json.dumps(values))
    return plain


# --- Tables


def _of(*names: str) -> dict[str, Column]:
    return {name: lambda line, name=name: line[name] for name in names}


_WITH_HEAD: dict[str, Column] = {
    "last, with head": lambda line: line.get("head_last", math.nan),
    "cil_last, with head": lambda line: line.get("head_cil_last", math.nan),
}
OF_ORDERS: dict[str, Column] = {
    "transfer less zero-shot": lambda line: line["transfer"] - line["zero_shot_transfer"],
    **_of("transfer", "average", "last", "forgetting", "cil_last"),
    **_WITH_HEAD,
}
OF_SEQUENCES: dict[str, Column] = {
    **_of("transfer", "average", "last", "cil_average", "cil_last"),
    "cil_last, with head": _WITH_HEAD["cil_last, with head"],
}
_METRICS = _of("transfer", "average", "last", "forgetting")
_OF_CRITERION = tuple(_METRICS)[:3]


def page(lines: Sequence[Line]) -> str:
    """RESULTS.md from the results of the current start model and images.

    The unit of the comparison is an order: the mean over its seeds is one value, and intervals are
    over orders. Another seed says little of another order, and half a point is less than two orders
    differ by.
    """
    machine = sorted(
        {f"{r['cpu']}, torch {r['torch']}, {r['settings']['precision']}" for r in lines}
    )
    commits = sorted({r["commit"][:12] for r in lines if r["commit"]})
    parts = [
        "# Results on the bundled tasks",
        "Small images, a small start model, short tasks, the preset `small` (32 images in a "
        "batch): this compares methods with each other and says nothing of CLIP ViT-B/16 on the "
        "published benchmark. Accuracies in percent, metrics as `mulki metrics` defines them; cil: "
        "among all classes learned so far. In the files of results `settings` is the record of a "
        "run. With the head: at weight 0.25 and shrinkage 0.1, its defaults when these runs were "
        "made.",
        f"Measured on {'; '.join(machine)}; commits {', '.join(commits)}.",
        *_compared([r for r in lines if r["study"] == "compare"]),
    ]
    for name, study in STUDIES.items():
        of = [r for r in lines if r["study"] == name]
        if not of:
            continue
        if study.chooses:
            parts.append(choices(name, of, lines))
        else:
            command = f"{COMMAND} vit" if study.of_vit else _command(name, of)
            columns = OF_ORDERS if study.of_vit else OF_SEQUENCES
            parts += [f"## {study.title}\n\n`{command}`. {study.text}", table(of, columns)]
    return "\n\n".join(parts) + "\n"


def _command(study: str, lines: Sequence[Line]) -> str:
    seeds = sorted({r["options"]["seed"] for r in lines})
    return f"{COMMAND} {study} --seeds {' '.join(map(str, seeds))}"


def _compared(lines: Sequence[Line]) -> list[str]:
    of_orders = [r for r in lines if place_of(r["options"]) in ORDERS]
    parts = []
    if of_orders:
        parts += [
            f"## Six orders\n\n`{_command('compare', of_orders)}`. "
            "Mean over the orders and half of its 95 % "
            "interval over them (Student's t); the value of an order is the mean over its seeds. "
            "The orders share start model and images, so intervals leave out that a task's test "
            "set has a standard error of 1 to 2.5 points; and of so many of them one in twenty "
            "misleads. A row of fewer runs than another compares by the difference alone, which is "
            "of what both have. A forgetting below zero means that old tasks improved. Texts "
            "alone, but for the last two columns. The words are ImageNet's class names.",
            table(of_orders, OF_ORDERS),
            f"By order, {' / '.join(_OF_CRITERION)}. Strengths, MulKI's form and the rates of "
            "finetune and snd were chosen on orders III and IV, on training images that were held "
            "out. Orders I and II had a say in that MulKI has another form than at first. The last "
            "two were drawn at random; all have the same test images.",
            by_order(of_orders),
        ]
        apart = [r for r in of_orders if place_of(r["options"]) not in FORM_ORDERS]
        if apart:
            parts += ["The first table without orders III and IV:", table(apart, OF_ORDERS)]
    for sequence in SEQUENCES:
        if of := [r for r in lines if place_of(r["options"]) == sequence]:
            parts += [
                f"## {sequence}\n\n`{_command('compare', of)}`. "
                "Class-incremental: after each step of a "
                "few classes. Mean over seeds.",
                table(of, OF_SEQUENCES),
            ]
    return parts


def table(lines: Sequence[Line], columns: Mapping[str, Column]) -> str:
    """Every method, then MulKI less each other one, as Markdown.

    Args:
        lines: runs of the comparison.
        columns: by name, what is shown of a run.
    """
    by_row = _by_variant(lines)
    rows = [_row("method", "uses", *columns, "runs"), _row(*["---"] * (len(columns) + 3))]
    for name, of in by_row.items():
        means = (_shown(_by_place(of, column).values()) for column in columns.values())
        rows.append(_row(name, ", ".join(of[0]["uses"]) or "-", *means, len(of)))
    for name, of in by_row.items():
        if name != "mulki" and "mulki" in by_row:
            less = (_less(by_row["mulki"], of, column) for column in columns.values())
            rows.append(_row(f"mulki less {name}", "", *less, ""))
    return "\n".join(rows)


def by_order(lines: Sequence[Line]) -> str:
    """Transfer, Average and Last of every method in each order, as Markdown."""
    orders = [o for o in ORDERS if any(place_of(r["options"]) == o for r in lines)]
    rows = [_row("method", *orders), _row(*["---"] * (len(orders) + 1))]
    for name, of in _by_variant(lines).items():
        cells = []
        for order in orders:
            runs = [r for r in of if place_of(r["options"]) == order]
            values = (f"{mean(r[metric] for r in runs):.1f}" for metric in _OF_CRITERION)
            cells.append(" / ".join(values) if runs else "-")
        rows.append(_row(name, *cells))
    return "\n".join(rows)


def choices(name: str, lines: Sequence[Line], others: Sequence[Line] = ()) -> str:
    """Every variant of a study that chooses, the best one of each method first and in bold.

    Args:
        name: of the study, whose runs `lines` are.
        others: lines of all studies; beside those of `again` stand the runs of the presets.
    """
    study = STUDIES[name]
    if name == "again":
        lines = [*lines]
        for of_row, (where, variant) in BESIDE_AGAIN.items():
            preset = [r for r in others if (r["study"], r["variant"]) == (where, variant)]
            lines += [{**r, "variant": f"{of_row}, preset"} for r in preset]
    rows = [
        f"## {study.title}\n\n`{COMMAND} {name}`. {study.text} Tested on training images that were "
        "held out; the criterion is the mean of transfer, average and last. A row with fewer runs "
        "than others does not compare with them, and comes last.\n",
        _row("variant", "criterion", *_METRICS, "runs"),
        _row(*["---"] * (len(_METRICS) + 3)),
    ]

    def competing(line: Line) -> str:
        of = line["variant"].rpartition(", ")[0] if study.by_row else line["options"]["method"]
        return str(of)

    for group in dict.fromkeys(map(competing, lines)):
        by_variant = _by_variant([r for r in lines if competing(r) == group])
        most = max(map(len, by_variant.values()))
        ranked = sorted(
            by_variant.items(), key=lambda item: (len(item[1]) < most, -criterion(item[1]))
        )
        for place, (variant, of) in enumerate(ranked):
            means = (f"{mean(map(column, of)):.2f}" for column in _METRICS.values())
            # One that is not clear of the preset takes nothing's place.
            best = place == 0 and len(ranked) > 1 and name != "again"
            shown = variant + (" **best**" if best else "")
            rows.append(_row(shown, f"{criterion(of):.2f}", *means, len(of)))
    return "\n".join(rows)


def criterion(lines: Iterable[Line]) -> float:
    """Mean of Transfer, Average and Last over runs."""
    return mean(line[metric] for line in lines for metric in _OF_CRITERION)


def _by_variant(lines: Sequence[Line]) -> dict[str, list[Line]]:
    # In the order of the comparison's rows, and others as they come.
    names = dict.fromkeys((*ROWS, *(r["variant"] for r in lines)))
    found = {name: [r for r in lines if r["variant"] == name] for name in names}
    return {name: of for name, of in found.items() if of}


def _by_place(lines: Sequence[Line], column: Column) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for line in lines:
        found.setdefault(place_of(line["options"]), []).append(column(line))
    return {place: mean(values) for place, values in found.items()}


def _less(ours: Sequence[Line], others: Sequence[Line], column: Column) -> str:
    # Of the orders and seeds that both have.
    def known(lines: Sequence[Line]) -> set[tuple[str, int]]:
        return {(place_of(r["options"]), r["options"]["seed"]) for r in lines}

    both = known(ours) & known(others)
    if not both:
        return "-"
    mine, theirs = (
        _by_place([r for r in of if known([r]) <= both], column) for of in (ours, others)
    )
    return _shown([mine[place] - theirs[place] for place in mine], "+")


def _shown(values: Iterable[float], sign: str = "") -> str:
    known = list(values)
    if any(map(math.isnan, known)):
        return "-"
    middle, half = mean_interval(known)
    shown = f"{middle:{sign}.2f}"
    return shown if half is None else f"{shown} ± {half:.2f}"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


# --- Figures

# Of Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2")
_PANELS = (
    ("accuracy over the tasks learned so far, %", "learned"),
    ("accuracy less zero-shot over the tasks\nnot learned yet, points", "later"),
)


def curves(result: Line) -> dict[str, list[float]]:
    """The two curves of a run.

    Args:
        result: a line of the results; its matrix [T, T] is in percent.

    Returns:
        "learned" [T]: after task i the mean accuracy over tasks 1..i. "later" [T - 1]: after task i
        the mean over tasks i+1..T of accuracy less zero-shot accuracy.
    """
    matrix, zero_shot = np.array(result["matrix"]), np.array(result["zero_shot"])
    count = len(matrix)
    return {
        "learned": [float(matrix[i, : i + 1].mean()) for i in range(count)],
        "later": [
            float((matrix[i, i + 1 :] - zero_shot[i + 1 :]).mean()) for i in range(count - 1)
        ],
    }


def draw(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Draw the curves of `DRAWN_ROWS`: after each task, the mean over the orders and seeds.

    Args:
        lines: of the results, of which those of the six orders are drawn.
        folder: where ``learning-curves.svg`` and ``.png`` go.

    Raises:
        InputError: there are no runs.
    """
    # Here, since every process of a study imports this module, and none of them draws.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    runs = {
        name: [
            curves(r)
            for r in lines
            if (r["study"], r["variant"]) == ("compare", name) and place_of(r["options"]) in ORDERS
        ]
        for name in DRAWN_ROWS
    }
    if not any(runs.values()):
        raise InputError("figures: no runs of the comparison; run the study compare first")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for ax, (label, curve) in zip(axes, _PANELS, strict=True):
        for (name, of), colour in zip(runs.items(), _COLOURS, strict=True):
            if of:
                middle = np.mean([run[curve] for run in of], axis=0)
                steps = range(1, len(middle) + 1)
                ax.plot(steps, middle, label=name, color=colour, marker="o", markersize=3)
                ax.set_xticks(steps)
        if curve == "later":
            ax.axhline(0, color="grey", linewidth=0.8)
        ax.set_ylabel(label)
        ax.set_xlabel("tasks learned")
        ax.grid(alpha=0.3)
    axes[0].legend()
    paths = [folder / f"learning-curves.{suffix}" for suffix in ("svg", "png")]
    # Without a date, and with names that do not change, the same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "mulki"}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=110, metadata=metadata)
    return paths


if __name__ == "__main__":
    main()
