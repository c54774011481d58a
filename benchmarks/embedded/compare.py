"""Compare methods on the bundled tasks: choose, compare, and write the tables.

    python -m benchmarks.embedded.compare tune      # learning rates and weights, first three tasks
    python -m benchmarks.embedded.compare strength  # how strongly teachers hold, on III and IV
    python -m benchmarks.embedded.compare smoothing # label smoothing of every method, likewise
    python -m benchmarks.embedded.compare held      # forms of MulKI, likewise
    python -m benchmarks.embedded.compare again     # rates and strengths once more, likewise
    python -m benchmarks.embedded.compare changes   # images that MulKI is held on, likewise
    python -m benchmarks.embedded.compare compare   # methods at their presets, and variants
    python -m benchmarks.embedded.compare gates     # what weighs MulKI's teachers, on glyphs
    python -m benchmarks.embedded.compare vit_rates --model local-dir:CACHE/mulki-vit-112
    python -m benchmarks.embedded.compare vit_stages --model local-dir:CACHE/mulki-vit-112
    python -m benchmarks.embedded.compare vit --model local-dir:CACHE/mulki-vit-112
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
from typing import Any

from benchmarks.embedded import figures, studies, tables
from benchmarks.embedded.holdout import held_out
from benchmarks.embedded.studies import Options, Run
from mulki.clip.models import BUNDLED
from mulki.report.comparison.groups import NEUTRAL

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"  # a file for each study
TABLES = FOLDER / "RESULTS.md"
# Options that change no result.
WITHOUT_A_SAY = NEUTRAL - {"seed", "tasks", "order"}
# Nor do these in a method that looks at no reference set.
OF_REFERENCE = {"reference", "reference_changes", "reference_batch_size"}
# Options of every run. Those of the head are its defaults from before `moved.py` chose them.
SHARED = {"tasks": ("embedded",), "preset": "small", "head_weight": 0.25, "head_shrinkage": 0.1}


def main() -> None:
    """Run a study, or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "study",
        choices=(*studies.CHOICES, "compare", "gates", "vit", "tables", "figures"),
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(studies.SEEDS),
        help="for compare, gates, vit",
    )
    parser.add_argument(
        "--model",
        help=f"for {', '.join(studies.OF_VIT)}: what benchmarks.embedded.pack.vit made",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    arguments = parser.parse_args()
    if (arguments.study in studies.OF_VIT) != (arguments.model is not None):
        parser.error(f"--model belongs to {', '.join(studies.OF_VIT)}, and they need it")
    if arguments.study == "tables":
        TABLES.write_text(tables.page(standing(read_results())))
        print(TABLES.read_text())
        return
    if arguments.study == "figures":
        for path in figures.draw(standing(read_results()), FOLDER):
            print(path)
        return
    runs = {
        "tune": lambda: [run for method in studies.GRIDS for run in studies.tuning(method)],
        "strength": lambda: [run for method in studies.TUNED for run in studies.strengths(method)],
        "smoothing": lambda: [run for method in studies.GRIDS for run in studies.smoothing(method)],
        "held": studies.held,
        "again": studies.again,
        "changes": studies.changes,
        "compare": lambda: studies.comparison(tuple(arguments.seeds)),
        "gates": lambda: studies.gates(tuple(arguments.seeds)),
        "vit_rates": lambda: studies.vit_rates(arguments.model),
        "vit_stages": lambda: studies.vit_stages(arguments.model),
        "vit": lambda: studies.vit(arguments.model, tuple(arguments.seeds)),
    }[arguments.study]()
    carry_out(runs, arguments.jobs)


def carry_out(runs: list[Run], jobs: int) -> None:
    """Run what has no result yet, `jobs` at a time, one share of the cores each.

    Args:
        runs: of one start model.
        jobs: processes at a time.

    Raises:
        ValueError: two runs of the study are the same, so that one would vanish from its table.
        RuntimeError: runs have failed; the others have their lines.
    """
    pack = fingerprint(runs[0].model if runs else BUNDLED)
    wanted = [settings_of(run) for run in runs]
    twice = {run.variant for run, of in zip(runs, wanted, strict=True) if wanted.count(of) > 1}
    if twice:
        raise ValueError(f"the same run under several names: {', '.join(sorted(twice))}")
    done = [r for r in read_results() if r["pack"] == pack]
    pending = [
        run
        for run, settings in zip(runs, wanted, strict=True)
        if not any(r["study"] == run.study and has_settings(r, settings) for r in done)
    ]
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
        if run.study in studies.CHOICES:
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
    values = asdict(settings.run) | asdict(settings.method)
    # The name of a model's folder alone; which weights it has says the fingerprint.
    values["model"] = _folder(run.model).name
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
    """The results that hold for the present start models, images, presets and defaults.

    Studies by which a preset was chosen began from the preset before it; their results stay. The
    transformer is that of the study's last line, since its weights are not here to be looked at.
    Of equal runs the last counts.
    """
    bundled = fingerprint()
    packs = {r["study"]: r["pack"] for r in results if r["study"] in studies.OF_VIT}
    of_vit = [r for r in results if r["study"] == "vit"]
    seeds = tuple({r["options"]["seed"] for r in results if r["study"] not in studies.CHOICES})
    runs = [*studies.comparison(seeds), *studies.gates(seeds)]
    if of_vit:
        runs += studies.vit(f"local-dir:{of_vit[-1]['settings']['model']}", seeds)

    def key(study: str, variant: str, options: Options) -> tuple[Any, ...]:
        return study, variant, tables.place_of(options), options["seed"]

    reported = {key(run.study, run.variant, run.options): run for run in runs}

    def holds(result: dict[str, Any]) -> bool:
        if result["pack"] != packs.get(result["study"], bundled):
            return False
        if result["study"] in studies.CHOICES:
            return True
        run = reported.get(key(result["study"], result["variant"], result["options"]))
        return run is not None and has_settings(result, settings_of(run))

    held = {
        (r["study"], r["variant"], json.dumps(r["options"], sort_keys=True)): r
        for r in results
        if holds(r)
    }
    return list(held.values())


def _folder(model: str) -> Path:
    return Path(model.removeprefix("local-dir:"))


def _plain(values: Options) -> Options:
    plain: Options = json.loads(json.dumps(values))
    return plain


def read_results() -> list[dict[str, Any]]:
    """Every finished run."""
    files = sorted(RESULTS.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
