"""Compare methods on the bundled tasks: tune, compare, ablate, and write the tables.

    python -m benchmarks.embedded.compare tune      # learning rates and weights, first three tasks
    python -m benchmarks.embedded.compare forms     # forms of MulKI, on orders III and IV
    python -m benchmarks.embedded.compare strength  # how strongly teachers hold, on III and IV
    python -m benchmarks.embedded.compare smoothing # label smoothing of every method, likewise
    python -m benchmarks.embedded.compare held      # forms of MulKI without it, likewise
    python -m benchmarks.embedded.compare changes   # images that they are held on, likewise
    python -m benchmarks.embedded.compare compare   # every method at its preset
    python -m benchmarks.embedded.compare orders    # the same over six orders, three seeds
    python -m benchmarks.embedded.compare ablate    # MulKI less one stage at a time
    python -m benchmarks.embedded.compare tables    # RESULTS.md from the runs so far
    python -m benchmarks.embedded.compare figures   # learning curves from the runs so far

Every finished run is a line of `results/STUDY.jsonl` beside this file; a run that is there already,
with the same settings and the same start model and images, is not repeated.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.embedded import figures, orders, studies
from benchmarks.embedded.holdout import held_out
from benchmarks.embedded.packed_answers import pack as packed
from benchmarks.embedded.packed_answers import unpack
from benchmarks.embedded.studies import Options, Run
from mulki.report.comparison.groups import NEUTRAL
from mulki.runs.answers import read_answers
from mulki.runs.intervals import (
    Difference,
    RunAnswers,
    interval_over,
    mean_interval,
    paired_differences,
    seed_differences,
)

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"  # a file for each study
TABLES = FOLDER / "RESULTS.md"
METRICS = ("transfer", "average", "last", "forgetting", "cil_average", "cil_last")
# Options that change no result.
WITHOUT_A_SAY = NEUTRAL - {"seed", "tasks", "order"}
# Nor do these in a method that looks at no reference set.
OF_REFERENCE = {"reference", "reference_changes", "reference_batch_size"}
# Options of every run.
SHARED = {"tasks": ("embedded",), "preset": "small"}
COMMAND = "python -m benchmarks.embedded.compare"
NOTES = (
    "- Seeds set in what order the images come: one start model, one pack. Intervals over seeds "
    "alone leave out that a task's test set has a standard error of 1 to 2.5 points.",
    "- Learning rate and weight of each method are tuned alike (below), on the first three tasks "
    "of order I; what form MulKI has was chosen on orders III and IV (below). The relations and "
    "the gate descend from an earlier pilot on all six tasks in order I with another start model, "
    "so order II is the cleaner evidence.",
    f"- `{studies.ABLATED}` is the form of MulKI that was tuned. Its gate and its mean of weights "
    "were looked at again because of the ablation below, which is of the reported sequences; what "
    "took their place was chosen on orders III and IV.",
    "- In the files of results `settings` is the record of a run; `options` leave out what a "
    "preset had then.",
    "- Uses: what a method takes beside its tasks; the words are ImageNet's class names, without "
    "any image of theirs. zscl and snd distil on the task's own images here; with reference images "
    "of their own they are other methods. The text projection trains in every method, in snd "
    "too, which has no term for it.",
    "- zero_shot is the start model, which learns nothing; its transfer is what can be lost.",
)


def main() -> None:
    """Run a study, or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "study",
        choices=(*studies.CHOICES, "compare", "orders", "ablate", "tables", "figures"),
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(studies.GRIDS), help="for tune, strength, smoothing"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help="for orders and ablate; by default those of the study",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    arguments = parser.parse_args()
    seeds = (tuple(arguments.seeds),) if arguments.seeds else ()
    if arguments.study == "tables":
        TABLES.write_text(tables(standing(read_results())))
        print(TABLES.read_text())
        return
    if arguments.study == "figures":
        for path in figures.draw(drawn_runs(standing(read_results())), FOLDER):
            print(path)
        return
    runs = {
        "tune": lambda: [r for m in arguments.methods for r in studies.tuning(m)],
        "forms": studies.forms,
        "strength": lambda: [
            r for m in arguments.methods if m in studies.TUNED for r in studies.strengths(m)
        ],
        "smoothing": lambda: [
            r for m in arguments.methods if m != "mulki" for r in studies.smoothing(m)
        ],
        "held": studies.held,
        "changes": studies.changes,
        "compare": studies.comparison,
        "orders": lambda: studies.orders(*seeds),
        "ablate": lambda: studies.ablation(*seeds),
    }[arguments.study]()
    carry_out(runs, arguments.jobs)


