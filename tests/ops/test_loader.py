"""Which library of C++ kernels is loaded, and why none is; nothing is compiled here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mulki.ops import loader
from tests import python

OURS = loader.library_name("DEFAULT")


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MULKI_DISABLE_CPP", raising=False)


def library(folder: Path, name: str, content: bytes = b"") -> Path:
    path = folder / f"{name}.so"
    path.write_bytes(content)
    return path


def test_nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.shutil, "which", lambda name: None)
    reason = loader.load_from(tmp_path)
    assert reason is not None and "not built" in reason and "install a C++ compiler" in reason
    assert "pip install --no-build-isolation" in reason
    monkeypatch.setattr(loader.shutil, "which", lambda name: f"/somewhere/{name}")
    reason = loader.load_from(tmp_path)
    assert reason is not None and "/somewhere/" in reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("_cpu_default_torch1_99_00000000", b"", "for torch 1.99, this is torch"),
        (f"{OURS.rpartition('_')[0]}_00000000", b"", "another version of mulki's operators"),
        (OURS, b"not a library" * 1000, f"{OURS}.so"),
    ],
)
def test_what_cannot_be_loaded_is_told(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    library(tmp_path, name, content)
    reason = loader.load_from(tmp_path)
    assert reason is not None and message in reason


def test_a_library_for_a_better_cpu_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, loader.library_name("AVX512"))
    library(tmp_path, loader.library_name("AVX2"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert loader.find(tmp_path) is None
    reason = loader.load_from(tmp_path)
    assert reason is not None and "built for AVX512 and AVX2 alone, here is DEFAULT" in reason
    assert "pip install" in reason
    (tmp_path / "setup.py").touch()
    package = tmp_path / "mulki"
    package.mkdir()
    library(package, loader.library_name("AVX512"))
    reason = loader.load_from(package)
    assert reason is not None
    assert "MULKI_BUILD_CAPABILITIES=DEFAULT python setup.py build_ext --inplace" in reason


@pytest.mark.parametrize(
    ("cpu", "taken"),
    [("AVX512", "AVX2"), ("AVX2", "AVX2"), ("DEFAULT", "DEFAULT"), ("SVE256", "DEFAULT")],
)
def test_the_best_built_capability_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: str, taken: str
) -> None:
    paths = {name: library(tmp_path, loader.library_name(name)) for name in ("DEFAULT", "AVX2")}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    assert loader.find(tmp_path) == (taken, paths[taken])


def test_a_lower_capability_tells_how_to_build_the_better_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(loader, "PACKAGE", tmp_path / "mulki")
    loader.PACKAGE.mkdir()
    library(loader.PACKAGE, loader.library_name("AVX2"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert loader.capability_in_words() == "AVX2 build"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    told = loader.capability_in_words()
    assert told.startswith("AVX2 build, none was built for AVX512: run `")
    assert "MULKI_BUILD_CAPABILITIES=AVX512 python setup.py build_ext --inplace" in told
    source = tmp_path / "csrc" / "a" / "b.h"
    source.parent.mkdir(parents=True)
    source.touch()
    os.utime(source, (0, 0))
    assert loader.capability_in_words() == told
    os.utime(source, (2**32, 2**32))
    assert loader.capability_in_words().startswith("AVX2 build, older than csrc/: run `")


def test_the_environment_decides_in_a_new_process() -> None:
    code = "from mulki.ops import loader; print(loader.capability(), loader.load(), loader.load())"
    told = python("-c", code, MULKI_DISABLE_CPP="1", ATEN_CPU_CAPABILITY="default")
    assert told.startswith("DEFAULT ") and told.count("MULKI_DISABLE_CPP is set") == 2


def test_what_was_built_loads() -> None:
    reason = loader.load_from(loader.PACKAGE)
    if loader.find(loader.PACKAGE) is None and os.environ.get("MULKI_BUILD_CPP") != "1":
        pytest.skip(str(reason))
    assert reason is None
    assert loader.capability() in loader.cpu_capabilities()
