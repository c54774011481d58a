"""The benchmark of the operators: what it refuses to time, prints, stores and draws."""

from __future__ import annotations

import csv
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mulki.app.cli import run_command
from mulki.bench import call_cost
from mulki.bench.cases import MODES, OPERATORS, PAIRED, Case, make_cases, parse_shape
from mulki.bench.losses import EAGER, MULKI
from mulki.bench.outcomes import outcome
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS, Provider
from mulki.bench.report import read_rows
from mulki.bench.run import BenchOptions, print_wrapped, run
from mulki.bench.verify import Verifier
from tests import ROOT

CASE = Case("dual_teacher_kl", 17, 33, 64, "float32")
TINY = ("--shapes", "5x5x8", "--seconds", "0.001")


def bench(*arguments: str) -> int:
    return run_command(["bench", *arguments])


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls of a provider that is one percent off, gradients and all."""
    calls: list[int] = []

    def make(case: Case) -> Callable[..., Tensor]:
        def loss(*arguments: object) -> Tensor:
            calls.append(1)
            return 1.01 * EAGER[case.operator](*arguments)

        return loss

    monkeypatch.setitem(PROVIDERS, "wrong", Provider("wrong", make))
    return calls


def test_what_is_wrong_is_reported_and_not_timed(
    wrong: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(case: Case) -> Callable[..., Tensor]:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(PROVIDERS, "raising", Provider("raising", make))
    results = measure_case(CASE, ("eager", "wrong", "raising"), MODES, seconds=0.001)
    by = {result.provider: result for result in results}
    assert len(results) == 9 and by["eager"].status == "timed"
    assert by["wrong"].status == by["raising"].status == "failed"
    assert all("relative error 0.01" in note for note in by["wrong"].notes)
    assert by["raising"].notes == ("RuntimeError: no kernel",)
    # Once with autograd and once without, to verify it; a timed one is called often.
    assert len(wrong) == 2


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_error_of_one_percent_in_one_gradient_is_noticed(operator: str) -> None:
    case = Case(operator, 24, 24, 32, "float32")
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    assert not verifier.problems(verifier.errors(outcome(MULKI[operator], inputs)), strict=True)
    for place, name in enumerate(inputs.leaves):

        def slightly_off(*arguments: Tensor, place: int = place) -> Tensor:
            changed = list(arguments)
            leaf = changed[place]
            # The same value; the gradient is one percent too large.
            changed[place] = leaf + 0.01 * (leaf - leaf.detach())
            return EAGER[operator](*changed)

        problems = verifier.problems(verifier.errors(outcome(slightly_off, inputs)), strict=True)
        (problem,) = problems
        assert problem.startswith(f"gradient of {name}: relative error 0.01")


def test_a_result_that_is_not_finite_is_wrong_and_rounded_logits_are_forgiven_to_others() -> None:
    """What storing bf16 logits costs the eager loss is more than the tolerance by itself."""
    case = Case("dual_teacher_kl", 24, 24, 64, "bfloat16")
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    with PROVIDERS["eager"].context(case):
        found = outcome(EAGER[case.operator], inputs)
    eager = verifier.errors(found)
    assert not verifier.problems(eager, strict=False)
    assert any("gradient of features" in p for p in verifier.problems(eager, strict=True))
    found["gradient of prototypes"][0, 0] = torch.nan
    (problem,) = verifier.problems(verifier.errors(found), strict=False)
    assert problem.startswith("gradient of prototypes: relative error inf")
    of_ours = {name for name, provider in PROVIDERS.items() if provider.strict}
    assert of_ours == {name for name in PROVIDERS if name.startswith("mulki")}


def test_shapes_and_inputs() -> None:
    assert parse_shape("64x100") == (64, 100, 512)
    assert parse_shape("4x3x2") == (4, 3, 2)
    own = make_cases(list(OPERATORS), None, ["float32"])
    assert all(c.n == c.p for c in own if c.operator in PAIRED)
    quick = make_cases(list(OPERATORS), None, ["float32"], quick=True)
    assert {c.operator for c in quick} == set(OPERATORS) and len(quick) < len(own)
    for operator in OPERATORS:
        case = Case(operator, 4, 4, 8, "bfloat16")
        one, two, exact = case.inputs(), case.inputs(), case.inputs(torch.float64)
        for name, leaf in one.leaves.items():
            assert leaf.requires_grad and leaf.equal(two.leaves[name])
            assert leaf.double().equal(exact.leaves[name])
        some = one.without(["prototypes"])
        assert "prototypes" not in some.leaves and not some.arguments[1].requires_grad


def test_memory_of_a_call() -> None:
    """A matrix that is stored counts, one that is returned does not."""
    case = Case("prototype_cross_entropy", 512, 1024, 4, "float32")
    inputs, matrix = case.inputs(), 512 * 1024 * 4

    def without(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        return scale * (x.sum() + w.sum())

    stored = call_cost.extra_memory("both", EAGER[case.operator], inputs, "cpu")["memory"]
    assert stored >= 2 * matrix
    assert call_cost.extra_memory("both", without, inputs, "cpu")["memory"] < matrix / 10
    inputs = Case("similarity", 512, 1024, 4, "float32").inputs()
    alone = call_cost.extra_memory("forward", lambda x, w, scale: x @ w.T, inputs, "cpu")
    assert alone["memory"] == 0


def test_providers_take_turns_in_any_order() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], float]:
        def go() -> float:
            order.append(name)
            return float(len(order))

        return go

    times = call_cost.take_turns({name: call(name) for name in "abc"}, seconds=0.0)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
    # The first round warmed up: what is left starts with the second.
    assert [times[name][0] for name in rounds[1]] == [4.0, 5.0, 6.0]


def test_a_run_prints_tables_and_a_csv_that_is_read_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, providers = tmp_path / "ops.csv", ("eager", "products", "torch_lce", "mulki")
    operators = ("dual_teacher_kl", "prototype_cross_entropy", "similarity")
    arguments = (*TINY, "--dtypes", "fp32", "--threads", "1", "--providers", *providers)
    before = torch.get_num_threads()
    assert bench(*arguments, "--ops", *operators, "--output", str(path)) == 0
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert "prototype_cross_entropy, 5x5x8, float32 (2 of 3, about " in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    # The table at the end has a line for each operator.
    end = out[out.index("eager's time over mulki's") :].splitlines()
    assert [line.split()[0] for line in end[2:]] == [*operators]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = {(r["kernel_name"], r["kernel_provider"], r["kernel_operation_mode"]) for r in rows}
    assert points == {(o, p, m) for o in operators for p in providers for m in MODES}
    for row in rows:
        assert row["threads"] == "1" and row["torch_version"] == torch.__version__
        if row["status"] == "not applicable":
            assert row["y_value_50"] == "" and row["note"]
            continue
        low, median, high = (float(row[f"y_value_{q}"]) for q in (20, 50, 80))
        assert row["status"] == "timed" and 0 <= low <= median <= high
    # Gradients that exist after the forward pass give the backward pass alone no rate or ratio.
    alone = {
        (row["kernel_provider"], row["metric_name"])
        for row in rows
        if (row["kernel_name"], row["kernel_operation_mode"]) == ("dual_teacher_kl", "backward")
    }
    assert {m for p, m in alone if p == "mulki"} == {"speed", "gradient_error"}
    assert {"throughput", "speedup_over_products"} < {m for p, m in alone if p == "eager"}

    assert bench("table", str(path)) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 * len(operators) and "eager, ms | products, ms" in table[0]
    assert bench("plot", str(path), str(tmp_path / "figures"), "--mode", "forward") == 0
    drawn = {file.suffix for file in (tmp_path / "figures").iterdir()}
    assert drawn == {".html", ".png", ".svg"}


def test_the_table_shows_the_last_of_equal_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[int]
) -> None:
    path = str(tmp_path / "ops.csv")
    given = (*TINY, "--ops", "siglip", "--dtypes", "fp32", "--modes", "both", "--output", path)
    assert bench(*given, "--providers", "eager") == 0
    assert bench(*given, "--providers", "wrong") == 1
    assert {row["status"] for row in read_rows(path)} == {"timed", "failed"}
    capsys.readouterr()
    assert bench("table", path) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [cell.strip() for cell in table[-1].split("|")[1:-1]]
    assert cells[:4] == ["siglip", "5 x 5 x 8", "float32", "both"]
    assert float(cells[4]) > 0 and cells[5] == "failed"


def test_a_run_says_which_points_it_left_out() -> None:
    said: list[str] = []
    options = BenchOptions(
        ops=("siglip", "similarity"),
        shapes=("3x3x4", "2x2x4", "6x5x4"),
        dtypes=("fp32",),
        modes=("forward",),
        providers=("eager",),
        seconds=0.001,
        budget=1e-9,
    )
    assert run(options, said.append) == 0
    assert "siglip take N = P, so these shapes are left out: 6x5x4" in said
    # One at least, and the rest shape by shape.
    assert any(line.startswith("\nsiglip, 3x3x4") for line in said)
    assert said[-1] == (
        "left out: 4 points, beyond --budget 1e-09: similarity 3x3x4 float32; "
        "siglip 2x2x4 float32; similarity 2x2x4 float32; similarity 6x5x4 float32"
    )


def test_long_lines_are_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    print_wrapped("\n" + "word " * 40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "" and max(map(len, lines)) <= 80
    assert len(lines) > 2 and all(line.startswith("  word") for line in lines[2:])


def test_the_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.ops", "--ops", "gone"])
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("benchmarks.ops", run_name="__main__")
    assert leave.value.code == 2 and "--ops: got gone" in capsys.readouterr().err
