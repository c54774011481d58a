"""`python -m tests.fuzz` itself: one batch of each, and that it finds and shrinks what is wrong."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from mulki.errors import InputError
from tests.fuzz import calls, files, operators
from tests.fuzz.__main__ import main
from tests.fuzz.batches import try_for
from tests.ops.op_cases import LOSSES, NAMES, Case, make
from tests.ops.rounding import error


@pytest.mark.parametrize(("target", "count"), [("operators", 50), ("calls", 200), ("files", 50)])
def test_a_batch_passes(target: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([target, "--seconds", "0", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{target}: {count} cases passed, seed 1" in out
    assert f"python -m tests.fuzz {target} --seconds 0 --seed 1\n" in out


def test_the_cases_of_a_seed_are_the_same() -> None:
    drawn: list[list[int]] = [[], [], []]
    for seed, numbers in zip((1, 1, 2), drawn, strict=True):
        assert try_for({numbers.append: st.integers()}, 0, seed, 20) == 20
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_fails_is_shrunk() -> None:
    def small(number: int) -> None:
        assert number < 1000

    with pytest.raises(AssertionError) as found:
        try_for({small: st.integers(0, 10**9)}, 0, 1)
    assert "1000" in "".join(found.value.__notes__)


def test_a_result_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = operators.ours
    monkeypatch.setattr(
        "tests.ops.rounding.ours", lambda *case: [1.01 * value for value in right(*case)]
    )
    with pytest.raises(AssertionError, match=r"result \d: error"):
        main(["operators", "--seconds", "0", "--seed", "1"])
    again = "again.*\npython -m tests.fuzz operators --seconds 0 --seed 1\n"
    assert re.search(again, capsys.readouterr().err)


# By what a result is: in how many of all cases the error has to be seen. The rest are nothing but
# rounding, as the gradient of a student that is nearly its teacher, or of a scale (terms cancel).
SHARES = {"output": 0.95, "features": 0.95, "prototypes": 0.95, "scale": 0.8, "bias": 0.8}


@pytest.mark.parametrize("mean", [None, True], ids=["rows", "mean"])
@pytest.mark.parametrize(("dtype", "wrong"), [(torch.float32, 1.01), (torch.bfloat16, 1.05)])
def test_what_is_wrong_by_little_is_seen(
    dtype: torch.dtype, wrong: float, mean: bool | None
) -> None:
    """Rows of a loss and entries of a matrix, totals, and gradients by all that is differentiable.

    A student that is its teacher has no gradient but rounding, so it is left out here.
    """
    seen, tried = Counter[str](), Counter[str]()
    shapes, scales, gaps = [(6, 5, 4), (33, 100, 65)], (1.0, 14.3, 100.0), (None, 0.1)
    for name, shape, scale, gap in itertools.product(NAMES, shapes, scales, gaps):
        case = make(name, *shape, dtype, scale, gap)
        if case.op == "similarity" and mean is not None:
            continue  # a matrix has no sum
        for kind, (got, want, bound) in zip(SHARES, operators.allowed(case, mean), strict=False):
            assert error(got, want) <= bound, (name, shape, scale, gap, kind)
            tried[kind] += 1
            seen[kind] += error(wrong * got.double(), want) > bound
    shares = {kind: seen[kind] / tried[kind] for kind in tried}
    assert all(share >= SHARES[kind] for kind, share in shares.items()), shares


@pytest.mark.parametrize("name", NAMES)
def test_one_row_that_is_wrong_is_seen(name: str) -> None:
    """One by 2 %, in the output and in both gradients that are matrices."""
    case = make(name, 33, 100, 65, torch.float32, 14.3)
    for got, want, bound in list(operators.allowed(case, None))[:3]:
        spoilt = got.double().clone()
        row = want.reshape(len(want), -1).norm(dim=1).median(0).indices
        spoilt[row] *= 1.02
        assert error(got, want) <= bound < error(spoilt, want)


@pytest.mark.parametrize("failure", [ValueError("no number"), InputError("")])
def test_a_reader_that_fails_otherwise_is_found(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: object) -> None:
        raise failure

    monkeypatch.setattr(files, "READERS", {"a.csv": files.Reader(read, b"a,b\n")})
    case = files.Edited("a.csv", [])
    with pytest.raises((ValueError, AssertionError)):
        files.is_read_or_refused(case)


def call(name: str, place: int, change: str, **others: Any) -> calls.Drawn:
    drawn = calls.Drawn(
        name, 5, 7, 6, torch.float32, 9.0, place, change, 1.0, 1, 0, "reduced", False, 3
    )
    return drawn._replace(**others)


@pytest.mark.parametrize(
    "drawn",
    [
        call("kl_label", 7, "entry", whole=99),
        call("kl_label", 7, "all", whole=-(2**63)),
        call("kl", 2, "all", number=math.inf),
        call("ce", 0, "row", number=math.nan),
        call("pairs", 1, "turned"),
        call("siglip", 0, "none"),
        call("kl", 3, "entry", at=2),
    ],
)
def test_calls_that_are_wrong_are_refused_or_computed_alike(drawn: calls.Drawn) -> None:
    calls.is_right(drawn)


@pytest.mark.parametrize("form", ["rows", "backward", "reduced"])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_with_another_result_is_found(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each result that is not empty, as far off as one was in a review of the kernels."""
    real = calls.run
    drawn = call(name, 0, "strided", form=form)
    calls.is_right(drawn)
    spoilt = 0

    def run(case: Case) -> tuple[torch.Tensor, ...]:
        found = list(real(case))
        if case.args[0].dtype == torch.float32 and found[spoilt].numel():
            found[spoilt] = found[spoilt] + 1.7e38
        return tuple(found)

    monkeypatch.setattr(calls, "run", run)
    form = form if name in LOSSES or form != "reduced" else "rows"
    results = real(calls.asking(calls.changed(drawn), form, mean=False))
    for spoilt, result in enumerate(results):
        if result.numel():
            with pytest.raises(AssertionError, match=rf"result {spoilt}: 1\.\d+e\+38"):
                calls.is_right(drawn)


def test_one_that_refuses_what_the_other_takes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = calls._outcome

    def outcome(case: Case, backend: str | None) -> Any:
        return real(case, backend) if backend else (None, "ValueError: no")

    monkeypatch.setattr(calls, "_outcome", outcome)
    with pytest.raises(AssertionError, match="ValueError: no"):
        calls.is_right(call("kl", 0, "strided"))