def carry_out(runs: list[Run], jobs: int) -> None:
    """Run what has no result yet, `jobs` at a time, one share of the cores each.

    Raises:
        ValueError: two runs of the study are the same, so that one would vanish from its table.
    """
    pack = fingerprint()
    wanted = [settings_of(run) for run in runs]
    twice = {run.variant for run, of in zip(runs, wanted, strict=True) if wanted.count(of) > 1}
    if twice:
        raise ValueError(f"the same run under several names: {', '.join(sorted(twice))}")
    done = [r for r in read_results() if r["pack"] == pack]
    pending = [
        run
        for run, settings in zip(runs, wanted, strict=True)
        if not any(has_settings(r, settings) for r in done)
    ]
    print(f"{len(runs)} runs, {len(pending)} to do", flush=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(one_run, r, pack, threads) for r in pending]
        for future in as_completed(futures):
            result = future.result()
            with (RESULTS / f"{result['study']}.jsonl").open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            figures = " ".join(f"{k} {result[k]:.2f}" for k in METRICS if result[k] is not None)
            print(f"{result['variant']} {result['options']}: {figures}", flush=True)


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
        settings = resolve(SHARED | run.options | here)
        tasks = load_tasks(settings.run)
        if run.study in studies.CHOICES:
            tasks = [held_out(task) for task in tasks]
        folder = learn(settings, tasks=tasks)
        answers = RunAnswers.of_rows(read_answers(folder.path))
        environment = json.loads((folder.path / "env.json").read_text())
        summary = json.loads((folder.path / "summary.json").read_text())
    matrix = folder.matrix
    unlearned = matrix.zero_shot_metrics()
    # Choices are made by the criterion alone; intervals need to know which images were right.
    kept = {} if run.study in studies.CHOICES else {"answers": packed(answers)}
    return {
        "pack": pack,
        "study": run.study,
        "variant": run.variant,
        "options": _plain(run.options),
        "settings": settings_of(run),
        **matrix.metrics().to_dict(),
        **({} if folder.with_head is None else folder.with_head.metrics()),
        "zero_shot_transfer": None if unlearned is None else unlearned.transfer,
        "cil_average": folder.class_incremental.average,
        "cil_last": folder.class_incremental.last,
        "uses": summary["uses"],
        "tasks": list(matrix.tasks),
        "matrix": [list(row) for row in matrix.rows],
        "zero_shot": list(matrix.zero_shot or ()),
        **kept,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": threads,
        "cpu": environment["cpu"],
        "commit": environment["git_commit"],
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
    }


