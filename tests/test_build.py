"""setup.py, and where what it builds and packs is found; nothing is compiled here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from setuptools import Distribution, Extension
from setuptools.command.egg_info import FileList

from mulki.ops import loader
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


@pytest.mark.parametrize(
    ("platform", "capabilities"),
    [
        ("linux-x86_64", {"DEFAULT", "AVX2", "AVX512"}),
        ("win-amd64", {"DEFAULT", "AVX2", "AVX512"}),
        ("linux-aarch64", {"DEFAULT"}),
        ("macosx-11.0-arm64", {"DEFAULT"}),
        ("macosx-10.9-x86_64", {"DEFAULT"}),
    ],
)
def test_capabilities(setup_py: ModuleType, platform: str, capabilities: set[str]) -> None:
    assert set(setup_py.capabilities(platform)) == capabilities <= set(loader.CAPABILITIES)


@pytest.mark.parametrize("capability", loader.CAPABILITIES)
def test_flags_name_the_capability_and_ask_for_its_instructions(
    setup_py: ModuleType, capability: str
) -> None:
    flags = setup_py.compile_flags(capability, "linux-x86_64", openmp=True, debug=False)
    assert {"-std=c++20", "-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability}"} <= set(flags)
    assert [flag for flag in flags if flag.startswith("-DCPU_CAPABILITY_")] == [
        f"-DCPU_CAPABILITY_{capability}"
    ]
    assert ("-mavx2" in flags) == (capability == "AVX2")
    assert ("-mavx512f" in flags) == (capability == "AVX512")
    assert ("-mf16c" in flags) == (capability != "DEFAULT")
    assert not {"-march=native", "-ffast-math"} & set(flags)


def test_flags_of_other_platforms_and_of_debug_builds(setup_py: ModuleType) -> None:
    flags = setup_py.compile_flags("AVX2", "win-amd64", openmp=True, debug=False)
    assert {"/std:c++20", "/O2", "/arch:AVX2", "/openmp"} <= set(flags)
    assert not [flag for flag in flags if flag.startswith(("-m", "-f", "-O"))]
    assert not any("openmp" in flag for flag in setup_py.compile_flags("AVX2", "win-amd64", 0, 0))
    mac = setup_py.compile_flags("DEFAULT", "macosx-11.0-arm64", openmp=True, debug=False)
    assert mac[mac.index("-fopenmp") - 1] == "-Xpreprocessor"
    for platform in ("linux-aarch64", "macosx-11.0-arm64", "linux-x86_64", "win-amd64"):
        assert setup_py.link_libraries(platform)[:2] == ["c10", "torch_cpu"]
        assert not {"omp", "gomp"} & set(setup_py.link_libraries(platform))
    debug = setup_py.compile_flags("DEFAULT", "linux-aarch64", openmp=False, debug=True)
    assert {"-O0", "-g"} <= set(debug) and not {"-O3", "-fopenmp"} & set(debug)


@pytest.mark.parametrize(
    ("platform", "defined"),
    [
        *(("linux-aarch64", True), ("macosx-14.0-arm64", True), ("macosx-10.13-universal2", True)),
        *(("linux-x86_64", False), ("win-amd64", False)),
    ],
)
def test_exponentials_on_arm_are_those_of_sleef(
    setup_py: ModuleType, platform: str, defined: bool
) -> None:
    flags = setup_py.compile_flags("DEFAULT", platform, openmp=True, debug=False)
    assert ("-DAT_BUILD_ARM_VEC256_WITH_SLEEF" in flags) == defined


def test_each_library_has_the_name_that_is_looked_for(setup_py: ModuleType) -> None:
    built = setup_py.native_build()
    assert {ext.name for ext in built["ext_modules"]} == {
        f"mulki.{loader.library_name(name)}"
        for name in setup_py.capabilities(setup_py.sysconfig.get_platform())
    }
    for ext in built["ext_modules"]:
        assert ext.sources == ["csrc/part/one.cpp"]
        assert "torch_python" not in ext.libraries


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


@pytest.fixture
def build(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a command of setuptools on a package, with a compiler that makes empty libraries."""
    from torch.utils.cpp_extension import BuildExtension

    def compile_nothing(self: Any, ext: Extension) -> None:
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def each(self: Any) -> None:
        for ext in self.extensions:
            self.build_extension(ext)

    monkeypatch.setattr(BuildExtension, "build_extension", compile_nothing)
    monkeypatch.setattr(BuildExtension, "build_extensions", each)
    Path("mulki").mkdir()
    Path("mulki/__init__.py").touch()

    def run_command(*command: str) -> None:
        parts = {"name": "mulki", "version": "0", "packages": ["mulki"]}
        distribution = Distribution({**parts, **setup_py.native_build()})
        distribution.script_name, distribution.script_args = "setup.py", list(command)
        assert distribution.parse_command_line()
        distribution.run_commands()

    return run_command


def built(paths: Iterable[Path]) -> set[str]:
    return {path.name.split("_")[2] for path in paths if path.name.startswith("_cpu_")}


x86_64 = pytest.mark.skipif(
    sysconfig.get_platform() not in ("linux-x86_64", "win-amd64"), reason="has one capability"
)


