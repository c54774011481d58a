"""`mulki prove`; that it tries the kernels is tested in tests/kernels/interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulki import kernels
from mulki.app import prove
from mulki.app.cli import run_command
from mulki.bench import point
from mulki.bench.cases import Case
from mulki.bench.report import Quantiles, Result
from mulki.kernels import schedule
from mulki.ops import proofs
from mulki.ops.proofs import Verdict


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_where_the_kernels_do_not_run_the_reason_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove, "_not_served", lambda *_: "torch finds no GPU on this machine")
    assert run_command(["prove"]) == 2
    assert "--device: got cuda" in capsys.readouterr().err
    assert not proofs.folder().exists()


def test_the_table_and_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove, "_not_served", lambda *_: None)
    found = [
        Verdict("siglip", "float32", "small", (), 1.25, 0.9),
        Verdict("similarity", "float32", "small", ("loss: relative error 3",)),
    ]
    monkeypatch.setattr(prove, "prove", lambda device, seconds: iter(found[:1]))
    assert run_command(["prove", "--seconds", "1"]) == 0
    out = capsys.readouterr().out
    assert " 1.25  0.90  right" in out and "left out" not in out
    monkeypatch.setattr(prove, "prove", lambda device, seconds: iter(found))
    assert run_command(["prove"]) == 1
    assert "    -     -  loss: relative error 3" in capsys.readouterr().out


def test_a_kernel_that_cannot_serve_is_wrong_and_not_timed() -> None:
    """Without TRITON_INTERPRET nothing runs on the CPU, and a fallback would prove nothing."""
    found = list(prove.prove("cpu", 0.1, ("float32",), ("small",)))
    assert "TRITON_INTERPRET" in found[0].problems[0] and found[0].speedup is None
    assert [one.operator for one in found] == list(prove.CASES)
    (subject,) = proofs.subjects("cpu")
    assert set(proofs.stored(subject) or ()) == {one.place for one in found}


def test_calls_with_gradients_and_without_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without gradients other kernels may serve."""
    asked = []

    def measured(case: Case, providers: object, modes: tuple[str, ...], seconds: float) -> object:
        asked.append(modes)
        speedups = {"both": 2.0, "forward": 0.5}
        return [
            Result(
                *(case, "mulki", mode, "timed", (), 9),
                metrics={"speedup_over_eager": Quantiles.same(speedups[mode])},
            )
            for mode in modes
        ]

    monkeypatch.setattr(point, "measure_case", measured)
    monkeypatch.setattr(prove, "_not_served", lambda *_: None)
    monkeypatch.setattr(prove, "_problems_of_forms", lambda case: [])
    first = next(prove.prove("cpu", 0.1, ("float32",), ("small",)))
    assert (first.speedup, first.forward_speedup, first.problems) == (2.0, 0.5, ())
    assert asked == [("both", "forward")] * 2


def test_an_interrupted_proof_keeps_what_it_has_found() -> None:
    first = next(prove.prove("cpu", 0.1, ("float32",), ("small",)))
    (subject,) = proofs.subjects("cpu")
    assert list(proofs.stored(subject) or ()) == [first.place]


def test_every_operator_with_triton_kernels_is_tried_at_every_size() -> None:
    assert set(prove.CASES) == set(kernels.OPERATORS)
    for shapes in (prove.SHAPES, prove.PAIRED_SHAPES):
        assert [proofs.size_of(n, p) for n, p, _ in shapes.values()] == list(shapes)
        assert list(shapes) == list(proofs.SIZES)
    for others in (prove.OTHER_SHAPES, prove.OTHER_PAIRED_SHAPES):
        assert list(others) == list(proofs.SIZES)
        for size, of_size in others.items():
            assert {proofs.size_of(n, p) for n, p, _ in of_size} == {size}


@pytest.mark.parametrize("family", ["half", "tf32", "float"])
@pytest.mark.parametrize("models", [1, 2, 3, 4])
def test_every_schedule_that_serves_a_size_is_tried_there(family: str, models: int) -> None:
    """A proof at one schedule would say nothing of the kernels of another."""

    def stored(columns: int, *kind: bool) -> tuple[object, ...]:
        """A kernel of stored logits; whether a tile holds all columns decides, too."""
        return (columns <= schedule.row_tile("sm_90", models, columns).columns, *kind)

    def launched(problem: schedule.Problem) -> set[tuple[object, ...]]:
        """What is launched: of stored logits with a state or not, and with G or not."""
        plan, gradient = schedule.plans(problem)[0], problem.gradient
        if plan.schedule == "rows":
            return {("rows", gradient)}
        if plan.schedule == "chunks":
            return {stored(problem.p, False, gradient)}
        first = ("stream",) if plan.schedule == "stream" else stored(plan.columns, True, False)
        return {first, ("G of a state",)} if gradient else {first}

    def kernels_of(*shapes: tuple[int, int, int]) -> set[tuple[object, ...]]:
        problems = [
            schedule.Problem(
                *(n, p, (d,) * models, family, gradient),
                whole=True,
                streamed=family == "half" and d % 8 == 0,
            )
            for n, p, d in shapes
            for gradient in (True, False)
        ]
        return set.union(*map(launched, problems))

    served = {
        "small": kernels_of((64, 100, 512), (128, 1000, 512), (64, 100, 700), (128, 1000, 700)),
        "medium": kernels_of(
            *((64, 65536, 512), (64, 65536, 700), (512, 8000, 512)),
            (8192, 30, 512),
            (1024, 1000, 512),
            (2048, 2048, 768),
            (2048, 2048, 700),
        ),
        "large": kernels_of(
            *((100000, 50, 512), (16384, 16384, 512), (65536, 65536, 512)),
            *((100000, 50, 700), (16384, 16384, 700), (65536, 65536, 700)),
            *((512, 20000, 512), (512, 20000, 700), (8192, 1000, 512), (8192, 1000, 700)),
        ),
    }
    assert set.union(*served.values()) >= {("rows", True), (True, False, True)}
    assert (family == "half") == all(("stream",) in taken for taken in served.values())
    for size, taken in served.items():
        assert taken <= kernels_of(prove.SHAPES[size], *prove.OTHER_SHAPES[size]), size


def test_pairs_whose_logits_are_made_twice_are_tried() -> None:
    n, _, d = prove.OTHER_PAIRED_SHAPES["large"][-1]
    problem = schedule.Problem(n, n, (d,), "half", True, softmax=False, columns_too=True)
    assert schedule.plans(problem)[0].rows < n


def test_it_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove, "_not_served", lambda *_: None)
    verdicts = len(prove.CASES) * len(prove.DTYPES) * len(proofs.SIZES)
    found = [Verdict("siglip", "float32", "small", (), 1.25, 0.9)] * verdicts
    monkeypatch.setattr(prove, "prove", lambda device, seconds: iter(found))
    assert run_command(["prove", "--limit", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("right\n") == 1 and f"left out: {verdicts - 1} verdicts, out of time" in out
    assert run_command(["prove", "--limit", "100"]) == 0
    assert "left out" not in capsys.readouterr().out
