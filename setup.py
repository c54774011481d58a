"""Packages, package data and the C++ kernels. The project's metadata is in pyproject.toml.

The kernels are built against the torch that is importable here, so pip needs --no-build-isolation.
Without torch, without a compiler or where they do not compile, the package installs without them
and says so. Environment variables:

  MULKI_BUILD_CPP           0 leaves the kernels out; 1 makes a failed build an error
  MULKI_BUILD_CAPABILITIES  which CPUs to build for, see `chosen`
  MULKI_BUILD_FLAGS         further flags for the compiler and the linker
  MAX_JOBS                  compilers at a time
  DEBUG                     1 builds with -O0 -g
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from glob import glob
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py as setuptools_build_py

# The package whose folder lies outside mulki/; in a checkout mulki/__init__.py says where.
MAPPED = {"mulki.kernels": "kernels"}
PACK_FILES = ("*.tar.gz", "*.json", "*.safetensors", "*.md")

# The names and flags of PyTorch's own builds of its kernels (cmake/Codegen.cmake), and F16C, which
# at::vec uses and every CPU with AVX2 has. No -march=native: the library may move to another CPU.
INSTRUCTIONS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mfma", "-mf16c"),
    ],
}
# PyTorch's own builds for ARM define it, and its libraries there export SLEEF. Without it at::vec
# calls libm for the exponential of each lane.
SLEEF = "-DAT_BUILD_ARM_VEC256_WITH_SLEEF"
X86_64 = ("linux-x86_64", "win-amd64")


def capabilities(platform: str) -> list[str]:
    """The CPU capabilities there are; `platform` is that of `sysconfig.get_platform()`."""
    return list(INSTRUCTIONS) if platform in X86_64 else ["DEFAULT"]


def chosen(platform: str, in_place: bool) -> list[str]:
    """The capabilities to build for: of this machine in place, all for a wheel.

    MULKI_BUILD_CAPABILITIES goes before: `native`, `all` or names joined by commas.
    """
    possible = capabilities(platform)
    wanted = os.environ.get("MULKI_BUILD_CAPABILITIES", "") or ("native" if in_place else "all")
    if wanted == "all":
        return possible
    if wanted == "native":
        from mulki.ops.loader import cpu_capabilities

        return [next(name for name in cpu_capabilities() if name in possible)]
    names = wanted.split(",")
    if not set(names) <= set(possible):
        raise SystemExit(
            f"MULKI_BUILD_CAPABILITIES: got {wanted!r}, wanted native (this machine's), all, or "
            f"names joined by commas, of {', '.join(possible)}"
        )
    return [name for name in possible if name in names]


def compile_flags(capability: str, platform: str, openmp: bool, debug: bool) -> list[str]:
    defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    # The sources are C++20; torch itself asked for C++17 in older versions.
    if platform.startswith("win"):
        arch = [] if capability == "DEFAULT" else [f"/arch:{capability}"]
        parallel = ["/openmp"] if openmp else []
        optimise = ["/Od", "/Z7"] if debug else ["/O2"]
        return ["/std:c++20", *optimise, *arch, *parallel, *defines]
    parallel = ["-fopenmp"] if openmp else []
    if platform.startswith("macosx"):
        # Apple's clang knows OpenMP only behind its preprocessor.
        parallel = [word for flag in parallel for word in ("-Xpreprocessor", flag)]
    # On macOS torch is for ARM alone, and a Python for both CPUs names none of them.
    if platform == "linux-aarch64" or platform.startswith("macosx"):
        defines.append(SLEEF)
    # -g0 against the -g of Python's own flags, which makes the libraries ten times larger.
    optimise = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    return [
        *("-std=c++20", *optimise, "-fvisibility=hidden"),
        # A fused multiply-subtract where none is written would leave a gradient to a student that
        # equals its teacher.
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",  # torch's headers have many that are not for GCC
        *(*INSTRUCTIONS[capability], *parallel, *defines),
    ]


def link_libraries(platform: str) -> list[str]:
    # No OpenMP library: its symbols come from the one that libtorch_cpu has loaded. Linking would
    # bring in a second one with a thread pool of its own on Linux. On macOS it would take down the
    # path at which torch's copy was built, which is on no other machine.
    return ["c10", "torch_cpu", *(["sleef"] if platform.startswith("win") else [])]


class WrongCompiler(Exception):
    """A compiler whose libraries would be built and then not load."""


def check_compiler(platform: str, openmp: bool) -> None:
    """Refuse clang on Linux: its OpenMP code calls libomp, and torch has loaded GCC's libgomp."""
    from torch.utils.cpp_extension import get_cxx_compiler

    if not platform.startswith("linux") or not openmp:
        return
    compiler = get_cxx_compiler()
    try:
        asked = [*shlex.split(compiler), "--version"]
        version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    except OSError:
        return  # no compiler: that is for the build to say
    if "clang" in version:
        raise WrongCompiler(
            f"C++ kernels were not built: the compiler {compiler} is clang, whose OpenMP code does "
            "not run on the library that torch brings on Linux; set CXX=g++"
        )


