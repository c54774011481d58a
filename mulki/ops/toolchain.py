"""What Triton needs beside torch: a C compiler and Python.h, for the launchers of kernels.

Images of GPU machines may lack both, and every kernel would fail for it, one after another.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def missing() -> list[str]:
    """What is not there, each with the remedy; nothing is imported for it."""
    if sys.platform == "win32":
        return []  # where Triton has a compiler of its own
    return [problem for problem in (_no_compiler(), _no_header()) if problem]


def _no_compiler() -> str | None:
    asked = os.environ.get("CC")
    if asked is not None:  # Triton takes it as it is
        if shutil.which(asked):
            return None
        return f"CC is {asked!r}, which is no program; name a C compiler, or unset it"
    if shutil.which("gcc") or shutil.which("clang"):
        return None
    return (
        "there is no C compiler (gcc or clang), with which Triton builds its launchers: "
        "apt-get install gcc, or conda install gcc, or name one by CC"
    )


def _no_header() -> str | None:
    scheme = sysconfig.get_default_scheme()
    # As Triton asks for it: Debian's own scheme has another folder.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    folder = Path(sysconfig.get_paths(scheme=scheme)["include"])
    if (folder / "Python.h").is_file():
        return None
    version = "{}.{}".format(*sys.version_info)
    return (
        f"there is no Python.h in {folder}, which Triton's launchers include: apt-get install "
        f"python{version}-dev (dnf: python3-devel), or take a Python that has it, as conda's and "
        f"uv's have"
    )
