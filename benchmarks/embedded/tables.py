"""RESULTS.md of the bundled tasks, from the lines of results.

The unit of the comparison is an order: the mean over its seeds is one value, and intervals are over
orders. Another seed says little of another order, and half a point is less than two orders differ
by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.embedded import studies
from mulki.runs.intervals import mean_interval

Line = Mapping[str, Any]
Column = Callable[[Line], float]

COMMAND = "python -m benchmarks.embedded.compare"


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

# Studies that choose: title, what a row is, and on what it was tested.
_CHOICES = {
    "tune": (
        "Tuning",
        "First three tasks of order I alone, with label smoothing 0.2, er, ewc and keeplora "
        "without; mean over two seeds. The best point of finetune, wise_ft, er, ewc and keeplora "
        "is their preset, but that finetune has half the rate since a later study (again); from "
        "that of the others their strength was chosen.",
    ),
    "strength": (
        "Strength",
        "The best point of the tuning with its weights 1, 2, 6 times as large, and on until the "
        "best is not the last, on orders III and IV, with label smoothing 0.2, one seed. The best "
        "one is the preset, but that snd has half the rate since a later study (again). zscl and "
        "snd were held on the task's own images.",
    ),
    "smoothing": (
        "Label smoothing",
        "Each method at its preset of that time, by label smoothing, on orders III and IV, one "
        "seed. What lwf, lwf_vr, zscl and snd have with 0.2 is their best row of Strength.",
    ),
    "held": (
        "Forms of MulKI",
        "Without label smoothing, most of them held on images made of the task's own, on orders "
        "III and IV, one seed. No other method had as many choices.",
    ),
    "again": (
        "Rates and strengths once more",
        "Each method at the preset that it had then, and with another learning rate or strength, "
        "on orders III and IV, one seed, without label smoothing. A point replaces the preset "
        "only where it is better by more than 0.67, the least difference that two orders can "
        "show. So finetune now has the rate 0.00005 and snd 0.0001. The runs of the presets are "
        "those of Label smoothing and of Forms of MulKI.",
    ),
    "changes": (
        "What images are made of",
        "MulKI at its preset, by what is done to the images, on orders III and IV, one seed. The "
        "preset has the default ones, which were not chosen by this study.",
    ),
    "vit_rates": (
        "Learning rates of the transformer",
        "The start model with a transformer: each row with shares of its rate on the bundled "
        "model, so that the best one is neither the smallest nor the largest. First three tasks of "
        "order I alone, one seed, on two kinds of CPU.",
    ),
    "vit_stages": (
        "MulKI's stages on the transformer",
        "MulKI as it is in the transformer's table, with one thing changed, at the learning rate "
        "that was best for it unchanged. First three tasks of order I alone; mean over the seeds. "
        "Nothing was chosen by it.",
    ),
}


def page(lines: Sequence[Line]) -> str:
    """RESULTS.md from the results of the current start model and images."""
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
    if of_gates := [r for r in lines if r["study"] == "gates"]:
        parts += [
            f"## What weighs MulKI's teachers\n\n`{_command('gates', of_gates)}`. "
            "The sequence embedded-glyphs, "
            "whose steps are related: the previous model is far better than the original one. Mean "
            "over seeds. mulki: its preset, with the gate discrepancy, held on made images; own "
            "images: with the same gate, held on those of the task.",
            table(of_gates, OF_SEQUENCES),
        ]
    if of_vit := [r for r in lines if r["study"] == "vit"]:
        parts += [
            f"## The start model with a transformer\n\n`{COMMAND} vit`. Orders I and II, 32 steps "
            "in a task, methods weighted as on the bundled model. Mean over the orders and half of "
            "its 95 % interval over them; of two orders it is wide. Seed 0 was tested in float32, "
            "the others in bfloat16.",
            table(of_vit, OF_ORDERS),
        ]
    for study in studies.CHOICES:
        if of := [r for r in lines if r["study"] == study]:
            if study == "again":
                of += [{**r, "variant": name} for name, r in _presets(lines)]
            parts.append(choices(study, of))
    return "\n\n".join(parts) + "\n"


def _command(study: str, lines: Sequence[Line]) -> str:
    seeds = sorted({r["options"]["seed"] for r in lines})
    return f"{COMMAND} {study} --seeds {' '.join(map(str, seeds))}"


def _compared(lines: Sequence[Line]) -> list[str]:
    of_orders = [r for r in lines if place_of(r["options"]) in studies.ORDERS]
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
        apart = [r for r in of_orders if place_of(r["options"]) not in studies.FORM_ORDERS]
        if apart:
            parts += ["The first table without orders III and IV:", table(apart, OF_ORDERS)]
    for sequence in studies.SEQUENCES:
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
    orders = [o for o in studies.ORDERS if any(place_of(r["options"]) == o for r in lines)]
    rows = [_row("method", *orders), _row(*["---"] * (len(orders) + 1))]
    for name, of in _by_variant(lines).items():
        cells = []
        for order in orders:
            runs = [r for r in of if place_of(r["options"]) == order]
            values = (f"{mean(r[metric] for r in runs):.1f}" for metric in _OF_CRITERION)
            cells.append(" / ".join(values) if runs else "-")
        rows.append(_row(name, *cells))
    return "\n".join(rows)


def choices(study: str, lines: Sequence[Line]) -> str:
    """Every variant of a study that chooses, the best one of each method first and in bold."""
    title, what = _CHOICES[study]
    rows = [
        f"## {title}\n\n`{COMMAND} {study}`. {what} Tested on training images that were held out; "
        "the criterion is the mean of transfer, average and last. A row with fewer runs than "
        "others does not compare with them, and comes last.\n",
        _row("variant", "criterion", *_METRICS, "runs"),
        _row(*["---"] * (len(_METRICS) + 3)),
    ]
    for group in dict.fromkeys(_competing(study, line) for line in lines):
        by_variant = _by_variant([r for r in lines if _competing(study, r) == group])
        most = max(map(len, by_variant.values()))
        ranked = sorted(
            by_variant.items(), key=lambda item: (len(item[1]) < most, -criterion(item[1]))
        )
        for place, (variant, of) in enumerate(ranked):
            means = (f"{mean(map(column, of)):.2f}" for column in _METRICS.values())
            # One that is not clear of the preset takes nothing's place.
            best = place == 0 and len(ranked) > 1 and study != "again"
            name = variant + (" **best**" if best else "")
            rows.append(_row(name, f"{criterion(of):.2f}", *means, len(of)))
    return "\n".join(rows)


def _presets(lines: Sequence[Line]) -> Iterator[tuple[str, Line]]:
    # The rows of `again` at their presets.
    for row in studies.AGAIN:
        for line in lines:
            if (line["study"], line["variant"]) == studies.before_again(row):
                yield f"{row}, preset", line


def _competing(study: str, line: Line) -> str:
    # Variants of which one is the best: those of a method, or of a row of a table.
    of_row = study in ("again", "vit_rates")
    return str(line["variant"].rpartition(", ")[0] if of_row else line["options"]["method"])


def criterion(lines: Iterable[Line]) -> float:
    """Mean of Transfer, Average and Last over runs."""
    return mean(line[metric] for line in lines for metric in _OF_CRITERION)


def place_of(options: Mapping[str, Any]) -> str:
    """The order or the sequence of a run's options."""
    (sequence,) = options.get("tasks", ("embedded",))
    return sequence if sequence != "embedded" else options.get("order", "I")


def _by_variant(lines: Sequence[Line]) -> dict[str, list[Line]]:
    # In the order of the comparison's rows, and others as they come.
    names = dict.fromkeys((*studies.ROWS, *(r["variant"] for r in lines)))
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
