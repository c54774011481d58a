"""The operator benchmark: what it measures, and that it times nothing that is wrong."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mulki import functional
from mulki.bench import clocks, measure
from mulki.bench.by_rows import outcome
from mulki.bench.cases import MODES, OPERATORS, PAIRED, Case, make_cases, parse_shape
from mulki.bench.losses import EAGER, MULKI
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS, Provider
from mulki.bench.report import Quantiles, Result, markdown, read_rows, rows_of
from mulki.bench.verify import Verifier
from mulki.cli import run_command
from tests import ROOT

LIGER = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,"
    "x_value,y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,"
    "mulki_version"
)
TINY = ["--shapes", "5x5x8", "--seconds", "0.001"]

product_rate = measure.product_rate


@pytest.fixture(autouse=True)
def fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = measure.ProductRates(torch_mm=1e9, similarity=4e9)
    monkeypatch.setattr(measure, "product_rate", lambda dtype, device: rates)
    monkeypatch.setattr(measure, "copy_rate", lambda device: 2e9)


def bench(*arguments: str) -> int:
    return run_command(["bench", *arguments])


# --- a run


def test_a_run_prints_tables_and_writes_a_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ops.csv"
    providers = ("eager", "torch_lce", "mulki", "mulki-reference")
    arguments = (*TINY, "--dtypes", "fp32", "bfloat16", "--threads", "1", "--providers", *providers)
    before = torch.get_num_threads()
    assert bench(*arguments, "--output", str(path)) == 0
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert "torch " in out and "dual_teacher_kl, 5x5x8, bfloat16" in out
    assert "torch_lce: not applicable: has cross-entropy alone" in out

    assert path.read_text().splitlines()[0].startswith(LIGER)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = {(r["kernel_name"], r["kernel_provider"], r["kernel_operation_mode"]) for r in rows}
    assert points == {(o, p, m) for o in OPERATORS for p in providers for m in MODES}
    for row in rows:
        assert row["threads"] == "1" and row["torch_version"] == torch.__version__
        assert row["cpu_name"] and row["capability"] and row["x_name"] == "N"
        if row["status"] == "not applicable":
            assert row["y_value_50"] == "" and "cross-entropy" in row["note"]
            assert row["kernel_provider"] == "torch_lce"
            continue
        assert row["status"] == "timed"
        low, median, high = (float(row[f"y_value_{q}"]) for q in (20, 50, 80))
        assert 0 <= low <= median <= high
        config = json.loads(row["extra_benchmark_config_str"])
        assert config["rounds"] >= 5 and (config["P"], config["D"]) == (5, 8)
        assert row["x_value"] == "5" and config["dtype"] in ("float32", "bfloat16")
    metrics = {r["metric_name"]: r["metric_unit"] for r in rows}
    assert metrics["speed"] == "ms" and metrics["memory"] == "MiB"
    assert metrics["throughput"] == "GFLOP/s" and "share_of_torch_mm" in metrics
    rate, of_mm, of_best = (
        [float(r["y_value_50"]) for r in rows if r["metric_name"] == name]
        for name in ("throughput", "share_of_torch_mm", "share_of_best_product")
    )
    # The products run at 1 and 4 GFLOP/s.
    assert of_mm == pytest.approx(rate, rel=1e-4)
    assert [4 * share for share in of_best] == pytest.approx(rate, rel=1e-4)
    config = json.loads(rows[0]["extra_benchmark_config_str"])
    of_copy = next(r for r in rows if r["metric_name"] == "share_of_copy")
    intensity = config["least_operations"] / config["least_bytes"]
    assert float(of_copy["y_value_50"]) == pytest.approx(rate[0] / intensity / 2, rel=1e-4)
    ratios = {r["kernel_provider"] for r in rows if r["metric_name"] == "speedup_over_eager"}
    assert ratios == {"torch_lce", "mulki", "mulki-reference"}
    # Gradients that exist after the forward pass give the backward pass alone no rate or ratio.
    alone = {
        r["kernel_provider"]: {s["metric_name"] for s in rows if same_point(s, r)}
        for r in rows
        if (r["kernel_name"], r["kernel_operation_mode"]) == ("dual_teacher_kl", "backward")
    }
    assert "throughput" in alone["eager"]
    assert alone["mulki"] == {"speed", "gradient_error"}


def same_point(one: dict[str, str], other: dict[str, str]) -> bool:
    keys = ("kernel_name", "kernel_provider", "kernel_operation_mode")
    return all(one[key] == other[key] for key in keys)


def test_output_grows_and_the_table_shows_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "ops.csv")
    given = (*TINY, "--ops", "siglip", "--dtypes", "fp32", "--modes", "both", "--output", path)
    assert bench(*given, "--providers", "eager", "mulki") == 0
    first = len(read_rows(path))
    monkeypatch.setitem(PROVIDERS, "mulki", wrong_provider())
    monkeypatch.setattr("mulki.bench.machine.datetime", Later)
    assert bench(*given, "--providers", "eager", "mulki") == 1
    assert len(read_rows(path)) > first
    capsys.readouterr()
    assert bench("table", path) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 3 and "threads: " in lines[0]
    assert "eager, ms | mulki, ms" in table[0]
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:4] == ["siglip", "5 x 5 x 8", "float32", "both"]
    # The failure was last, so nothing of the earlier success is left.
    assert cells[5:9] == ["failed", "-", "-", "-"] and float(cells[4]) > 0


def test_shapes_that_are_no_pairs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--ops", "similarity", "siglip", "--dtypes", "fp32", "--modes", "forward")
    shapes = ("--shapes", "6x5x8", "5x5x8", "--seconds", "0.001")
    assert bench(*given, *shapes, "--providers", "eager") == 0
    out = capsys.readouterr().out
    assert "siglip take N = P, so these shapes are left out: 6x5x8" in out
    assert "siglip, 5x5x8" in out and "siglip, 6x5x8" not in out


class Later:
    @staticmethod
    def now() -> Later:
        return Later()

    def isoformat(self, timespec: str) -> str:
        return "9999-01-01T00:00:00"


def test_the_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.ops", "--ops", "gone"])
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("benchmarks.ops", run_name="__main__")
    assert leave.value.code == 2 and "--ops: got gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "siglp"], ["--ops", "siglp", '"siglip"']),
        (["--dtypes", "fp8"], ["--dtypes", "fp8", "bfloat16"]),
        (["--modes", "sideways"], ["--modes", "sideways", "backward"]),
        (["--providers", "eagre"], ["--providers", '"eager"']),
        (["--shapes", "64"], ["--shapes", "64", "NxPxD"]),
        (["--shapes", "64x0"], ["--shapes", "64x0"]),
        (["--shapes", "64x10x"], ["--shapes", "64x10x"]),
        (["--shapes", "6x-5"], ["--shapes", "6x-5"]),
        (["--shapes", "6x5", "--ops", "siglip", "contrastive"], ["--shapes", "6x5", "N = P"]),
        (["--shapes", "6x5", "--quick"], ["--quick", "--shapes"]),
        (["--shapes"], ["--shapes", "mulki bench --help"]),
        (["--seconds", "0"], ["--seconds"]),
        (["--seconds", "fast"], ["--seconds", "fast"]),
        (["--threads", "-1"], ["--threads", "-1"]),
        (["--device", "toaster"], ["--device", "toaster", "cpu"]),
        (["--device", "meta"], ["--device", "meta", "cpu"]),
        (["--output", "gone/ops.csv"], ["gone/ops.csv"]),
        (["--output", "other.csv"], ["other.csv", "not a CSV of this benchmark"]),
        (["--bogus"], ["--bogus"]),
        (["tabel", "ops.csv"], ["tabel"]),
        (["table"], ["CSV"]),
        (["table", "gone.csv"], ["gone.csv", "No such file"]),
        (["table", "other.csv"], ["other.csv", "not a CSV of this benchmark"]),
        (["table", "damaged.csv"], ["damaged.csv, line 2"]),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("a,b\n1,2\n")
    columns = list(next(rows_of(Result(CASE, "eager", "both", "failed"), {})))
    assert set(columns) < set(HEADER)
    Path("damaged.csv").write_text(",".join(HEADER) + "\nsimilarity,eager\n")
    assert bench(*arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("mulki: error: ") and error.count("\n") == 1
    assert all(part in error for part in said), error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        bench("--help")
    out = capsys.readouterr().out
    assert leave.value.code == 0
    assert all(word in out for word in ("--shapes", "--providers", "dual_teacher_kl", "--output"))


# --- cases


def test_shapes() -> None:
    assert parse_shape("64x100") == (64, 100, 512)
    assert parse_shape("4x3x2") == (4, 3, 2)
    own = make_cases(list(OPERATORS), None, ["float32"])
    assert {c.n for c in own if c.operator == "contrastive"} == {256, 512, 1024, 2048, 4096, 8192}
    assert {(1024, 1000, 512), (4096, 4096, 512)} < {
        (c.n, c.p, c.d) for c in own if c.operator == "dual_teacher_kl"
    }
    assert all(c.n == c.p for c in own if c.operator in PAIRED)
    quick = make_cases(list(OPERATORS), None, ["float32"], quick=True)
    assert {c.operator for c in quick} == set(OPERATORS) and len(quick) < len(own)


CASE = Case("dual_teacher_kl", 7, 5, 16, "float32")
# Large enough that which rounding comes out smaller is no matter of luck.
VERIFIED = Case("dual_teacher_kl", 17, 33, 64, "float32")


def test_least_work() -> None:
    product = 2 * 7 * 5 * 16
    assert [CASE.operations(mode) for mode in MODES] == [3 * product, 2 * product, 5 * product]
    similarity = Case("similarity", 7, 5, 16, "bfloat16")
    assert [similarity.operations(mode) for mode in MODES] == [product, 2 * product, 3 * product]

    x, w, _, teachers, target = CASE.inputs().arguments
    read = sum(t.nbytes for t in (x, w, target, *teachers[0][:2], *teachers[1][:2]))
    gradients = x.nbytes + w.nbytes
    assert CASE.least_bytes("forward") == read + 4
    assert CASE.least_bytes("both") == read + 4 + gradients
    x, w, _ = similarity.inputs().arguments
    read, matrix = x.nbytes + w.nbytes, 2 * 7 * 5
    assert similarity.least_bytes("forward") == read + matrix
    assert similarity.least_bytes("both") == 2 * read + 2 * matrix


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_are_the_same_at_every_call_and_exact_ones_are_rounded(operator: str) -> None:
    case = Case(operator, 4, 4, 8, "bfloat16")
    one, two, exact = case.inputs(), case.inputs(), case.inputs(exact=True)
    for name, leaf in one.leaves.items():
        assert leaf.requires_grad and torch.equal(leaf, two.leaves[name])
        assert exact.leaves[name].dtype == torch.float64
        assert torch.equal(leaf.double(), exact.leaves[name])
    assert one.leaves["features"].dtype == torch.bfloat16
    if case.teachers:
        teachers = one.arguments[3]
        assert len(teachers) == case.teachers
        assert not any(t.requires_grad for teacher in teachers for t in teacher)


# --- verification


def wrong_provider(calls: list[int] | None = None) -> Provider:
    """One percent too large, gradients and all."""

    def make(case: Case) -> Callable[..., Tensor]:
        def loss(*arguments: object) -> Tensor:
            if calls is not None:
                calls.append(1)
            return 1.01 * EAGER[case.operator](*arguments)

        return loss

    return Provider("wrong", make)


def raising_provider() -> Provider:
    def make(case: Case) -> Callable[..., Tensor]:
        raise RuntimeError("no kernel\nfor this")

    return Provider("raising", make)


def test_what_is_wrong_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setitem(PROVIDERS, "wrong", wrong_provider(calls))
    monkeypatch.setitem(PROVIDERS, "raising", raising_provider())
    results = measure_case(CASE, ("eager", "wrong", "raising"), MODES, seconds=0.01)
    assert [(r.mode, r.provider) for r in results] == [
        (mode, name) for mode in MODES for name in ("eager", "wrong", "raising")
    ]
    by_provider = {r.provider: r for r in results}
    assert by_provider["eager"].status == "timed" and by_provider["eager"].metrics
    wrong, raising = by_provider["wrong"], by_provider["raising"]
    assert wrong.status == raising.status == "failed"
    assert not wrong.metrics and wrong.rounds == 0
    assert "gradient of features: relative error 0.01" in "; ".join(wrong.notes)
    assert raising.notes == ("RuntimeError: no kernel",)
    # Once with autograd and once without, to verify it; a timed one is called often.
    assert len(calls) == 2


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("place", range(3))
def test_an_error_of_one_percent_in_one_gradient_is_noticed(operator: str, place: int) -> None:
    case = Case(operator, 24, 24, 32, "float32")
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    name = list(inputs.leaves)[place]

    def slightly_off(*arguments: Tensor) -> Tensor:
        changed = list(arguments)
        leaf = changed[place]
        # The same value; the gradient is one percent too large.
        changed[place] = leaf + 0.01 * (leaf - leaf.detach())
        return EAGER[operator](*changed)

    problems = verifier.problems(verifier.errors(outcome(slightly_off, inputs)))
    assert len(problems) == 1 and problems[0].startswith(f"gradient of {name}: relative error 0.01")
    assert not verifier.problems(verifier.errors(outcome(MULKI[operator], inputs)))


def test_a_wrong_loss_and_one_that_is_not_finite_are_noticed() -> None:
    inputs = CASE.inputs()
    verifier = Verifier(CASE, inputs)
    right = EAGER[CASE.operator]

    def wrong_without_autograd(*arguments: Tensor) -> Tensor:
        return right(*arguments) * (1.0 if torch.is_grad_enabled() else 1.01)

    problems = verifier.problems(verifier.errors(outcome(wrong_without_autograd, inputs)))
    assert [p.partition(":")[0] for p in problems] == ["loss without autograd"]
    found = outcome(right, inputs)
    found["gradient of prototypes"][0, 0] = torch.nan
    problems = verifier.problems(verifier.errors(found))
    assert [p.partition(":")[0] for p in problems] == ["gradient of prototypes"]


def test_an_unfused_result_that_is_not_finite_excuses_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("prototype_cross_entropy", 7, 5, 16, "float32")
    right = EAGER[case.operator]

    def overflows(x: Tensor, *others: Tensor) -> Tensor:
        value = right(x, *others)
        return value if x.dtype == torch.float64 else value * torch.inf

    inputs = case.inputs()
    monkeypatch.setitem(EAGER, case.operator, overflows)
    verifier = Verifier(case, inputs)
    problems = verifier.problems(verifier.errors(outcome(overflows, inputs)))
    assert "loss: relative error inf, allowed 2e-05" in problems
    assert not verifier.problems(verifier.errors(outcome(right, inputs)))


def test_rounded_logits_are_forgiven_to_their_own_kind_alone() -> None:
    """What storing bf16 logits costs the eager loss is more than the tolerance by itself."""
    case = Case("dual_teacher_kl", 24, 24, 64, "bfloat16")
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    with PROVIDERS["eager"].context(case):
        eager = verifier.errors(outcome(EAGER[case.operator], inputs))
    mulki = verifier.errors(outcome(MULKI[case.operator], inputs))
    assert not verifier.problems(eager) and not verifier.problems(mulki)
    assert eager["gradient of features"] > 3 * mulki["gradient of features"]


# --- measuring


def test_providers_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], float]:
        def go() -> float:
            order.append(name)
            return float(len(order))

        return go

    times = measure.take_turns({name: call(name) for name in "abc"}, seconds=0.0)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    # Turning abc round would let each follow one other alone.
    assert len({pair for r in rounds for pair in (r[:2], r[1:])}) > 3
    # The first round warmed up: what is left starts with the second.
    assert {len(t) for t in times.values()} == {5}
    assert [times[name][0] for name in rounds[1]] == [4.0, 5.0, 6.0]
    before = order.copy()
    order.clear()
    measure.take_turns({name: call(name) for name in "abc"}, seconds=0.0)
    assert order == before


def test_ratios_are_those_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both slow down together from round to round; the ratio does not."""

    def turns(
        calls: dict[str, object], seconds: float, least_rounds: int = 4
    ) -> dict[str, list[float]]:
        return {"eager": [1.0, 2.0, 4.0, 8.0], "mulki": [0.5, 1.0, 2.0, 4.0]}

    monkeypatch.setattr(measure, "take_turns", turns)
    results = measure_case(VERIFIED, ("eager", "mulki"), ("both",), seconds=0.01)
    ratio = results[1].metrics["speedup_over_eager"]
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    assert results[1].metrics["speed"].median == 1500.0
    rate = VERIFIED.operations("both") / 1e9
    assert results[1].metrics["throughput"].high == pytest.approx(
        Quantiles.of([rate / t for t in (0.5, 1.0, 2.0, 4.0)]).high
    )


