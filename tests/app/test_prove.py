"""`mulki prove`; that it tries the kernels is tested in tests/kernels/interpreted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mulki.app import prove
from mulki.app.cli import run_command
from mulki.kernels import lookup, schedule
from mulki.ops import backends, proofs
from mulki.ops.proofs import Verdict
from mulki.runs.lock import FolderLock

GPU = "a card"
CARD = {GPU: torch.device("cpu")}
JOBS = [prove.Job("siglip", numbers, "small", ((8, 8, 16),)) for numbers in prove.NUMBERS]
FIRST, SECOND, *_ = JOBS


@pytest.fixture(autouse=True)
def a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by name, which nobody calls; on the CPU nothing is compiled ahead of time."""
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(proofs, "cards", lambda device: CARD)
    monkeypatch.setattr(proofs, "subject_of", lambda gpu: {"gpu": gpu})


def stored() -> dict[str, Verdict]:
    return proofs.stored({"gpu": GPU}) or {}


# --- what is sought


def test_bfloat16_at_training_sizes_goes_first() -> None:
    found = prove.jobs()
    places = [job.place for job in found]
    assert places[0] == "teacher_kl bfloat16 medium" and len(places) == 72
    assert len(set(places)) == len(places)
    assert {(job.numbers, job.size) for job in found[:12]} == {
        ("bfloat16", "medium"),
        ("bfloat16", "large"),
    }
    # float32 is proven as such and as tf32.
    assert {job.numbers for job in found} == {"bfloat16", "float16", "float32", "tf32"}


def test_every_operator_with_triton_kernels_is_tried_at_every_size() -> None:
    assert set(prove.CASES) == set(lookup.OPERATORS)
    assert set(prove.SIZES) == set(proofs.SIZES)
    for shapes in (prove.SHAPES, prove.PAIRED_SHAPES):
        for size, of_size in shapes.items():
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
        plan, gradient = schedule.plan(problem), problem.gradient
        if plan.schedule == "rows":
            return {("rows", gradient)}
        if plan.schedule == "chunks":
            return {stored(problem.p, False, gradient)}
        first = stored(plan.columns, True, False)
        return {first, ("G of a state",)} if gradient else {first}

    def kernels_of(*shapes: tuple[int, int, int]) -> set[tuple[object, ...]]:
        problems = [
            schedule.Problem(n, p, (d,) * models, family, gradient, whole=True)
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
    for size, taken in served.items():
        assert taken <= kernels_of(*prove.SHAPES[size]), size


def test_pairs_whose_logits_are_made_twice_are_tried() -> None:
    n, _, d = prove.PAIRED_SHAPES["large"][-1]
    problem = schedule.Problem(n, n, (d,), "half", True, softmax=False, columns_too=True)
    assert schedule.plan(problem).rows < n


# --- what is printed


def test_where_the_kernels_do_not_run_the_reason_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lookup, "why_not", lambda *_: "there is no C compiler: install gcc")
    monkeypatch.setattr(proofs, "cards", lambda device: {})
    assert run_command(["prove"]) == 2
    assert "--device: the Triton" in (error := capsys.readouterr().err) and "install gcc" in error
    assert not proofs.folder().exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    for device in ("gone", "cuda:7"):
        assert run_command(["prove", "--device", device]) == 2
        assert f"--device: got '{device}', wanted cuda" in capsys.readouterr().err


def test_a_card_on_which_they_do_not_run_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"old": torch.device("cuda", 0), "new": torch.device("cuda", 1)}
    monkeypatch.setattr(proofs, "cards", lambda device: places)
    monkeypatch.setattr(
        backends.Triton, "why_not", lambda _, op, device, dtype: "old" if "0" in device else None
    )
    assert set(prove._cards("cuda")) == {"new"}
    assert "left out: old: old" in capsys.readouterr().out


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.Triton, "why_not", lambda *_: None)


def test_the_table_and_the_status(
    served: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Verdict("siglip", "float32", "small", (), 1.25, 0.9),
        Verdict("siglip", "bfloat16", "small"),
        Verdict("siglip", "float16", "small", ("loss: relative error 3",)),
        Verdict("siglip", "tf32", "small", failure="signal 11"),
    ]
    given = list(found[:2])
    monkeypatch.setattr(prove, "_found", lambda todo, card: iter(given))
    assert prove.report("cuda", wanted=JOBS) == 0
    out = capsys.readouterr().out
    assert " 1.25  0.90  right" in out and "-  no memory to try it" in out
    assert f"2 of 4 verdicts are there of {GPU}, and the kernels serve at 1" in out
    assert "the others: `mulki prove`" in out
    for one in found[2:]:
        given[:] = [one]
        assert prove.report("cuda", wanted=JOBS) == 1
    out = capsys.readouterr().out
    assert "    -     -  loss: relative error 3" in out and "did not run: signal 11" in out
    assert "4 of 4 verdicts" in out.splitlines()[-2] and "the others" not in out.splitlines()[-2]


