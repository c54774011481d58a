"""setup.py, and where what it builds and packs is found; nothing is compiled here."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import ROOT, python


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "MULKI_BUILD_CPP",
        "MULKI_BUILD_CAPABILITIES",
        "MULKI_BUILD_FLAGS",
        "MULKI_DISABLE_CPP",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which nothing is built or installed, without the bundled data."""
    ignore = shutil.ignore_patterns("embedded", "__pycache__", "_cpu_*")
    for folder in ("mulki", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, in a folder with one C++ source."""
    (tmp_path / "csrc" / "part").mkdir(parents=True)
    (tmp_path / "csrc" / "part" / "one.cpp").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    spec = importlib.util.spec_from_file_location("mulki_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cpu_is(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.mark.parametrize(
    ("cpu", "platform", "native"),
    [
        ("AVX512", "linux-x86_64", "AVX512"),
        ("AVX2", "win-amd64", "AVX2"),
        ("DEFAULT", "linux-x86_64", "DEFAULT"),
        ("SVE256", "linux-aarch64", "DEFAULT"),
        ("AVX2", "macosx-10.9-x86_64", "DEFAULT"),  # built there without special flags
    ],
)
def test_in_place_this_machines_capability_is_built(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, cpu: str, platform: str, native: str
) -> None:
    cpu_is(monkeypatch, cpu)
    assert setup_py.chosen(platform, in_place=True) == [native]
    assert setup_py.chosen(platform, in_place=False) == setup_py.capabilities(platform)
    monkeypatch.setenv("MULKI_BUILD_CAPABILITIES", "native")
    assert setup_py.chosen(platform, in_place=False) == [native]


def test_capabilities_are_chosen_by_name(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_is(monkeypatch, "DEFAULT")
    every = ["DEFAULT", "AVX2", "AVX512"]
    for wanted, names in {"all": every, "AVX512,AVX2": every[1:]}.items():
        monkeypatch.setenv("MULKI_BUILD_CAPABILITIES", wanted)
        for in_place in (True, False):
            assert setup_py.chosen("linux-x86_64", in_place) == names


@pytest.mark.parametrize("wanted", ["avx2", "AVX2,SSE4", "AVX2,", "ALL"])
def test_an_unknown_capability_is_an_error(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setenv("MULKI_BUILD_CAPABILITIES", wanted)
    with pytest.raises(SystemExit, match=f"MULKI_BUILD_CAPABILITIES: got '{wanted}', .*DEFAULT"):
        setup_py.native_build()


def test_the_kernels_can_be_left_out(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULKI_BUILD_CPP", "0")
    assert setup_py.native_build() == {}
    monkeypatch.setenv("MULKI_BUILD_CPP", "yes")
    with pytest.raises(SystemExit, match="'yes'"):
        setup_py.native_build()


def test_without_torch_the_package_is_built_without_kernels(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert setup_py.native_build() == {}
    assert "--no-build-isolation" in capsys.readouterr().err
    monkeypatch.setenv("MULKI_BUILD_CPP", "1")
    with pytest.raises(SystemExit, match="--no-build-isolation"):
        setup_py.native_build()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="clang is as good elsewhere")
def test_clang_is_refused_where_its_openmp_would_not_load(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = Path("some clang").absolute()
    compiler.write_text("#!/bin/sh\necho Debian clang version 19.1.7\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"env '{compiler}'")
    assert setup_py.native_build() == {}
    assert "set CXX=g++" in capsys.readouterr().err
    monkeypatch.setenv("MULKI_BUILD_CPP", "1")
    with pytest.raises(SystemExit, match=r"set CXX=g\+\+"):
        setup_py.native_build()
    monkeypatch.setenv("CXX", "/nowhere/at/all")
    assert setup_py.native_build()["ext_modules"]


def test_a_checkout_finds_its_own_kernels(checkout: Path) -> None:
    (checkout / "kernels" / "extra.py").write_text("here = True\n")
    # A folder that a build in place may leave behind.
    (checkout / "mulki" / "kernels" / "__pycache__").mkdir(parents=True)
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import mulki, mulki.kernels.extra\n"
        "from mulki.kernels import extra, lookup\n"
        "assert extra.here\n"
        "assert 'kernels' not in sys.modules and 'triton' not in sys.modules\n"
        "assert 'mulki.bench' not in sys.modules\n"
        "print(mulki.__file__, lookup.__file__, sep='\\n')\n"
        "from mulki.ops import loader\n"
        "print(loader.load())"
    )
    files = python("-c", code, cwd=checkout).splitlines()
    assert files[0] == str(checkout / "mulki" / "__init__.py")
    assert files[1] == str(checkout / "kernels" / "lookup.py")
    assert "not built" in files[2] and str(checkout) in files[2]


def test_another_package_named_kernels_is_found_from_a_checkout(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """That of Hugging Face, which transformers imports; it tells setuptools of a module of its."""
    other = tmp_path_factory.mktemp("other")
    (other / "kernels").mkdir()
    (other / "kernels" / "__init__.py").touch()
    (other / "kernels" / "inside.py").write_text("def write(command, name, path): print(name)\n")
    (other / "kernels-1.0.dist-info").mkdir()
    (other / "kernels-1.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 1.0\n")
    (other / "kernels-1.0.dist-info" / "entry_points.txt").write_text(
        "[egg_info.writers]\nkernels.lock = kernels.inside:write\n"
    )
    where = {"cwd": checkout, "PYTHONPATH": str(other)}
    code = "import kernels, mulki.kernels.lookup as ours\nprint(kernels.__file__, ours.__file__)"
    files = [other / "kernels" / "__init__.py", checkout / "kernels" / "lookup.py"]
    assert python("-c", code, **where).split() == list(map(str, files))
    told = python("setup.py", "-q", "egg_info", **where, MULKI_BUILD_CPP="0")
    assert "kernels.lock" in told


def test_an_installed_package_has_kernels_and_benchmark_inside(checkout: Path) -> None:
    python("setup.py", "-q", "build_py", "-d", "out", cwd=checkout, MULKI_BUILD_CPP="0")
    out = checkout / "out"
    assert [path.name for path in out.iterdir()] == ["mulki"]
    # What lies beside it is no part of it.
    (out / "stranger.py").touch()
    code = (
        "import importlib.util, mulki.kernels.lookup, mulki.bench.report\n"
        "print(mulki.kernels.lookup.__file__, mulki.bench.report.__file__, sep='\\n')\n"
        "print(importlib.util.find_spec('mulki.stranger'))"
    )
    files = [str(out / "mulki" / file) for file in ("kernels/lookup.py", "bench/report.py")]
    assert python("-c", code, cwd=out).splitlines() == [*files, "None"]
