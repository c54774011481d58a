"""sdist, wheels and an installation in place, each in an environment that holds nothing else.

Torch and the other dependencies are lent by the environment of the tests, so no network is used.
One library is compiled, without optimisation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from mulki import __version__
from tests import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.name == "nt", reason="paths of an environment are those of Unix"),
]
COMPILER = shutil.which("g++")
LOSS = """
import sys
import torch
import torch.nn.functional as F
import mulki
from mulki import Similarity, functional
from mulki.ops import loader
x, w = (F.normalize(torch.randn(n, 16), dim=1).requires_grad_() for n in (6, 5))
target = torch.arange(6) % 5
loss = functional.prototype_cross_entropy(Similarity(x, w, 10.0), target)
wanted = F.cross_entropy(10.0 * x @ w.T, target)
torch.testing.assert_close(loss, wanted)
torch.testing.assert_close(torch.autograd.grad(loss, w), torch.autograd.grad(wanted, w))
import mulki.bench.run, mulki.kernels
from mulki.report.pages import page_file
assert page_file("comparison.html")
print(mulki.__file__, mulki.__version__, loader.load(), sep="\\n")
"""


def run(*words: str | Path, cwd: Path, without: tuple[str, ...] = (), **variables: str) -> str:
    names = ("MULKI_BUILD_CPP", "MULKI_BUILD_CAPABILITIES", "MULKI_DISABLE_CPP", "PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if k not in (*names, *without)} | variables
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pip(python: str | Path, *words: str | Path, cwd: Path, **variables: str) -> str:
    pip = (sys.executable, "-m", "pip", "--python", python)
    quiet = ("--no-index", "--disable-pip-version-check", "--no-cache-dir")
    return run(*pip, *words, *quiet, cwd=cwd, **variables)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that are packed, as they are in a fresh checkout."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "_cpu_*", "*.csv")
    for name in ("mulki", "kernels", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    run(sys.executable, "setup.py", "-q", "sdist", cwd=source, MULKI_BUILD_CPP="0")
    (packed,) = (source / "dist").glob("*.tar.gz")
    assert packed.name == f"mulki-{__version__}.tar.gz"
    return packed


def environment(folder: Path) -> Path:
    """A new environment without pip; its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    # As a path and not as a folder of packages: its own .pth files, among them that of an
    # installation of mulki in place, are not read.
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages(folder) / "lent.pth").write_text("\n".join(lent) + "\n")
    return python


def packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def installed(python: Path, *what: str | Path, **variables: str) -> list[str]:
    """Install, compute a loss from an empty folder, and return what that says."""
    options = ("--no-deps", "--no-build-isolation")
    pip(python, "install", *options, *what, cwd=python.parents[2], **variables)
    empty = python.parents[1] / "empty"
    empty.mkdir()
    assert run(python.parent / "mulki", "--version", cwd=empty).strip() == f"mulki {__version__}"
    return run(python, "-c", LOSS, cwd=empty, OMP_NUM_THREADS="1").splitlines()


def wheel(sdist: Path, folder: Path, python: str | Path = sys.executable, **variables: str) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    pip(python, "wheel", sdist, *options, cwd=sdist.parent, **variables)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def any_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel for platforms that have no other."""
    return wheel(sdist, tmp_path_factory.mktemp("any"), MULKI_BUILD_CPP="0")


@pytest.mark.skipif(COMPILER is None, reason="no compiler")
def test_a_wheel_with_kernels_goes_before_the_one_for_any_platform(
    sdist: Path, any_wheel: Path, tmp_path: Path
) -> None:
    short = {"MULKI_BUILD_CAPABILITIES": "DEFAULT", "MULKI_BUILD_FLAGS": "-O0"}
    made = wheel(sdist, tmp_path / "made", CXX=str(COMPILER), MULKI_BUILD_CPP="1", **short)
    assert made.name.startswith(f"mulki-{__version__}-py3-none-")
    python = environment(tmp_path / "clean")
    found = (f"--find-links={folder}" for folder in (made.parent, any_wheel.parent, sdist.parent))
    file, version, loaded = installed(python, "--ignore-installed", "mulki", *found)
    assert Path(file).is_relative_to(tmp_path / "clean") and version == __version__
    assert loaded == "None"


def test_the_wheel_for_any_platform_has_no_kernels(
    any_wheel: Path, sdist: Path, tmp_path: Path
) -> None:
    assert any_wheel.name == f"mulki-{__version__}-py3-none-any.whl"
    files = zipfile.ZipFile(any_wheel).namelist()
    assert not [name for name in files if name.endswith((".so", ".pyd", ".cpp", ".h"))]
    python = environment(tmp_path / "clean")
    found = (f"--find-links={folder}" for folder in (any_wheel.parent, sdist.parent))
    *_, loaded = installed(python, "--ignore-installed", "mulki", *found)
    assert "the C++ kernels were not built" in loaded
    info = run(python, "-m", "mulki.info", cwd=tmp_path)
    assert loaded in info and "cpu, float32 and bfloat16: chunked" in info


def test_a_wheel_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    missing = str(tmp_path / "nothing" / "c++")
    made = wheel(sdist, tmp_path / "made", CXX=missing, CC=missing, PATH=str(tmp_path / "nothing"))
    file, version, loaded = installed(environment(tmp_path / "clean"), made)
    assert Path(file).is_relative_to(tmp_path / "clean") and version == __version__
    assert "the C++ kernels were not built" in loaded


def test_an_installation_in_place_is_a_path(source: Path, tmp_path: Path) -> None:
    """Type checkers follow a path to the checkout, and no hook of imports."""
    python = environment(tmp_path / "clean")
    file, *_ = installed(python, "--editable", source, MULKI_BUILD_CPP="0")
    assert Path(file) == source / "mulki" / "__init__.py"
    found = [path.read_text().strip() for path in packages(tmp_path / "clean").glob("*mulki*.pth")]
    assert found == [str(source)]
