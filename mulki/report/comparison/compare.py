"""Comparing run folders: means over seeds, and differences from a baseline, with 95 % intervals.

Runs that differ in nothing but the seed are a group. Groups are compared where they learned the
same tasks in the same order. See `mulki.runs.intervals` for what the intervals hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mulki.choices.option_files import options_in
from mulki.errors import InputError, counted, nearest
from mulki.printing import printable
from mulki.report.comparison.groups import (
    LEARNED_BEFORE,
    LEARNED_WITH,
    NEUTRAL,
    TITLES,
    Against,
    Comparison,
    Group,
    Run,
    Section,
    learned_with,
)
from mulki.runs.answers import FOLDER, read_answers
from mulki.runs.intervals import RunAnswers, interval_over, paired_differences, seed_differences
from mulki.runs.reading import read_folder

# What a run has written once it is complete.
_FILES = ("args.yaml", "summary.json", "matrix.csv")
#: What a grid writes beside its runs: as text, as numbers and as a page.
GRID_FILES = ("comparison.txt", "comparison.json", "comparison.html")


def compare(folders: Sequence[str | os.PathLike[str]], baseline: str | None = None) -> Comparison:
    """Compare run folders; runs that are damaged or not complete are left out, with a warning.

    Args:
        folders: at least one; one that is given twice counts once. One that holds runs or grids
            stands for all of their runs, and what a grid writes beside them is passed over. Beside
            runs, other files and folders are left out with a warning.
        baseline: label of a group, or a method with one group; by default the label of the first
            run's group. A section without that label then has its first group of that method, or
            its own first one.

    Raises:
        InputError: a path that is not there, no run among them, no complete run, groups that have
            no sequence and order in common, or an unknown baseline.
    """
    warnings: list[str] = []
    unlike: list[str] = []
    expanded = [each for folder in folders for each in _runs_in(Path(folder))]
    distinct = {folder.resolve(): folder for folder in expanded}
    runs = list(_complete(_without_others([*distinct.values()], warnings), warnings))
    if not runs:
        raise InputError(
            "; ".join(["no complete run to compare", *warnings])
            + "; pass folders of runs that have ended"
        )
    by_tasks: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    in_any_order: dict[frozenset[str], dict[str, Run]] = {}
    for run in runs:
        tasks = run.data.matrix.tasks
        by_tasks.setdefault(tasks, {}).setdefault(run.configuration, []).append(run)
        in_any_order.setdefault(frozenset(tasks), {}).setdefault(run.configuration, run)
    recipes = {run.recipe for run in runs}
    if len(recipes) > 1 and all(len(here) == 1 for here in by_tasks.values()):
        raise InputError(
            f"{runs[0].path} and the others: no two configurations learned the same tasks in the "
            "same order; pass runs of one sequence and order"
        )
    labels = {tasks: _labels(here.values()) for tasks, here in in_any_order.items()}
    groups_of = {
        tasks: tuple(Group(labels[frozenset(tasks)][c], tuple(of)) for c, of in here.items())
        for tasks, here in by_tasks.items()
    }
    if baseline is not None:
        _check_baseline(baseline, [group for groups in groups_of.values() for group in groups])
    first = next(iter(groups_of.values()))[0]
    sections = []
    for tasks, groups in groups_of.items():
        name = _name(groups[0].runs[0])
        unlike += (mixed := list(_mixed(name, groups)))
        warnings += [*mixed, *_repeated(name, groups)]
        if baseline is not None:
            base = _base(baseline, groups)
        else:
            of_label = [group for group in groups if group.label == first.label]
            of_method = [g for g in groups if g.runs[0].method == first.runs[0].method]
            base = (of_label or of_method or groups)[0]
        if base is None:
            warnings.append(f"{name}: no run of the baseline {baseline}, so no differences")
        others = [g for g in groups if base is not None and g is not base]
        differences = [_against(name, g, base, warnings) for g in others if base is not None]
        sections.append(
            Section(
                name,
                tasks,
                groups,
                base.label if base else None,
                tuple(each for each in differences if each is not None),
            )
        )
    return Comparison(tuple(sections), tuple(warnings), tuple(unlike))


def _runs_in(path: Path, depth: int = 2) -> list[Path]:
    # The runs of a folder and of the grids in it, or what was given; nothing of the files that a
    # grid writes.
    if path.is_file() and path.name in GRID_FILES:
        return []
    if not depth or not path.is_dir() or _is_run(path):
        return [path]
    with suppress(PermissionError):  # a folder of somebody else
        folders = (child for child in path.iterdir() if child.is_dir())
        children = sorted(child for child in folders if not child.name.startswith("."))
        found = [run for child in children for run in _runs_in(child, depth - 1)]
        return found if any(map(_is_run, found)) else [path]
    return [path]


def _is_run(path: Path) -> bool:
    with suppress(PermissionError):
        return any((path / name).is_file() for name in _FILES)
    return False


def _without_others(paths: Sequence[Path], warnings: list[str]) -> list[Path]:
    # A pattern of a shell, such as logs/*, also matches what lies beside runs.
    others = [path for path in paths if not _is_run(path)]
    wrong = [path for path in others if len(others) == len(paths) or not path.exists()]
    if wrong:
        raise InputError(
            f"{wrong[0]}: not the folder of a run, it has none of {', '.join(_FILES)}; pass "
            "folders that mulki run has written"
        )
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        named = ", ".join(map(str, others[:5]))
        warnings.append(f"{named}{more}: left out, not the folder of a run")
    return [path for path in paths if path not in others]


def _complete(folders: Iterable[Path], warnings: list[str]) -> Iterator[Run]:
    for folder in folders:
        try:
            run = _read(folder)
        except (InputError, OSError) as error:
            reason = str(error).removeprefix(f"{folder}{os.sep}").removeprefix(f"{folder}: ")
            warnings.append(f"{folder}: left out, {reason}")
            continue
        matrix = run.data.matrix
        if run.data.status == "complete" and matrix.tasks:
            yield run
        else:
            learned = f"{len(matrix.tasks)} of {len(matrix.columns)} tasks"
            warnings.append(f"{folder}: left out, {run.data.status} after {learned}")


def _read(folder: Path) -> Run:
    missing = next((name for name in _FILES if not (folder / name).is_file()), None)
    if missing is not None:
        raise InputError(f"{missing} is not there; restore the file, or run it again")
    data = read_folder(folder)
    try:
        options = options_in(data.config)
        _ = int(options["seed"]), options["method"], options["order"]
        if not isinstance(options["tasks"], str | list):
            raise TypeError("tasks")
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{folder / 'args.yaml'}: not the options of a run; restore the file, or leave the "
            "folder out"
        ) from None
    hashes = data.environment.get("hashes", {})
    _check(folder / "env.json", "hashes", hashes, dict)
    _check(folder / "env.json", "splits", hashes.get("splits", {}), dict)
    before = data.environment.get("learned_before", [])
    _check(folder / "env.json", "learned_before", before, list)
    # The rows of an earlier run are those of this one too, where its checkpoints were found.
    without_row = [name for name in before if name not in data.matrix.tasks]
    # Older folders do not say it.
    if "learned_before" in data.environment or options.get("continue") is None:
        options[LEARNED_BEFORE] = " ".join(without_row) or "nothing"
    options[LEARNED_WITH] = "the same"
    if others := learned_with(data):
        text = json.dumps(others, sort_keys=True, default=str)
        options[LEARNED_WITH] = f"others ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
    _check(folder / "summary.json", "uses", data.summary.get("uses") or [], list)
    kept = data.status == "complete" and (folder / FOLDER).is_dir()
    rows = read_answers(folder) if kept else {}
    captions = {name for row in rows.values() for name, each in row.items() if each.ranks}
    answers = RunAnswers.of_rows(rows) if kept else None
    return Run(folder, data, options, answers, frozenset(captions))


def _check(path: Path, key: str, value: Any, kind: type[Collection[Any]]) -> None:
    if not isinstance(value, kind) or not all(isinstance(item, str) for item in value):
        raise InputError(f'{path}: "{key}" is not what a run writes; restore the file')


def _labels(runs: Iterable[Run]) -> dict[str, str]:
    # Labels by configuration, of runs that each have their own. Presets give other methods other
    # options, which the name of the method stands for, so a label has the options in which the
    # configurations of one method differ.
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    labels = {}
    for method, same in by_method.items():
        names = sorted({name for run in same for name in run.options} - NEUTRAL)
        shown = [
            [f"{n} unset" if run.options.get(n) is None else f"{n}={run.options[n]}" for n in names]
            for run in same
        ]
        differ = [
            i for i, of_option in enumerate(zip(*shown, strict=True)) if len({*of_option}) > 1
        ]
        for run, own in zip(same, shown, strict=True):
            labels[run.configuration] = printable(" ".join([method, *(own[i] for i in differ)]))
    return labels


def _base(given: str, groups: Sequence[Group]) -> Group | None:
    # The group with this label, or the only one of this method.
    by_label = {group.label: group for group in groups}
    of_method = [group for group in groups if group.runs[0].method == given]
    if given not in by_label and len(of_method) > 1:
        raise InputError(
            f"--baseline: {given} has {len(of_method)} configurations; pass one of "
            f"{', '.join(repr(group.label) for group in of_method)}"
        )
    return by_label.get(given, next(iter(of_method), None))


def _check_baseline(given: str, groups: Sequence[Group]) -> None:
    known = sorted({group.label for group in groups} | {g.runs[0].method for g in groups})
    if given not in known:
        raise InputError(
            f"--baseline: no runs of {given}{nearest(given, known)}; pass one of "
            f"{', '.join(map(repr, known))}"
        )


def _name(run: Run) -> str:
    words = run.options["tasks"]
    words = [words] if isinstance(words, str) else words
    tasks = run.data.matrix.tasks
    # One word may be a sequence, one task, or what a run learned after those of an earlier one.
    if len(words) == 1 and len(tasks) > 1 and run.options.get("continue") is None:
        steps = f" in {len(tasks)} steps" if run.options.get("scenario") == "cil" else ""
        return f"{words[0]}{steps}, order {run.options['order']}"
    return ", ".join(tasks)


def _mixed(name: str, groups: Sequence[Group]) -> Iterator[str]:
    # What should be the same in all runs of a section.
    runs = [run for group in groups for run in group.runs]
    hashes = {run: run.data.environment.get("hashes", {}) for run in runs}
    facts = {
        "start models": {
            run: [run.options.get(k) for k in ("model", "pretrained")] for run in runs
        },
        "start weights": {run: hashes[run].get("weights") for run in runs},
        **_of_tasks(runs, hashes),
        # Folders of before there were others have that of the task.
        "protocols": {run: run.options.get("protocol") for run in runs},
        "label spaces": {run: run.options.get("label_space", "task") for run in runs},
        "sizes of test sets": {run: run.data.summary.get("test_images") for run in runs},
        # Folders of before it was written are of one process.
        "numbers of processes": {run: run.data.environment.get("processes", 1) for run in runs},
    }
    # Not every method uses these.
    used = {
        "vocabularies": {run: hashes[run].get("vocabulary") for run in runs},
        "reference sets": {run: hashes[run].get("reference") for run in runs},
        "original models": {run: hashes[run].get("original") for run in runs},
    }
    facts |= {
        what: {run: value for run, value in of_run.items() if value is not None}
        for what, of_run in used.items()
    }
    for what, of_run in facts.items():
        if not of_run:
            continue
        first = next(iter(of_run))
        others = [str(run.path) for run in of_run if of_run[run] != of_run[first]]
        if others:
            yield f"{name}: {what} of {', '.join(others)} differ from those of {first.path}"


def _repeated(name: str, groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            yield f"{name}: {group.label} has several runs of one seed; the first of them is paired"


def _of_tasks(
    runs: Sequence[Run], hashes: Mapping[Run, Mapping[str, Any]]
) -> dict[str, dict[Run, Any]]:
    def of(key: str) -> dict[Run, Any]:
        return {run: hashes[run].get(key) for run in runs}

    def all_have(key: str) -> bool:
        return all(key in each for each in hashes.values())

    # Older folders have fewer hashes, and the oldest one for all of a task.
    if not all_have("prompts") or not all_have("splits"):
        return {"images or prompts": of("tasks")}
    if not all_have("tests"):
        return {"prompts": of("prompts"), "images": of("splits")}
    found = {"prompts": of("prompts"), "test images": of("tests")}
    # A few images of each class are others for each seed, and a run that goes on has no training
    # images of the earlier tasks: there it counts as having those of the others.
    for seed in sorted({run.seed for run in runs}):
        own = {run: _learned_images(run) for run in runs if run.seed == seed}
        known: dict[str, Any] = {}
        for each in own.values():
            known = each | known
        found[f"training images of seed {seed}"] = {run: known | own[run] for run in own}
    return found


def _learned_images(run: Run) -> dict[str, Any]:
    before = run.data.environment.get("learned_before", [])
    splits = run.data.environment["hashes"]["splits"]
    return {task: of for task, of in splits.items() if task not in before}


def _against(name: str, group: Group, base: Group, warnings: list[str]) -> Against | None:
    pairs = list(_pairs(group, base))
    if not pairs:
        warnings.append(f"{name}: {group.label} and {base.label} have no seed in common")
        return None
    if len(pairs) < max(len(group.runs), len(base.runs)):
        count = counted(len(pairs), "pair")
        warnings.append(f"{name}: {group.label} and {base.label} make {count} of runs")
    ours, others = zip(*pairs, strict=True)
    with_answers = [run.answers for run in ours if run.answers is not None]
    other_answers = [run.answers for run in others if run.answers is not None]
    known = [run.data.environment.get("hashes", {}) for run in (*ours, *others)]
    # Folders of before test images had a hash of their own have one for all of a task.
    key = "tests" if all("tests" in each for each in known) else "tasks"
    hashes = [each.get(key) for each in known]
    sizes = [each.sizes for each in (*with_answers, *other_answers)]
    images = (
        len(sizes) == 2 * len(pairs)
        and all(each == sizes[0] for each in sizes)
        and all(each == hashes[0] for each in hashes)
    )
    if images:
        metrics = paired_differences(with_answers, other_answers)
        if len(pairs) == 1:
            warnings.append(
                f"{name}: {group.label} less {base.label} has intervals over images alone, since "
                "there is one pair of runs"
            )
    else:
        metrics = seed_differences([r.metrics for r in ours], [r.metrics for r in others])
        why = "answers are missing" if len(sizes) < 2 * len(pairs) else "test images differ"
        what = "no interval" if len(pairs) == 1 else "intervals over seeds alone"
        warnings.append(f"{name}: {group.label} less {base.label} has {what}, since {why}")
    over = interval_over(len(pairs), images=images)
    return Against(group.label, len(pairs), over, {k: metrics[k] for k in TITLES if k in metrics})


def _pairs(group: Group, base: Group) -> Iterator[tuple[Run, Run]]:
    ours, others = ({run.seed: run for run in reversed(g.runs)} for g in (group, base))
    # A model that does not learn is the same for every seed, so any run of it stands for all.
    if all(run.never_changed for run in base.runs):
        others = dict.fromkeys(ours, base.runs[0]) | others
    elif all(run.never_changed for run in group.runs):
        ours = dict.fromkeys(others, group.runs[0]) | ours
    for seed in sorted(ours.keys() & others.keys()):
        yield ours[seed], others[seed]