@x86_64
def test_a_build_in_place_is_for_this_machine_and_a_wheel_for_all(
    build: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_is(monkeypatch, "AVX2")
    for command in (("build_ext", "--inplace"), ("editable_wheel",)):
        build(*command)
        assert built(Path("mulki").iterdir()) == {"avx2"}
        for library in Path("mulki").glob("_cpu_*"):
            library.unlink()
    build("bdist_wheel")
    (wheel,) = Path("dist").glob("mulki-0-py3-none-*.whl")
    assert built(map(Path, zipfile.ZipFile(wheel).namelist())) == {"default", "avx2", "avx512"}
    assert built(Path("mulki").iterdir()) == set()

    # What the earlier build has left is not packed.
    monkeypatch.setenv("MULKI_BUILD_CAPABILITIES", "native")
    build("bdist_wheel", "--bdist-dir", "second")
    assert built(map(Path, zipfile.ZipFile(wheel).namelist())) == {"avx2"}


@x86_64
def test_a_build_in_place_keeps_other_capabilities_of_the_same_sources(
    build: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_is(monkeypatch, "AVX512")
    os.utime("csrc/part/one.cpp", (1, 1))
    build("build_ext", "--inplace")
    (library,) = Path("mulki").glob("_cpu_*")
    stem = library.stem.rpartition("_")[0]
    other_operators = library.with_stem(f"{stem}_00000000")
    other_torch = library.with_stem("_cpu_avx512_torch1_99_00000000")
    other_operators.touch()
    other_torch.touch()
    monkeypatch.setenv("MULKI_BUILD_CAPABILITIES", "DEFAULT,AVX2")
    build("build_ext", "--inplace")
    assert not other_operators.exists() and other_torch.exists()
    other_torch.unlink()
    assert built(Path("mulki").iterdir()) == {"default", "avx2", "avx512"}

    # A library with another capability's old code would be loaded with ATEN_CPU_CAPABILITY.
    os.utime("csrc/part/one.cpp")
    for path in Path("mulki").glob("_cpu_*"):
        os.utime(path, (2, 2))
    monkeypatch.setenv("MULKI_BUILD_CAPABILITIES", "AVX2")
    build("build_ext", "--inplace")
    assert built(Path("mulki").iterdir()) == {"avx2"}


def test_further_flags_come_last(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULKI_BUILD_FLAGS", "-O1 '-DNAME=a b'")
    for ext in setup_py.native_build()["ext_modules"]:
        assert ext.extra_compile_args[-2:] == ["-O1", "-DNAME=a b"] == ext.extra_link_args


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


def test_a_failed_build_is_an_error_only_where_kernels_are_required(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.cpp_extension import BuildExtension

    def fail(self: object, ext: Extension) -> None:
        raise RuntimeError("Error compiling objects")

    monkeypatch.setattr(BuildExtension, "build_extension", fail)
    possible = setup_py.capabilities(sysconfig.get_platform())
    names = [f"mulki._cpu_{name.lower()}_torch2_0_00000000" for name in possible]
    stale = [Path("build/mulki") / f"{name.removeprefix('mulki.')}.so" for name in names]
    stale[0].parent.mkdir(parents=True)
    for required in (False, True):
        for path in stale:
            path.touch()
        extensions = [Extension(name, ["csrc/part/one.cpp"], optional=True) for name in names]
        distribution = Distribution({"name": "mulki", "ext_modules": extensions})
        command = setup_py.commands(required)["build_ext"](distribution)
        command.build_lib = "build"
        command.ensure_finalized()
        if required:
            with pytest.raises(SystemExit, match="Error compiling objects"):
                command.run()
        else:
            command.run()
            told = capsys.readouterr().err
            assert all(name in told for name in names)
            assert command.get_outputs() == []
        assert not any(path.exists() for path in stale)


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


def test_a_checkout_is_the_one_that_is_run_and_not_the_one_that_is_installed(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    for folder in ("mulki", "kernels"):
        shutil.copytree(checkout / folder, other / folder)
    # It is found by a path, as installations in place are, and by a hook, as older ones were.
    places = {
        "mulki": str(other / "mulki" / "__init__.py"),
        "mulki.kernels.lookup": str(other / "kernels" / "lookup.py"),
    }
    hook = (
        "import importlib.util, sys\n"
        f"places = {places!r}\n"
        "class Hook:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        file = places.get(name)\n"
        "        return file and importlib.util.spec_from_file_location(name, file)\n"
        "sys.meta_path.append(Hook)\n"
    )
    code = (
        f"{hook}import mulki\nfrom mulki.kernels import lookup\n"
        "print(mulki.__file__, lookup.__file__, sep='\\n')"
    )
    for cwd, path in ((checkout, str(other)), (checkout, ""), (other, str(checkout))):
        files = python("-c", code, cwd=cwd, PYTHONPATH=path).splitlines()
        assert files == [str(cwd / "mulki" / "__init__.py"), str(cwd / "kernels" / "lookup.py")]


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


def test_without_ninja_a_library_of_other_flags_does_not_stay(setup_py: ModuleType) -> None:
    command = setup_py.commands(required=False)["build_ext"](Distribution({"ext_modules": []}))
    command.use_ninja = False
    command.finalize_options()
    assert command.force


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


@pytest.mark.parametrize(
    ("system", "machine", "comes"),
    [
        *(("Linux", "x86_64", True), ("Linux", "aarch64", True), ("Linux", "ppc64le", False)),
        *(("Darwin", "arm64", False), ("Windows", "AMD64", False)),
    ],
)
def test_make_test_brings_triton_where_it_has_wheels(
    system: str, machine: str, comes: bool
) -> None:
    """Its interpreter and compilers would else be left out of CI, without a failure."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    with (ROOT / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["test"]
    (triton,) = [one for one in map(Requirement, extra) if one.name == "triton"]
    assert triton.marker is not None and "3.6.0" in triton.specifier
    here = {"platform_system": system, "platform_machine": machine}
    assert triton.marker.evaluate(here) == comes


def test_the_sdist_has_the_scripts_that_the_documentation_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    files = FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        files.process_template_line(line)
    scripts = {".ci/run", "benchmarks/gpu.sh", "examples/slurm.sh", "tests/csrc/sanitize"}
    assert scripts | {"tests/csrc/cross-arm"} <= set(files.files)
