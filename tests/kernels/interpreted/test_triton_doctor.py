"""`mulki doctor --kernels`, from its command to the file, without a card."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulki.app import kernels
from mulki.app.cli import run_command
from mulki.bench.losses import MULKI
from mulki.kernels import lookup
from mulki.ops import wins


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TINY", ((3, 4, 8),))
    monkeypatch.setattr(kernels, "PAIRED_TINY", ((3, 3, 8),))


def test_operators_are_tried_and_the_file_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, operators = tmp_path / "kernels.json", ("siglip", "teacher_kl")
    monkeypatch.setattr(lookup, "OPERATORS", operators)
    assert run_command(["doctor", "--kernels", str(path)]) == 0
    found = wins.read(path, wins.measured_on("cpu"))
    assert set(found) == set(operators)
    assert all(set(of) == {"float32"} for of in found.values())
    assert "wrong" not in capsys.readouterr().out


def test_a_wrong_operator_is_never_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, path = MULKI["siglip"], tmp_path / "kernels.json"
    monkeypatch.setattr(lookup, "OPERATORS", ("siglip",))
    monkeypatch.setitem(MULKI, "siglip", lambda *args: 1.01 * right(*args))
    assert run_command(["doctor", "--kernels", str(path)]) == 1
    said = wins.read(path, wins.measured_on("cpu"))["siglip"]["float32"]
    assert "was not right at 3x3x8" in str(said) and "wrong" in capsys.readouterr().out
