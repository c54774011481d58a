"""Loads the C++ kernels for the CPU, at their first use and not before.

`setup.py` builds `csrc/` for this machine's CPU capability, or once for each, into plain shared
libraries beside the package's modules. Exactly one of them is loaded: two in one process would mix
code for different instruction sets. Their names tell what must be known before: at::vec, of which
the kernels are made, has no stable ABI, and registering a kernel whose schema differs from the
operator's ends the process.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
import threading
from hashlib import sha256
from pathlib import Path

import torch

from mulki.ops.namespaces import SCALED
from mulki.ops.operators import OPERATORS

CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")  # best first
PACKAGE = Path(__file__).resolve().parent.parent

_lock = threading.Lock()
_outcome: list[str | None] = []  # of the one attempt to load, once it was made


def load() -> str | None:
    """Load the kernels into `torch.ops.mulki_cpp`; None, or why not in one sentence.

    The first call decides for the whole process. MULKI_DISABLE_CPP=1 leaves them out.
    """
    with _lock:
        if not _outcome:
            _outcome.append(load_from(PACKAGE))
        return _outcome[0]


def capability() -> str:
    """What `load` takes: the best capability that was built and that this CPU has.

    ATEN_CPU_CAPABILITY (avx512, avx2 or default), which torch reads too, asks for a lower one.
    """
    found = find(PACKAGE)
    return found[0] if found else cpu_capabilities()[0]


def capability_in_words() -> str:
    """What `load` takes, and how to build a better one where this CPU or csrc/ has more."""
    taken, best = capability(), cpu_capabilities()[0]
    found, sources = find(PACKAGE), (PACKAGE.parent / "csrc").rglob("*.*")
    if found and any(file.stat().st_mtime > found[1].stat().st_mtime for file in sources):
        return f"{taken} build, older than csrc/: {_remedy(PACKAGE)}"
    if taken == best:
        return f"{taken} build"
    return f"{taken} build, none was built for {best}: {_remedy(PACKAGE, best)}"


def library_name(capability: str) -> str:
    """The name, without suffix, of the library for this torch and these operators."""
    # An older library would call `scaled` with the wrong arguments.
    schemas = {name: operator.schema for name, operator in OPERATORS.items()} | {"scaled": SCALED}
    digest = sha256(repr(schemas).encode()).hexdigest()[:8]
    return f"_cpu_{capability.lower()}_torch{torch_version().replace('.', '_')}_{digest}"


def torch_version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def cpu_capabilities() -> tuple[str, ...]:
    """The capabilities of this CPU, best first."""
    # torch has further names, such as SVE256; there the build without special flags serves.
    best = torch.backends.cpu.get_cpu_capability()
    return CAPABILITIES[CAPABILITIES.index(best) :] if best in CAPABILITIES else ("DEFAULT",)


def built(package: Path) -> dict[str, Path]:
    """The libraries for this torch and these operators by their capabilities, best first."""
    return {
        name: path
        for name in CAPABILITIES
        for suffix in (".so", ".pyd")
        if (path := package / (library_name(name) + suffix)).is_file()
    }


def find(package: Path) -> tuple[str, Path] | None:
    """The library to load, and its capability."""
    found = built(package)
    return next(((name, found[name]) for name in cpu_capabilities() if name in found), None)


def load_from(package: Path) -> str | None:
    """`load` from any folder, and anew at every call."""
    if os.environ.get("MULKI_DISABLE_CPP", "") not in ("", "0"):
        return "MULKI_DISABLE_CPP is set: unset it to use the C++ kernels"
    found = find(package)
    if found is None:
        return _why_none(package)
    try:
        torch.ops.load_library(found[1])
    except OSError as error:
        # torch says only that it could not; the linker's message is behind it.
        return f"the C++ kernels do not load ({error.__cause__ or error}): {_remedy(package)}"
    return None


def _why_none(package: Path) -> str:
    remedy = _remedy(package)
    pattern = re.compile(r"_cpu_[a-z0-9]+_torch(\d+_\d+)_[0-9a-f]{8}\.(?:so|pyd)")
    names = [match for path in package.iterdir() if (match := pattern.fullmatch(path.name))]
    versions = {match[1].replace("_", ".") for match in names}
    if not names:
        found = compiler()
        if found is None:
            remedy = f"install a C++ compiler (none is on PATH) and {remedy}"
            return f"the C++ kernels were not built: {remedy}"
        return f"the C++ kernels were not built ({found} is on PATH): {remedy}"
    if torch_version() not in versions:
        found, this = ", ".join(sorted(versions)), torch_version()
        return f"the C++ kernels were built for torch {found}, this is torch {this}: {remedy}"
    if not (better := built(package)):
        return f"the C++ kernels were built for another version of mulki's operators: {remedy}"
    best, more = cpu_capabilities()[0], " and ".join(better)
    return f"the C++ kernels were built for {more} alone, here is {best}: {_remedy(package, best)}"


def _remedy(package: Path, capability: str = "") -> str:
    if (package.parent / "setup.py").is_file():
        chosen = f"MULKI_BUILD_CAPABILITIES={capability} " if capability else ""
        return f"run `{chosen}python setup.py build_ext --inplace` in {package.parent}"
    options = "--no-build-isolation --no-cache-dir --force-reinstall --no-deps"
    return f"reinstall from where mulki came, with `pip install {options} FOLDER_OR_URL`"


def compiler() -> str | None:
    """The C++ compiler that a build would take, None if there is none."""
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or ""
    names = (*configured.split()[:1], "c++", "g++", "clang++", "cl")
    return next((path for name in names if (path := shutil.which(name))), None)