def fingerprint() -> str:
    """Of the images and the start model, so that results of others are not mistaken for theirs."""
    from mulki.data.embedded import embedded_root

    root = embedded_root()
    tasks = json.loads((root / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    digest = hashlib.sha256(json.dumps(tasks, sort_keys=True).encode())
    digest.update((root / "mulki-mini" / "open_clip_model.safetensors").read_bytes())
    return digest.hexdigest()[:12]


def settings_of(run: Run) -> Options:
    """All options of a run that have a say in its result, as JSON gives them back."""
    from mulki.methods import get
    from mulki.train.config.run_config import resolve

    settings = resolve(SHARED | run.options)
    values = asdict(settings.run) | asdict(settings.method)
    needs = get(settings.run.method)(settings.method).needs
    idle = WITHOUT_A_SAY if needs.reference else WITHOUT_A_SAY | OF_REFERENCE
    return _plain({name: value for name, value in values.items() if name not in idle})


def has_settings(result: dict[str, Any], settings: Options) -> bool:
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
    return _plain({item.name: item.default for of in options for item in fields(of)})


def standing(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results that hold for the present start model, images, presets and defaults.

    Studies by which a preset was chosen began from the preset before it; their results stay.
    """
    pack = fingerprint()
    reported = {
        (run.study, run.variant, scene_of({"options": run.options}), run.options["seed"]): run
        for run in (*studies.comparison(), *studies.orders(), *studies.ablation())
    }

    def holds(result: dict[str, Any]) -> bool:
        if result["study"] in studies.CHOICES:
            return True
        place = (result["study"], result["variant"], scene_of(result), result["options"]["seed"])
        run = reported.get(place)
        return run is not None and has_settings(result, settings_of(run))

    return [r for r in results if r["pack"] == pack and holds(r)]


def _plain(values: Options) -> Options:
    plain: Options = json.loads(json.dumps(values))
    return plain


def read_results() -> list[dict[str, Any]]:
    """Every finished run."""
    files = sorted(RESULTS.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def tables(results: list[dict[str, Any]]) -> str:
    """RESULTS.md from the results of the current start model and images."""
    by_study = {
        study: [r for r in results if r["study"] == study]
        for study in (*studies.CHOICES, "compare", "orders", "ablate")
    }
    machine = sorted(
        {f"{r['cpu']}, torch {r['torch']}, {r['settings']['precision']}" for r in results}
    )
    commits = sorted({r["commit"][:12] for r in results if r["commit"]})
    parts = [
        "# Results on the bundled tasks",
        "Small images, a small start model, short tasks, the preset `small` (32 images in a "
        "batch): this compares methods with each other and says nothing of CLIP ViT-B/16 on the "
        "published benchmark. Accuracies in percent, metrics as `mulki metrics` defines them; cil: "
        "among all classes learned so far, one head.",
        f"Measured on {'; '.join(machine)}; commits {', '.join(commits)}.",
    ]
    if by_study["compare"]:
        parts += [comparison_table(by_study["compare"])]
    if by_study["orders"]:
        parts += [orders_table(by_study["orders"])]
    if by_study["ablate"]:
        parts += [ablation_table(by_study["compare"], by_study["ablate"])]
    if by_study["tune"]:
        parts += [tuning_table(by_study["tune"])]
    if by_study["forms"]:
        parts += [forms_table(by_study["forms"])]
    if by_study["strength"]:
        parts += [strength_table(by_study["strength"] + by_study["forms"])]
    parts += [
        later_table(study, *said, by_study[study])
        for study, said in _LATER.items()
        if by_study[study]
    ]
    return "\n\n".join(parts) + "\n"


# Studies since label smoothing was left out: title, and what is chosen.
_LATER = {
    "smoothing": ("Label smoothing", "Each method at its preset, by label smoothing."),
    "held": (
        "MulKI held on made images",
        "MulKI's forms without label smoothing, most held on images made of the task's own.",
    ),
    "changes": ("What images are made of", "The first of these forms, by what images are made of."),
}


def later_table(study: str, title: str, what: str, results: list[dict[str, Any]]) -> str:
    """Every variant of a study, by the criterion of the tuning."""
    return "\n".join(
        [
            f"## {title}",
            "",
            f"`{COMMAND} {study}`. {what} Orders III and IV, tested on training images that were "
            "held out, one seed; a row with one run is of one order alone, and compares with none "
            "of two.",
            "",
            _header("variant", "criterion", *METRICS[:4], "runs"),
            *_ranked(results),
        ]
    )


def comparison_table(results: list[dict[str, Any]]) -> str:
    """Mean and interval of each method, and MulKI's paired gain over each other method."""
    lines = [
        "## Comparison",
        "",
        f"`{COMMAND} compare`. Mean and half of its 95 % interval over seeds (Student's t); a "
        "forgetting below zero means that old tasks improved.",
        "",
        _header("sequence", "order", "method", "uses", *METRICS, "runs"),
    ]
    for scene in studies.SCENES:
        for name in studies.ROWS:
            of = [r for r in results if scene_of(r) == scene and r["variant"] == name]
            if of:
                uses = ", ".join(of[0]["uses"]) or "-"
                means = (_mean(of, metric) for metric in METRICS)
                lines.append(_row(*scene, name, uses, *means, len(of)))
    lines += [
        "",
        "MulKI less the other method, paired by seed, with the 95 % interval over seeds (Student's "
        "t) and test images (paired bootstrap); see `mulki.runs.intervals`:",
        "",
        _header("against", "sequence", "order", *METRICS, "interval over", "pairs"),
    ]
    for name in studies.ROWS:
        for scene in studies.SCENES:
            of = [r for r in results if scene_of(r) == scene]
            ours = [r for r in of if r["variant"] == "mulki"]
            others = [r for r in of if r["variant"] == name != "mulki"]
            if cells := _differences(ours, others):
                lines.append(_row(name, *scene, *cells))
    lines += ["", *NOTES]
    return "\n".join(lines)


def orders_table(results: list[dict[str, Any]]) -> str:
    """Every method over six orders, see `benchmarks.embedded.orders`."""
    return "\n".join(
        [
            "## Six orders",
            "",
            f"`{COMMAND} orders`. Mean over the orders and half of its 95 % interval over them "
            "(Student's t); the value of an order is the mean over its seeds. MulKI's forms, and "
            "the strength and label smoothing of all, were chosen on orders III and IV, on "
            "training images that were held out. The last two orders were drawn at random.",
            "",
            _header("method", *orders.COLUMNS, "runs"),
            *orders.table(results),
        ]
    )


def ablation_table(whole: list[dict[str, Any]], changed: list[dict[str, Any]]) -> str:
    """Each variant's paired difference from MulKI as compared."""
    lines = [
        "## Ablation of MulKI",
        "",
        f"`{COMMAND} ablate`. Difference from the row `{studies.ABLATED}` of "
        "the comparison, which has all four stages, paired by seed, with its 95 % interval as "
        "above.",
        "",
        _header("variant", "sequence", "order", *METRICS, "interval over", "pairs"),
    ]
    for name in studies.MULKI_STAGES:
        for scene in studies.SCENES:
            ours = [r for r in changed if r["variant"] == name and scene_of(r) == scene]
            others = [r for r in whole if r["variant"] == studies.ABLATED and scene_of(r) == scene]
            if cells := _differences(ours, others):
                lines.append(_row(name, *scene, *cells))
    return "\n".join(lines)


def tuning_table(results: list[dict[str, Any]]) -> str:
    """Every point of the grids; the best one of a method is its preset."""
    lines = [
        "## Tuning",
        "",
        f"`{COMMAND} tune`. First three tasks of order I alone, tested on training images that "
        "were held out; mean over two seeds. The criterion is the mean of transfer, average and "
        "last. The best point of finetune and of wise_ft is their preset; from that of the others "
        "their strength was chosen (below).",
        "",
        _header("point", "criterion", *METRICS[:4], "runs"),
    ]
    for method in studies.GRIDS:
        lines += _ranked([r for r in results if r["options"]["method"] == method])
    return "\n".join(lines)


def forms_table(results: list[dict[str, Any]]) -> str:
    """MulKI's forms, by the criterion of the tuning."""
    return "\n".join(
        [
            "## Forms of MulKI",
            "",
            f"`{COMMAND} forms`. Orders III and IV, tested on training images that were held out; "
            "mean of the two, one seed. The criterion is that of the tuning. No other method had "
            "as many choices. Rows with four runs were run again with a later version of the code, "
            "whose criterion in one order differs by 0.1 to 0.4 points.",
            "",
            _header("form", "criterion", *METRICS[:4], "runs"),
            *_ranked(results),
        ]
    )


def strength_table(results: list[dict[str, Any]]) -> str:
    """Every strength of the methods with teachers; the best one of a method is its preset.

    Args:
        results: of this study and of the forms, which have some of the same runs.
    """
    lines = [
        "## Strength",
        "",
        f"`{COMMAND} strength`. The best point of the tuning with its weights 1, 2, 6 times as "
        "large, and on until the best strength is not the last. Orders, images and criterion are "
        "those of the forms. The best strength of a method is its preset; MulKI's has the best "
        "form besides.",
        "",
        _header("point", "criterion", *METRICS[:4], "runs"),
    ]
    for method in studies.TUNED:
        lines += _ranked(at_strengths(method, results))
    return "\n".join(lines)


def at_strengths(method: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those results that are runs of `studies.strengths`, named as there."""
    wanted = [(run.variant, settings_of(run)) for run in studies.strengths(method)]
    return [
        r | {"variant": variant}
        for variant, settings in wanted
        for r in results
        if has_settings(r, settings)
    ]


def _ranked(results: list[dict[str, Any]]) -> list[str]:
    # A row for each variant, the best one first and in bold.
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        by_variant.setdefault(r["variant"], []).append(r)
    ranked = sorted(by_variant.items(), key=lambda item: -criterion(item[1]))
    return [
        _row(
            variant + (" **best**" if place == 0 else ""),
            f"{criterion(of):.2f}",
            *(f"{mean(r[metric] for r in of):.2f}" for metric in METRICS[:4]),
            len(of),
        )
        for place, (variant, of) in enumerate(ranked)
    ]


def criterion(results: list[dict[str, Any]]) -> float:
    """Mean of Transfer, Average and Last over runs."""
    return mean(r[metric] for r in results for metric in METRICS[:3])


def drawn_runs(
    results: list[dict[str, Any]],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The runs of the rows that the figure shows, by scene and row."""
    return {
        f"{sequence}, order {order}": {
            name: [
                r
                for r in results
                if (r["study"], r["variant"]) == ("compare", name)
                and scene_of(r) == (sequence, order)
            ]
            for name in studies.DRAWN_ROWS
        }
        for sequence, order in studies.SCENES
        if sequence == "embedded"
    }


def scene_of(result: dict[str, Any]) -> tuple[str, str]:
    """Sequence and order of a run; single tasks are a sequence of their own."""
    options = result["options"]
    return " ".join(options.get("tasks", ("embedded",))), options.get("order", "I")


def _differences(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    # Cells of the metrics, of what the intervals are over, and of the number of pairs.
    by_seed = {r["options"]["seed"]: r for r in others}
    if len(others) == 1 and others[0]["options"]["method"] == "zero_shot":
        # Without training the seed has no say, and there is one run.
        by_seed = dict.fromkeys((r["options"]["seed"] for r in ours), others[0])
    pairs = [(r, by_seed[r["options"]["seed"]]) for r in ours if r["options"]["seed"] in by_seed]
    if not pairs:
        return []
    ours, others = map(list, zip(*pairs, strict=True))
    with_images = all("answers" in r for r in (*ours, *others))
    found: dict[str, Difference] = (
        paired_differences(*([unpack(r["answers"]) for r in of] for of in (ours, others)))
        if with_images
        else seed_differences(*([_known(r) for r in of] for of in (ours, others)))
    )
    cells = [_difference(found[name]) if name in found else "-" for name in METRICS]
    return [*cells, interval_over(len(pairs), images=with_images), str(len(pairs))]


def _known(result: dict[str, Any]) -> dict[str, float]:
    # Lines of earlier versions have no class-incremental metrics.
    return {name: result[name] for name in METRICS if result.get(name) is not None}


def _mean(results: list[dict[str, Any]], name: str) -> str:
    values = [known[name] for known in map(_known, results) if name in known]
    if len(values) < len(results):
        return "-"
    middle, half = mean_interval(values)
    return f"{middle:.2f}" if half is None else f"{middle:.2f} ± {half:.2f}"


def _difference(of: Difference) -> str:
    if of.low is None or of.high is None:
        return f"{of.value:+.2f}"
    return f"{of.value:+.2f} [{of.low:+.2f}, {of.high:+.2f}]"


def _header(*names: str) -> str:
    return _row(*names) + "\n" + _row(*("---" for _ in names))


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