def sources(suffix: str) -> list[str]:
    return sorted(glob(f"csrc/**/*{suffix}", recursive=True))


def extensions() -> list[Extension]:
    """One plain shared library for each capability, named as `mulki.ops.loader` looks for it."""
    import torch
    from torch.utils import cpp_extension

    sys.path.insert(0, os.getcwd())
    from mulki.ops.loader import library_name

    platform = sysconfig.get_platform()
    chosen(platform, in_place=False)  # a bad value is an error before anything is compiled
    # at::parallel_for is compiled here, and is a plain loop without torch's own OpenMP flag.
    openmp = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
    check_compiler(platform, openmp)
    debug = os.environ.get("DEBUG") == "1"
    further = shlex.split(os.environ.get("MULKI_BUILD_FLAGS", ""))
    return [
        Extension(
            f"mulki.{library_name(capability)}",
            sources=sources(".cpp"),
            depends=sources(".h"),
            include_dirs=[os.path.abspath("csrc"), *cpp_extension.include_paths()],
            library_dirs=cpp_extension.library_paths(),
            libraries=link_libraries(platform),
            extra_compile_args=[
                *compile_flags(capability, platform, openmp, debug),
                *further,
            ],
            extra_link_args=further,
            language="c++",
            optional=True,
        )
        for capability in capabilities(platform)
    ]


def capability_of(ext: Extension) -> str:
    return ext.name.split("_")[2].upper()


