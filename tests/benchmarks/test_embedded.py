"""The comparison on the bundled tasks: a run, its tables, and what README and docs say of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.embedded import compare, studies
from tests import ROOT, train_helpers

# What the docs call the rows of the comparison.
CALLED = {
    "zero-shot": "zero_shot",
    "fine-tuning": "finetune",
    "WiSE-FT": "wise_ft",
    "EWC": "ewc",
    "replay of 500 images": "er",
    "LwF": "lwf",
    "LwF-VR": "lwf_vr",
    "ZSCL": "zscl",
    "ZSCL, made images": "zscl, made images",
    "Select-and-Distill": "snd",
    "Select-and-Distill, made images": "snd, made images",
    "the same, half the rate": "snd, made images, half the rate",
    "KeepLoRA": "keeplora",
    "MulKI": "mulki",
    "MulKI, adapters": "mulki, adapters",
}

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model


def rows(text: str) -> dict[str, list[str]]:
    cells = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    return {first: others for first, *others in cells}


def test_a_line_of_results_has_what_the_tables_show(start_model: dict[str, str]) -> None:
    options = {"method": "finetune", "tasks": ("embedded-glyphs",), "limit_images": 20}
    quick = {"iterations": 1, "batch_size": 4, "seed": 0}
    run = studies.Run("compare", "finetune", options | quick, start_model["model"])
    result = json.loads(json.dumps(compare.one_run(run, compare.fingerprint(run.model), 1)))
    found = rows(compare.table([result], compare.OF_SEQUENCES))["finetune"]
    assert float(found[3]) == pytest.approx(np.mean(result["matrix"][-1]), abs=0.006)
    assert len(result["zero_shot"]) == len(result["tasks"])
    assert result["settings"] == compare.settings_of(run)


def test_the_page_of_results_is_that_of_the_lines() -> None:
    page = compare.page(compare.standing(compare.read_results()))
    assert compare.TABLES.read_text(encoding="utf-8") == page


def test_the_docs_show_the_figures_of_the_lines() -> None:
    """The tables of the six orders and of the sequences in the docs, and the README's."""
    lines = [r for r in compare.standing(compare.read_results()) if r["study"] == "compare"]
    method, more = (
        (ROOT / "docs" / page).read_text(encoding="utf-8")
        for page in ("method.md", "more-results.md")
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    def measured(places: Sequence[str], columns: dict[str, Any]) -> dict[str, list[str]]:
        of = [r for r in lines if compare.place_of(r["options"]) in places]
        found = rows(compare.table(of, columns))
        return {name: cells[1 : 1 + len(columns)] for name, cells in found.items()}

    def shown(page: str, after: str, before: str) -> dict[str, list[str]]:
        part = page.partition(after)[2].partition(before)[0]
        return {CALLED[name]: cells for name, cells in rows(part).items() if name in CALLED}

    def agree(cells: dict[str, list[str]], found: dict[str, list[str]]) -> None:
        assert set(cells) == set(found) & set(studies.ROWS)
        for name, of in cells.items():
            values = [float(cell.split()[0]) for cell in found[name]]
            # Both are rounded.
            assert [float(cell) for cell in of] == pytest.approx(values, abs=0.0551), name

    columns = {name: of for name, of in compare.OF_ORDERS.items() if name != "transfer"}
    found = measured(studies.ORDERS, columns)
    means = shown(method, "### Six tasks", "| MulKI less ")
    agree({name: cells[1:] for name, cells in means.items()}, found)
    less = shown(method, "| MulKI less ", "### What each part")
    assert less
    for name, cells in less.items():
        assert cells == found[f"mulki less {name}"], name
    for name in ("zero_shot", "finetune", "mulki"):
        kept, _, *accuracies = means[name][1:]
        figures_of = accuracies[0], accuracies[2], accuracies[4]
        assert all(f" {value} %" in readme for value in figures_of), name
        assert name == "zero_shot" or f" {kept.lstrip('-')} points" in readme
    columns = {name: of for name, of in compare.OF_SEQUENCES.items() if name.startswith("cil")}
    agree(shown(more, "Flags, which", "Glyphs ("), measured(["embedded-flags"], columns))
    agree(shown(more, "Glyphs (", "## On a transformer"), measured(["embedded-glyphs"], columns))