def test_it_ends_in_time(
    served: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Verdict(*job[:3], (), 1.25, 0.9) for job in JOBS]
    monkeypatch.setattr(prove, "_found", lambda todo, card: iter(found))
    monkeypatch.setattr(prove, "jobs", lambda: JOBS)
    assert run_command(["prove", "--limit", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("right\n") == 1 and "1 of 4 verdicts" in out
    assert "left out: what is not there yet, out of time" in out


# --- what is kept


def test_a_verdict_that_is_stored_is_not_sought_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sought: list[str] = []

    def found(todo: Sequence[prove.Job], card: torch.device) -> Iterator[Verdict]:
        for job in todo:
            sought.append(job.numbers)
            yield Verdict(*job[:3], (), 2.0, 2.0)

    monkeypatch.setattr(prove, "_found", found)
    next(prove.prove(CARD, wanted=JOBS))
    assert set(stored()) == {FIRST.place}
    assert [one.numbers for one in prove.prove(CARD, wanted=JOBS)] == list(prove.NUMBERS[1:])
    assert list(prove.prove(CARD, wanted=JOBS)) == [] and len(sought) == 4
    assert len(list(prove.prove(CARD, again=True, wanted=JOBS))) == 4


def test_one_process_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "_found", lambda todo, card: iter(()))
    proofs.folder().mkdir(parents=True)
    lock = FolderLock(proofs.folder())
    with pytest.raises(prove.InputError, match="another `mulki prove`"):
        list(prove.prove(CARD))
    lock.release()
    assert list(prove.prove(CARD)) == []


def test_a_folder_that_cannot_be_written_is_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    with pytest.raises(prove.InputError, match="cannot be written .*set TRITON_CACHE_DIR"):
        next(prove.prove({GPU: torch.device("cuda", 0)}))
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(prove.InputError, match="cannot be written .*set MULKI_CACHE_DIR"):
        next(prove.prove(CARD))


# --- processes


def right(job: prove.Job, device: str) -> Verdict:
    return Verdict(*job[:3], (), 2.0, 2.0)


def crashing(job: prove.Job, device: str) -> Verdict:
    if job == FIRST:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(job, device)


def hanging(job: prove.Job, device: str) -> Verdict:
    if job == FIRST:
        time.sleep(600)
    return right(job, device)


@pytest.mark.parametrize(
    ("function", "reason"), [(crashing, "exit status -9"), (hanging, "did not end within 4 ")]
)
def test_a_crash_costs_one_verdict(
    function: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "verdict_of", function)
    if function is hanging:
        monkeypatch.setattr(prove, "LONGEST", 4.0)
    first, second = prove.prove(CARD, wanted=JOBS[:2])
    assert first.place == FIRST.place and reason in (first.failure or "")
    assert second == right(SECOND, "cpu")
    # Nor is it met again.
    assert len(stored()) == 2 and list(prove.prove(CARD, wanted=JOBS[:2])) == []


def test_a_verdict_is_found_in_a_process_of_its_own() -> None:
    """Without TRITON_INTERPRET nothing runs on the CPU, and a fallback would prove nothing."""
    (found,) = prove.prove(CARD, wanted=[FIRST])
    assert "TRITON_INTERPRET" in (found.failure or "") and found.speedup is None


def compiled(job: prove.Job, case: Any, folder: str, target: None) -> None:
    time.sleep(0.05)
    Path(folder, f"{job.numbers} {case.shape}").touch()


def the_gpu(folder: Path, device: str) -> tuple[str, None]:
    return str(folder), None


def having_compiled(folder: Path, job: prove.Job, device: str) -> Verdict:
    there = [(folder / f"{job.numbers} {n}x{p}x{d}").is_file() for n, p, d in job.shapes]
    return Verdict(*job[:3], failure=f"{sum(there)} of {len(there)}")


def test_kernels_are_compiled_before_their_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by the environment: a process has that of the fork server, which may be older.
    monkeypatch.setattr(prove, "_gpu", partial(the_gpu, tmp_path))
    monkeypatch.setattr(prove, "_compile", compiled)
    monkeypatch.setattr(prove, "verdict_of", partial(having_compiled, tmp_path))
    shapes = ((8, 8, 16), (9, 9, 16), (10, 10, 16))
    todo = [job._replace(shapes=shapes) for job in JOBS[:2]]
    found = list(prove._found(todo, torch.device("cuda", 0)))
    assert [one.failure for one in found] == ["3 of 3"] * 2


def no_compiler(job: prove.Job, case: Any, folder: str, target: None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_compiler_that_crashes_costs_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "_gpu", partial(the_gpu, tmp_path))
    monkeypatch.setattr(prove, "_compile", no_compiler)
    monkeypatch.setattr(prove, "verdict_of", right)
    found = list(prove._found(JOBS[:2], torch.device("cuda", 0)))
    assert found == [right(FIRST, ""), right(SECOND, "")]