def commands(required: bool) -> dict[str, type]:
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension

    class build_ext(BuildExtension.with_options(no_python_abi_suffix=True)):
        def finalize_options(self) -> None:
            super().finalize_options()
            # As torch does where there is ninja, which compiles only what has changed. Without it
            # all is compiled again: a library newer than its sources may be of other flags.
            self.force = True
            # Only now is it known whether this is an editable install, which sets `inplace`.
            wanted = chosen(sysconfig.get_platform(), bool(self.inplace))
            self.extensions = [ext for ext in self.extensions if capability_of(ext) in wanted]

        def run(self) -> None:
            self.wanted = self.extensions
            self.built: list[Extension] = []
            self.problems: dict[str, list[str]] = {}
            # One library after another, each with MAX_JOBS compilers: build_extension changes self.
            self.parallel = None
            in_place = self.inplace
            try:
                super().run()
            except Exception as error:
                self.problems[str(error)] = ["all"]
            self.extensions = self.built
            self.remove_others(in_place)
            if self.problems:
                lines = [f"{', '.join(names)}: {why}" for why, names in self.problems.items()]
                give_up(f"C++ kernels were not built; {'; '.join(lines)}", required)

        def build_extension(self, ext: Extension) -> None:
            # A folder of object files for each capability: the sources are the same.
            build_temp = self.build_temp
            self.build_temp = os.path.join(build_temp, capability_of(ext))
            try:
                super().build_extension(ext)
                self.built.append(ext)
            except Exception as error:
                self.problems.setdefault(str(error), []).append(ext.name)
            finally:
                self.build_temp = build_temp

        def remove_others(self, in_place: bool) -> None:
            """Remove libraries of earlier builds, which would end up in the wheel or be loaded.

            In place, those of other capabilities stay if they are newer than the sources.
            """
            found = glob(os.path.join(self.build_lib, "mulki", "_cpu_*"))
            extensions = self.distribution.ext_modules
            names = {os.path.basename(self.get_ext_filename(ext.name)): ext for ext in extensions}
            others: set[str] = set()
            if in_place:
                # Those of another torch may belong to another environment.
                _, _, _, major, minor, _ = extensions[0].name.split("_")
                found += glob(os.path.join("mulki", f"_cpu_*_{major}_{minor}_*"))
                others = {name for name, ext in names.items() if ext not in self.wanted}
            kept = {name for name, ext in names.items() if ext in self.built}
            changed = max(map(os.path.getmtime, [*extensions[0].sources, *extensions[0].depends]))
            for library in found:
                name = os.path.basename(library)
                stays = name in others and os.path.getmtime(library) > changed
                if name not in kept and not stays:
                    os.remove(library)

    class platform_wheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            # The libraries depend on the platform and on torch, and not on Python.
            return "py3", "none", super().get_tag()[2]

    return {"build_ext": build_ext, "bdist_wheel": platform_wheel}


class build_py(setuptools_build_py):
    def run(self) -> None:
        # Modules of an earlier build, which the sources may no longer have.
        for old in glob(os.path.join(self.build_lib, "mulki", "**", "*.py"), recursive=True):
            os.remove(old)
        super().run()


def give_up(reason: str, required: bool) -> None:
    if required:
        raise SystemExit(f"mulki: {reason}")
    rule = "*" * 100
    print(
        f"\n{rule}\nmulki: {reason}\n"
        f"The package works without; its operators then run in plain PyTorch.\n{rule}\n",
        file=sys.stderr,
        flush=True,
    )


def native_build() -> dict[str, Any]:
    """What `setup` is told of the C++ kernels."""
    wanted = os.environ.get("MULKI_BUILD_CPP", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MULKI_BUILD_CPP: got {wanted!r}, wanted 0 (leave out) or 1 (insist)")
    if wanted == "0" or not sources(".cpp"):
        return {}
    # Who calls build_ext by name wants an exit status that tells.
    required = wanted == "1" or "build_ext" in sys.argv
    try:
        return {"ext_modules": extensions(), "cmdclass": commands(required)}
    except WrongCompiler as error:
        give_up(str(error), required)
        return {}
    except Exception as error:  # a torch that is too old fails in many ways
        give_up(
            f"the C++ kernels are left out, for they are built against the torch at hand: {error}. "
            "Install torch, ninja and setuptools>=77, then mulki with "
            "pip install --no-build-isolation",
            required,
        )
        return {}


if __name__ == "__main__":
    # A mapped folder would need a hook of imports, which type checkers do not follow. In a checkout
    # mulki/__init__.py finds it itself.
    mapped = {} if "editable_wheel" in sys.argv else MAPPED
    native = native_build()
    setup(
        packages=[*find_packages(include=["mulki", "mulki.*"]), *mapped],
        package_dir={"": "."} | mapped,
        package_data={
            "mulki": [
                "py.typed",
                "data/published/rows.yaml",
                "data/published/sets/*.yaml",
                "data/published/manifests/*.tsv",
                "report/page/*",
                *(f"data/embedded/**/{file}" for file in PACK_FILES),
            ]
        },
        cmdclass={"build_py": build_py} | native.pop("cmdclass", {}),
        **native,
    )
