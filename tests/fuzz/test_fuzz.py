"""`python -m tests.fuzz` itself: one batch of each, and that it finds and shrinks what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from mulki.errors import InputError
from tests.fuzz import files, operators
from tests.fuzz.__main__ import main
from tests.fuzz.batches import try_for


@pytest.mark.parametrize("target", ["operators", "files"])
def test_a_batch_passes(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([target, "--seconds", "0", "--seed", "1"]) == 0
    assert f"{target}: 50 cases passed, seed 1" in capsys.readouterr().out


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
    assert "--seed 1 finds it again" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("no number"), InputError("")])
def test_a_reader_that_fails_otherwise_is_found(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: object) -> None:
        raise error

    monkeypatch.setattr(files, "READERS", {"a.csv": files.Reader(read, b"a,b\n")})
    case = files.Edited("a.csv", [])
    with pytest.raises((ValueError, AssertionError)):
        files.is_read_or_refused(case)
