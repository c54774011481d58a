from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mulki.app.reproduction import differs, figures_of, judge, leaderboard
from mulki.data.published.collections import COLLECTIONS
from mulki.data.published.rows import Published, published_rows
from mulki.errors import InputError
from mulki.runs.folder import RunFolder
from mulki.runs.reading import read_folder
from mulki.train.config.run_config import resolve

ROWS = published_rows()
ORDER = COLLECTIONS["mtil"].in_order("I")


def made(
    root: Path,
    name: str,
    average: float,
    ends: bool = True,
    learned: tuple[str, ...] = ORDER,
    **options: Any,
) -> Path:
    """A run of ZSCL on MTIL whose accuracies are all the same, so that all its figures are."""
    row = ROWS["zscl-mtil-order1"]
    assert row.options is not None
    config = resolve({**row.options, **row.scenario, "reference": "cc3m/"}).to_dict() | options
    run = RunFolder.create(
        root,
        name,
        method=config["method"],
        order="I",
        seed=config["seed"],
        columns=learned,
        config=config,
    )
    for task in learned:
        run.add_row(task, dict.fromkeys(learned, average))
    run.finish("complete" if ends else "interrupted")
    return run.path


@pytest.fixture
def row() -> Published:
    """Transfer 68.1, Average 75.4, Last 83.6 are published; here all three are 75."""
    figures = dict.fromkeys(("transfer", "average", "last"), 75.0)
    return replace(ROWS["zscl-mtil-order1"], figures=figures, band=1.0)


@pytest.mark.parametrize(
    ("ours", "verdict", "of_lines"),
    [
        (75.0, "reproduced", "within"),
        (74.0, "reproduced", "within"),
        (76.0, "reproduced", "within"),
        (73.99, "not reproduced", "below"),
        (76.01, "better", "above"),
    ],
)
def test_verdicts(tmp_path: Path, row: Published, ours: float, verdict: str, of_lines: str) -> None:
    found = judge(row, [made(tmp_path, "a", ours)])
    assert found.verdict == verdict
    assert [(line.low, line.high) for line in found.lines] == [(74.0, 76.0)] * 3
    assert {line.verdict for line in found.lines} == {of_lines}
    assert {line.half_width for line in found.lines} == {None}
    assert found.to_dict()["verdict"] == verdict


def test_one_figure_below_decides(tmp_path: Path, row: Published) -> None:
    low = replace(row, figures={**row.figures, "last": 90.0, "transfer": 60.0})
    found = judge(low, [made(tmp_path, "a", 75.0)])
    assert [line.verdict for line in found.lines] == ["above", "within", "below"]
    assert found.verdict == "not reproduced"


@pytest.mark.parametrize(
    ("published", "verdict"),
    [(0.0, "reproduced"), (5.0, "better"), (-5.0, "not reproduced")],
)
def test_less_forgetting_is_better(
    tmp_path: Path, row: Published, published: float, verdict: str
) -> None:
    figures = {"forgetting": published, "last": 75.0}
    ours = made(tmp_path, "a", 75.0)  # forgets nothing
    assert judge(replace(row, figures=figures), [ours]).verdict == verdict


