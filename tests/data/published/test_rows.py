from __future__ import annotations

from pathlib import Path

import pytest

from mulki.data.published import PROTOCOLS
from mulki.data.published.collections import COLLECTIONS
from mulki.data.published.rows import published_row, published_rows
from mulki.errors import InputError

# Rows of the two papers that this project is about, as their sources have them.
KNOWN = {
    "zscl-mtil-order1": {"transfer": 68.1, "average": 75.4, "last": 83.6},
    "zscl-mtil-order2": {"transfer": 64.2, "average": 74.5, "last": 83.4},
    "mulki-mtil-order1": {"transfer": 70.1, "average": 77.3},
    "zero-shot-mtil-order1": {"transfer": 69.4, "average": 65.3, "last": 65.3},
    "moe-adapters-cifar100-10steps": {"cil_average": 85.21, "cil_last": 77.52},
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_rows(name: str) -> None:
    assert published_row(published_rows(), name).figures == KNOWN[name]


def test_every_row_can_be_understood() -> None:
    for row in published_rows().values():
        assert row.figures and all(0 < value < 100 for value in row.figures.values()), row.name
        assert row.protocol in (*PROTOCOLS, "?") and row.models in (None, "one", "many"), row.name
        assert row.source and row.band > 0, row.name
        (word,) = row.scenario["tasks"]
        assert word.partition(":")[0] in COLLECTIONS, row.name


def test_what_can_be_run_resolves_to_the_protocol_of_its_row() -> None:
    from mulki.train.config.run_config import resolve

    rows = [row for row in published_rows().values() if row.options is not None]
    assert {row.name for row in rows} >= KNOWN.keys() - {"moe-adapters-cifar100-10steps"}
    for row in rows:
        config = resolve({**row.options, **row.scenario}).run
        assert COLLECTIONS[config.tasks[0]].protocols[0] == row.protocol, row.name
        assert config.pretrained == "openai", row.name


def test_a_row_that_does_not_exist() -> None:
    with pytest.raises(InputError, match='did you mean "zscl-mtil-order1"'):
        published_row(published_rows(), "zscl-mtil-order-1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", ""),
        ("- 1\n", "is not a file of published rows"),
        ("benchmarks: {b: {title: B, run: {}, rows: {m: {figures: [1], source: s}}}}", "KeyError"),
        *(
            (
                "sources: {s: S}\nband: 1\nmethods: {m: {title: M}}\nbenchmarks: {b: {title: B, "
                f"run: {{}}, rows: {{m: {{figures: [{figure}, null, null], source: s}}}}}}}}",
                "m: wanted finite figures",
            )
            for figure in (".nan", ".inf", "null")
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.yaml").write_text(text)
    with pytest.raises(InputError, match=f"--rows: .*{said}"):
        published_rows(tmp_path / "rows.yaml")
    with pytest.raises(InputError, match="^--rows: "):
        published_rows(tmp_path / "none.yaml")
