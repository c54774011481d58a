"""Published results: what a method reached on a benchmark, who says so, and what it uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mulki.errors import InputError, nearest
from mulki.files import check_regular

METRICS = ("transfer", "average", "last")
_KNOWN = (*METRICS, "forgetting", "bwt", "cil_average", "cil_last")


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        name: as users write it, METHOD-BENCHMARK.
        benchmark: in words.
        method: its title, with the venue.
        figures: in percent, by metric; without those that the source leaves out.
        source: who says so, in words.
        protocol: family of splits and prompts; figures of two families do not compare.
        band: how far ours may be from a figure, in percentage points.
        scenario: options of `mulki run` that all methods on this benchmark have, the model too.
        options: of `mulki run` for this method; None where this project has not the method.
        extra_data: what it learns from beyond the tasks; None where it is not known, as below.
        task_identity: whether the task of a test image chooses among stored parts.
        stored: what it keeps for each task.
        models: "one" where one ordinary CLIP comes out, else "many".
    """

    name: str
    benchmark: str
    method: str
    figures: Mapping[str, float]
    source: str
    protocol: str
    band: float
    scenario: Mapping[str, Any]
    options: Mapping[str, Any] | None
    extra_data: str | None = None
    task_identity: bool | None = None
    stored: str | None = None
    models: str | None = None


def published_rows(path: Path | None = None) -> dict[str, Published]:
    """All rows by name, in the order of their file.

    Args:
        path: a file of other rows in the same layout, instead of those of this project.

    Raises:
        InputError: the file cannot be read, or a row of it is wrong.
    """
    where = str(path) if path else "rows.yaml"
    try:
        if path is not None:
            check_regular(path)
        text = (path or files(__package__) / "rows.yaml").read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--rows: {where} cannot be read ({reason}); pass a YAML file") from None
    try:
        return {
            row.name: row
            for benchmark in content["benchmarks"]
            for method in content["benchmarks"][benchmark]["rows"]
            if (row := _row(content, benchmark, method))
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"--rows: {where} is not a file of published rows ({type(error).__name__}: {error}); "
            "its layout is that of mulki/data/published/rows.yaml"
        ) from None


def published_row(rows: Mapping[str, Published], name: str) -> Published:
    """The row of a name.

    Raises:
        InputError: there is none.
    """
    if name not in rows:
        raise InputError(
            f"row {name}: does not exist{nearest(name, rows)}; mulki reproduce --list shows them"
        )
    return rows[name]


def _row(content: Mapping[str, Any], benchmark: str, method: str) -> Published:
    of = content["benchmarks"][benchmark]
    given, facts = of["rows"][method], dict(content["methods"][method])
    title, venue = facts.pop("title"), facts.pop("venue", None)
    # The splits of a benchmark bind all; on others a method says which it was run with.
    own = facts.pop("protocol", "zscl")
    options = facts.pop("run", None)
    metrics = of.get("metrics", METRICS)
    if unknown := [name for name in metrics if name not in _KNOWN]:
        raise ValueError(f"metrics are some of {', '.join(_KNOWN)}, got {unknown[0]}")
    pairs = zip(metrics, given["figures"], strict=True)
    figures = {metric: float(value) for metric, value in pairs if value is not None}
    band = float(given.get("band", content["band"]))
    if not figures or not all(map(math.isfinite, (*figures.values(), band))):
        raise ValueError(f"{method}: wanted finite figures and a finite band")
    return Published(
        name=f"{method}-{benchmark}",
        benchmark=of["title"],
        method=f"{title} ({venue})" if venue else title,
        figures=figures,
        source=content["sources"][given["source"]],
        protocol=of.get("protocol", own),
        band=band,
        scenario={**content.get("run", {}), **of["run"]},
        options=options,
        **facts,
    )
