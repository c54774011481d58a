"""``mulki reproduce``: published rows, and our runs of them with a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from mulki.app.commands.grid import seeds_of, whole
from mulki.app.commands.parsing import Parser, add_options, with_hyphens
from mulki.app.commands.training import prepare_process
from mulki.app.reproduction import (
    Judgement,
    figures_of,
    judge,
    leaderboard,
    options_of,
    protocol_of,
)
from mulki.choices.options import flag
from mulki.console import Console
from mulki.data.published.rows import Published, published_row, published_rows
from mulki.distributed.torchrun import is_first
from mulki.errors import InputError
from mulki.printing import say
from mulki.report.comparison.tables import WIDTH
from mulki.report.tables import TITLES, folded_tables, plain_table
from mulki.runs.reading import RunData, read_folder
from mulki.train.config.imports import import_modules

#: Fields of `RunConfig` that a user may give: they say where things are, or how they are computed.
#: The verdict names those that have a say in the figures.
OPTIONS = (
    *("data_root", "reference", "pretrained", "device", "precision", "workers"),
    *("micro_batch", "grad_checkpointing", "batch_size_eval", "precision_eval"),
    *("logs", "name", "import_"),
)
_HEADS = {**TITLES, "cil_average": "Average", "cil_last": "Last"}
# More characters than any table has.
_WIDE = 10_000


def reproduce(argv: list[str]) -> int:
    """Run the command with these arguments.

    Returns:
        The exit status: 0 for a list and for figures no worse than their bands, else 1.

    Raises:
        InputError: bad arguments or runs.
    """
    from mulki.train.config.run_config import RunConfig

    parser = Parser(
        prog="mulki reproduce",
        usage="mulki reproduce ROW [--seeds SEED ...] [--OPTION VALUE ...]; reproduce --list",
        description="Run what a published row needs, and say whether the figures come out",
        epilog="The exit status is 1 where something is missing or a figure is worse than its "
        "band.",
    )
    parser.add_argument("row", nargs="?", metavar="ROW", help="such as mulki-mtil-order1")
    parser.add_argument("--list", action="store_true", help="show all rows, by benchmark")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="run folders to judge or to list")
    parser.add_argument("--rows", metavar="FILE", help="a YAML file of other rows")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", help="of the runs (default: 0)")
    parser.add_argument("--jobs", metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--name", help="folder of the runs in --logs (default: reproduce-ROW)")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    for name in OPTIONS:
        if name != "name":
            add_options(parser, RunConfig, only=name, defaults=False)
    given = {k: v for k, v in vars(parser.parse_args(with_hyphens(argv))).items() if v is not None}
    import_modules(given.get("import_", ()))
    rows = published_rows(Path(given["rows"]) if "rows" in given else None)
    # By another path a run is still one run.
    runs = list({(path := Path(run)).resolve(): path for run in given.get("runs", ())}.values())
    if given["list"] == ("row" in given):
        raise InputError("mulki reproduce: wanted the name of a row, or --list, which shows them")
    if given["list"] or "runs" in given:
        _refuse_options_of_runs(given)
    if given["list"]:
        _list(rows, runs, given["json"])
        return 0
    row = published_row(rows, given["row"])
    folders = runs if "runs" in given else _run(row, given)
    if folders is None:
        return 1
    if not is_first():
        return 0  # the first process may not have written all of the last run yet
    found = judge(row, folders)
    if given["json"]:
        print(json.dumps(found.to_dict()))
    else:
        _print(found)
    return int(found.verdict == "not reproduced")


def _refuse_options_of_runs(given: Mapping[str, Any]) -> None:
    for name in (*OPTIONS, "seeds", "jobs"):
        # Modules may name sequences that rows are of.
        if name in given and name != "import_":
            raise InputError(
                f"{flag(name)}: no run is made with {'--list' if given['list'] else '--runs'}; "
                "leave one of the two out"
            )


def _run(row: Published, given: Mapping[str, Any]) -> list[Path] | None:
    # The folders of the runs; None where something is missing, which is printed.
    from mulki.train.config.run_config import RunConfig, resolve
    from mulki.train.grid import plan, run_cells
    from mulki.train.start.requirements import missing

    prepare_process()
    if row.options is None:
        raise InputError(
            f"{row.name}: mulki has no recipe for it; mulki reproduce --list says which rows it "
            "can run, and --runs judges a run of yours"
        )
    options = {k: v for k, v in given.items() if k in OPTIONS}
    options = {**row.options, **row.scenario, "name": f"reproduce-{row.name}", **options}
    seeds = seeds_of(given.get("seeds", ("0",)))
    jobs = whole("--jobs", given.get("jobs", 1), 1)
    lacking = missing(resolve(options))
    if lacking:
        if is_first() and given["json"]:
            print(json.dumps({"row": row.name, "missing": lacking}))
        elif is_first():
            print(f"{row.name} cannot be run, missing:")
            for line in lacking:
                say(f"- {line}")
        return None
    cells = plan(
        options,
        methods=[row.options["method"]],
        orders=[str(row.scenario.get("order", RunConfig.order))],
        seeds=seeds,
    )
    run_cells(cells, jobs, Console(stderr=True, quiet=not is_first()))
    return [cell.folder for cell in cells]


def _print(found: Judgement) -> None:
    row, console = found.row, Console(width=_WIDE)
    table = plain_table("", "published", "ours", "band", "verdict", numbers=False)
    for line in found.lines:
        half = "" if line.half_width is None else f" ± {line.half_width:.2f}"
        table.add_row(
            _HEADS[line.metric],
            f"{line.published:.2f}",
            f"{line.ours:.2f}{half}",
            f"{line.low:.2f} to {line.high:.2f}",
            f"{line.verdict} the band",
        )
    console.print(Text(f"{row.name}: {row.method} on {row.benchmark}", style="bold"))
    console.print(table)
    console.print(Text(f"published: {row.source}; protocol {row.protocol}"))
    console.print(Text(f"ours: {', '.join(found.runs)}"))
    for note in found.notes:
        console.print(Text(f"note: {note}"))
    if len(found.runs) == 1:
        console.print(Text("one run, without an interval; --seeds 0 1 2 gives one"))
    console.print(Text(f"verdict: {found.verdict}", style="bold"))


def _list(rows: Mapping[str, Published], runs: Sequence[Path], as_json: bool) -> None:
    read = [(folder, read_folder(folder)) for folder in runs]
    by_benchmark = leaderboard(rows, [run for run in read if run[1].status == "complete"])
    every = [entry for entries in by_benchmark.values() for entry in entries]
    shown = {entry[0] for entry in every if not isinstance(entry, Published)}
    left_out = {folder: data.status for folder, data in read if folder not in shown}
    if as_json:
        ours = [
            _run_as_json(benchmark, *entry)
            for benchmark, entries in by_benchmark.items()
            for entry in entries
            if not isinstance(entry, Published)
        ]
        others = [{"run": str(folder), "status": status} for folder, status in left_out.items()]
        print(json.dumps([*map(asdict, rows.values()), *ours, *others]))
        return
    console = Console()
    width = console.width if console.is_terminal else WIDTH
    # A table that is too wide for its console would be squeezed into it.
    tables = Console(width=_WIDE)
    sources = list(dict.fromkeys(row.source for row in rows.values()))
    for benchmark, entries in by_benchmark.items():
        metrics = [
            name
            for name in _HEADS
            if any(isinstance(each, Published) and name in each.figures for each in entries)
        ]
        head = [
            *(_HEADS[name] for name in metrics),
            *("source", "runs here", "method", "protocol", "extra data", "task identity"),
            *("stored", "models"),
        ]
        lines = [_entry(entry, metrics, sources) for entry in entries]
        console.print(Text(benchmark, style="bold"))
        for table in folded_tables(width, "row", head, lines, numbers=False):
            tables.print(table, "", sep="\n")
    for folder, status in left_out.items():
        what = "of no benchmark here" if status == "complete" else status
        console.print(Text(f"left out: {folder} is {what}"), soft_wrap=True)
    console.print(Text("in percent; rows of two protocols do not compare. Sources:"))
    for number, source in enumerate(sources, start=1):
        console.print(Text(f"[{number}] {source}"))


def _entry(
    entry: Published | tuple[Path, RunData], metrics: Sequence[str], sources: Sequence[str]
) -> tuple[str, list[str]]:
    # The name and the cells of a row of the list.
    figures = entry.figures if isinstance(entry, Published) else figures_of(entry[1])
    shown = [f"{figures[name]:.2f}" if name in figures else "-" for name in metrics]
    if isinstance(entry, Published):
        identity = {None: "?", True: "yes", False: "no"}[entry.task_identity]
        can = "yes" if entry.options is not None else "no"
        return entry.name, [
            *shown,
            *(f"[{sources.index(entry.source) + 1}]", can, entry.method, entry.protocol),
            *(entry.extra_data or "?", identity, entry.stored or "?", entry.models or "?"),
        ]
    folder, data = entry
    used = data.summary.get("uses", ())
    uses = ", ".join(used) or "none"
    stored = "images" if "images of earlier tasks" in used else "nothing"
    model = options_of(data).get("model", "?")
    method = f"{data.summary.get('method', '?')}, ours: {model}"
    protocol = protocol_of(data)
    return str(folder), [*shown, "", "", method, protocol, uses, "no", stored, "one"]


def _run_as_json(benchmark: str, folder: Path, data: RunData) -> dict[str, Any]:
    return {
        "run": str(folder),
        "status": data.status,
        "benchmark": benchmark,
        "method": data.summary.get("method"),
        "model": options_of(data).get("model"),
        "uses": list(data.summary.get("uses", ())),
        "figures": figures_of(data),
    }