def test_the_clock_runs_for_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts forward passes tells which of them it saw."""
    calls: list[str] = []
    monkeypatch.setattr(clocks, "now", lambda device: float(len(calls)))
    inputs = Case("similarity", 3, 3, 4, "float32").inputs()

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, z: Tensor) -> Tensor:
            calls.append("forward")
            return z.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            calls.extend(["backward"] * 10)
            return grad

    def loss(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return Counted.apply(scale * x @ w.T)

    took = {mode: measure.timed(mode, loss, inputs, "cpu") for mode in MODES}
    assert took == {"forward": 1.0, "backward": 10.0, "both": 11.0}


def test_memory_notices_a_stored_matrix() -> None:
    case = Case("prototype_cross_entropy", 512, 1024, 4, "float32")
    inputs = case.inputs()
    matrix = 512 * 1024 * 4

    def without(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        return scale * (x.sum() + w.sum())

    stored = measure.extra_memory("both", EAGER[case.operator], inputs, "cpu")["memory"]
    lean = measure.extra_memory("both", without, inputs, "cpu")["memory"]
    assert stored >= 2 * matrix and lean < matrix / 10
    forward = measure.extra_memory("forward", EAGER[case.operator], inputs, "cpu")["memory"]
    assert matrix <= forward < stored


def test_memory_leaves_out_the_outputs() -> None:
    inputs = Case("similarity", 512, 1024, 4, "float32").inputs()
    matrix = 512 * 1024 * 4

    def once(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return x @ w.T

    def twice(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return once(x, w, scale) + once(x, w, scale)

    assert measure.extra_memory("forward", once, inputs, "cpu")["memory"] == 0
    assert measure.extra_memory("forward", twice, inputs, "cpu")["memory"] == 2 * matrix


def test_memory_counts_what_stays_with_the_calling_thread() -> None:
    inputs = Case("similarity", 4, 4, 4, "float32").inputs()
    kept, size = threading.local(), 1 << 20

    def loss(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        if not hasattr(kept, "scratch"):
            kept.scratch = torch.empty(size, dtype=torch.uint8)
        return x @ w.T

    loss(*inputs.arguments)
    for _ in range(2):
        assert measure.extra_memory("forward", loss, inputs, "cpu")["memory"] >= size


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_memory_is_that_of_a_call_in_its_context(mode: str) -> None:
    inputs = Case("prototype_cross_entropy", 4, 4, 4, "float32").inputs()
    seen: list[tuple[torch.dtype, bool]] = []

    def loss(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        z = scale * x @ w.T
        seen.append((z.dtype, torch.is_grad_enabled()))
        return z.sum()

    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    measure.extra_memory(mode, loss, inputs, "cpu", context)
    assert set(seen) == {(torch.bfloat16, mode == "both")}


def test_resident_memory_notices_what_the_allocator_is_not_asked_for() -> None:
    inputs = Case("similarity", 4, 4, 4, "float32").inputs()
    size = 64 << 20

    def loss(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        bytearray(size)[:: 1 << 12] = b"x" * (size >> 12)
        return x @ w.T

    found = measure.extra_memory("forward", loss, inputs, "cpu")
    if "resident_memory" not in found:
        pytest.skip("wants Linux and glibc")
    assert found["memory"] < size / 10 < size * 0.9 < found["resident_memory"]


def test_the_rate_of_products_grows_to_a_size_that_takes_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(torch, "mm", lambda a, b: sizes.append(len(a)))
    monkeypatch.setattr(
        functional, "prototype_similarity", lambda a, b: sizes.extend([len(a) // 2] * 4)
    )
    # A product of 512 takes 10 ms, one of 1024 takes 80; mulki's of 2048 four times as long.
    monkeypatch.setattr(clocks, "now", lambda device: sum((n / 512) ** 3 for n in sizes) / 100)
    rates = product_rate(torch.float32, "cpu")
    assert set(sizes) == {512, 1024}
    assert rates.torch_mm == pytest.approx(2 * 512**3 / 0.01)
    assert rates.best == rates.similarity == pytest.approx(2 * 2048**3 / 0.32)


# --- providers


def test_the_reference_is_asked_for_by_its_variable_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for before in (None, "auto"):
        if before is None:
            monkeypatch.delenv("MULKI_BACKEND", raising=False)
        else:
            monkeypatch.setenv("MULKI_BACKEND", before)
        with PROVIDERS["mulki-reference"].context(CASE):
            assert os.environ["MULKI_BACKEND"] == "reference"
            assert PROVIDERS["mulki"].note(CASE) == "served by reference"
        assert os.environ.get("MULKI_BACKEND") == before


@pytest.mark.slow
def test_compiled_eager_is_right() -> None:
    case = Case("dual_teacher_kl", 9, 7, 16, "bfloat16")
    (result,) = measure_case(case, ("compile",), ("both",), seconds=0.01)
    if result.status == "failed" and "ompiler" in str(result.notes):
        pytest.skip("torch.compile finds no C++ compiler")
    assert result.status == "timed", result.notes


# --- the package


def test_the_benchmark_is_loaded_when_asked_for_and_never_training() -> None:
    code = (
        "import sys, mulki\n"
        "assert not [m for m in sys.modules if m.startswith('mulki.bench')]\n"
        "before = set(sys.modules)\n"
        "import mulki.bench.run\n"
        "above = 'mulki.cli mulki.engine mulki.methods mulki.data open_clip benchmarks'\n"
        "print([m for m in above.split() if m in set(sys.modules) - before])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_smallest_case_under_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable"]
    chosen = "64x100x512 and float32 and not compile"
    done = subprocess.run(
        [*command, "-k", chosen, "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # Two operators in three modes by eager, mulki and mulki-reference, but for the loss's backward
    # pass by the last two, which form its gradients before; torch_lce applies to neither.
    assert done.returncode == 0 and "16 passed" in done.stdout, done.stdout


def test_markdown_keeps_machines_apart() -> None:
    metrics = {"speed": Quantiles.same(2.0), "throughput": Quantiles.same(3.0)}
    result = Result(CASE, "eager", "both", "timed", metrics=metrics)
    rows = []
    for threads in ("1", "2"):
        machine = dict.fromkeys(HEADER[HEADER.index("gpu_name") : -2], "") | {"threads": threads}
        rows += list(rows_of(result, machine))
    text = markdown(rows)
    assert text.count("| operator |") == 2 and "threads: 1" in text and "threads: 2" in text
    assert text.count("| dual_teacher_kl | 7 x 5 x 16 | float32 | both | 2 |") == 2
    assert "*" not in text


def test_markdown_marks_a_backward_pass_that_had_its_gradients() -> None:
    metrics = {"speed": Quantiles.same(2.0)}
    result = Result(CASE, "mulki", "backward", "timed", metrics=metrics)
    machine = dict.fromkeys(HEADER[HEADER.index("gpu_name") : -2], "")
    text = markdown(list(rows_of(result, machine)))
    assert "| backward | 2* |" in text and "\n\\* gradients" in text


HEADER = [
    *LIGER.split(","),
    *("torch_version", "triton_version", "cpu_name", "capability", "threads", "git_commit"),
    *("status", "note"),
]
