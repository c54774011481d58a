"""`mulki doctor`: what it finds, what it advises, and its exit status."""

from __future__ import annotations

import json
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from mulki.app import doctor
from mulki.app.cli import run_command
from mulki.app.doctor import Finding
from mulki.errors import InputError
from mulki.ops import backends, loader


def found(findings: Any, level: str) -> list[Finding]:
    return [finding for finding in findings if finding.level == level]


def test_packages_of_another_version_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2.11", "numpy<1", "no-such-package>=3", "rich>=9; extra == 'x'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    problems = found(doctor.packages(), "problem")
    assert [(p.text.split()[0], p.remedy) for p in problems] == [
        ("numpy", "pip install 'numpy<1'"),
        ("no-such-package", "pip install 'no-such-package>=3'"),
    ]
    (good,) = found(doctor.packages(), "ok")
    assert f"torch {metadata.version('torch')}" in good.text and "rich" not in good.text


def test_mulki_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert [finding.level for finding in doctor.packages()] == ["note"]


def test_kernels_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the C++ kernels were not built (g++ is on PATH): run `make`"
    monkeypatch.setattr(loader, "load", lambda: reason)
    wanted = "the C++ kernels were not built (g++ is on PATH)"
    assert doctor.kernels() == Finding("C++ kernels", "problem", wanted, "run `make`")
    monkeypatch.setattr(loader, "load", lambda: None)
    monkeypatch.setattr(loader, "capability_in_words", lambda: "AVX2 build")
    assert doctor.kernels() == Finding("C++ kernels", "ok", "AVX2 build")
    monkeypatch.setattr(loader, "capability_in_words", lambda: "AVX2 build, not AVX512: run `x`")
    assert doctor.kernels().level == "note" and doctor.kernels().remedy == "run `x`"


def test_operators_that_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    served = [
        backends.Served(op, "cpu", torch.float32, "reference", {"cpp": "not built"})
        for op in ("siglip", "contrastive")
    ]
    monkeypatch.setattr(backends, "report", lambda: served)
    (finding,) = doctor.operators()
    assert finding.level == "note" and finding.text == "cpu, float32: reference serves 2 operators"
    assert finding.remedy == "cpp: not built"
    monkeypatch.undo()
    monkeypatch.setenv("MULKI_BACKEND", "rust")
    backends.read_environment()
    (finding,) = doctor.operators()
    assert finding.level == "problem" and finding.remedy == "unset MULKI_BACKEND"


@pytest.mark.parametrize(
    ("cuda", "said"), [(None, "torch has no CUDA"), ("12.6", "for CUDA 12.6 does not find it")]
)
def test_a_card_that_torch_cannot_use(
    cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gpu_names", list)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_has_nvidia_card", lambda: False)
    assert [finding.level for finding in doctor.devices()] == ["ok"]
    monkeypatch.setattr(doctor, "_has_nvidia_card", lambda: True)
    (finding,) = doctor.devices()
    assert finding.level == "problem" and said in finding.text and finding.remedy


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    wanted = Finding("threads", "problem", "8 threads on 2 cores", "export OMP_NUM_THREADS=2")
    assert doctor.threads() == wanted


def test_bundled_data_that_are_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise InputError("x.tar: damaged (a; b); reinstall mulki")

    monkeypatch.setattr("mulki.data.load_sequence", refuse)
    wanted = Finding("bundled data", "problem", "x.tar: damaged (a; b)", "reinstall mulki")
    assert doctor.bundled() == wanted


def test_packages_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("mulki.clip.models.load", fail)
    found = doctor.bundled()
    assert found.level == "problem" and "cannot be loaded (RuntimeError: operator" in found.text


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(5 << 20))
    finding = doctor.disk(tmp_path / "not" / "there")
    assert finding.level == "problem" and str(tmp_path) in finding.text


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    for place in (tmp_path, tmp_path / "file"):
        finding = doctor.disk(place)
        assert (finding.level, finding.text) == ("problem", f"{place} cannot be written")


def test_the_self_test_finds_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from mulki.bench.losses import MULKI

    right = MULKI["siglip"]
    monkeypatch.setitem(MULKI, "siglip", lambda *args: 1.01 * right(*args))
    findings = list(doctor.self_test(0.4))
    (problem,) = found(findings, "problem")
    assert problem.text.startswith("siglip at 64x64x512 on cpu: ")
    assert "relative error" in problem.text and len(findings) == 8


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("a", "ok", "word " * 30), Finding("b", "note", "bad", "do `this`")]
    monkeypatch.setattr(doctor, "examine", lambda folder, seconds: iter(findings))
    assert run_command(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[-2].strip() == "-> do `this`"
    assert lines[-1] == "no problems"
    findings[1] = Finding("b", "problem", "bad", "do `this`")
    assert run_command(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("-> do `this`\n1 problem\n")
    assert run_command(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1]["remedy"] == "do `this`"


def test_all_of_it_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MULKI_STRICT", "0")
    findings = list(doctor.examine(tmp_path, seconds=0))
    assert {f.topic for f in findings} >= {"packages", "C++ kernels", "bundled data", "disk"}
    assert "MULKI_STRICT=0" in {f.text for f in findings if f.topic == "environment"}