def test_the_mean_over_seeds_is_judged(tmp_path: Path, row: Published) -> None:
    values = ((0, 73.0), (1, 74.0), (1, 76.0), (2, 77.0))
    folders = [made(tmp_path, f"{seed} {value}", value, seed=seed) for seed, value in values]
    (first, *_) = judge(row, folders).lines
    assert (first.ours, first.verdict) == (75.0, "within")
    # Student's t with two degrees of freedom, 4.303, times 2 / sqrt(3).
    assert first.half_width == pytest.approx(4.9683, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learned": ORDER[::-1]}, "it learned sun397"),
        ({"label_space": "seen"}, "its label space is seen, not task"),
        ({"shots": 5}, "its shots is 5, not None"),
        ({"protocol": "coop"}, "its protocol is coop, not zscl"),
        ({"method": "mulki"}, "its method is mulki, not zscl"),
        ({"model": "ViT-L-14"}, "its model is ViT-L-14, not ViT-B-16-quickgelu"),
        ({"pretrained": "metaclip_400m"}, "its pretrained is metaclip_400m, not openai"),
        ({"pretrained": None}, "its pretrained is None, not openai"),
        ({"limit_images": 9}, "its limit images is 9, not None"),
        ({"iterations": 5}, "its iterations is 5, not 1000"),
        ({"vocabulary": "words.txt"}, "its vocabulary is words.txt, not None"),
    ],
)
def test_runs_of_another_scenario_are_refused(
    tmp_path: Path, row: Published, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        judge(row, [made(tmp_path, "a", 75.0, **options)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit_images": 9}, "its limit images is 9, not None"),
        ({"model": "ViT-L-14"}, "its model is ViT-L-14, not ViT-B-16-quickgelu"),
        ({"pretrained": "metaclip_400m"}, "its pretrained is metaclip_400m, not openai"),
    ],
)
def test_rows_of_other_methods_bind_scenario_and_model(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    other = ROWS["lwf-mtil-order1"]
    assert other.options is None
    with pytest.raises(InputError, match=said):
        judge(other, [made(tmp_path, "a", 75.0, **options)])
    assert not judge(other, [made(tmp_path, "b", 75.0, method="mine", iterations=5)]).notes


def test_what_may_differ_and_has_a_say_is_noted(tmp_path: Path, row: Published) -> None:
    run = made(tmp_path, "a", 75.0, pretrained="RN50.pt", precision="fp32", seed=3, workers=2)
    path = run / "env.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    assert judge(row, [run]).to_dict()["notes"] == [
        f"{run}: --pretrained RN50.pt",
        f"{run}: --reference cc3m/",
        f"{run}: 2 processes, each with a batch as large as the row's",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no args.yaml"), ("- 1", "args.yaml is damaged"), ("a: [", "args.yaml is damaged")],
)
def test_a_run_that_does_not_say_what_it_is(
    tmp_path: Path, row: Published, content: str | None, said: str
) -> None:
    run = made(tmp_path, "a", 75.0)
    (run / "args.yaml").unlink() if content is None else (run / "args.yaml").write_text(content)
    with pytest.raises(InputError, match=said):
        judge(row, [run])


def test_runs_that_cannot_be_judged(tmp_path: Path, row: Published) -> None:
    with pytest.raises(InputError, match="no run to judge"):
        judge(row, [])
    with pytest.raises(InputError, match="interrupted"):
        judge(row, [made(tmp_path, "a", 75.0, ends=False)])
    with pytest.raises(InputError, match=r"no matrix\.csv"):
        judge(row, [tmp_path])


def test_ours_stand_among_the_rows_of_their_scenario(tmp_path: Path) -> None:
    ours = made(tmp_path, "a", 75.39, method="lwf", iterations=5)
    other = made(tmp_path, "b", 75.39, model="ViT-L-14")
    table = leaderboard(ROWS, [(path, read_folder(path)) for path in (ours, other)])
    names = [
        each.name if isinstance(each, Published) else each[0] for each in table["MTIL, order I"]
    ]
    place = names.index(ours)
    # 75.4 and 75.1 are published.
    assert names[place - 1] == "zscl-mtil-order1" and names[place + 1] == "nusa-cl-mtil-order1"
    others = [entries for name, entries in table.items() if name != "MTIL, order I"]
    assert all(isinstance(each, Published) for entries in others for each in entries)
    assert sum(len(entries) for entries in table.values()) == len(ROWS) + 1


def test_figures_of_class_incremental_runs(tmp_path: Path) -> None:
    data = read_folder(made(tmp_path, "a", 70.0))
    assert figures_of(data) == {
        "transfer": 70.0,
        "average": 70.0,
        "last": 70.0,
        "forgetting": 0.0,
        "bwt": 0.0,
    }
    row = ROWS["moe-adapters-cifar100-10steps"]
    assert differs(row, data) == "its scenario is tasks, not cil"
