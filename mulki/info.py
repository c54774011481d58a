"""What this installation consists of, and which kernel serves every operator.

`python -m mulki.info` prints it, `mulki.info()` returns it. The module is callable, so that
`mulki.info` is one thing however it was imported.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from mulki import __version__
from mulki.ops import backends, loader, torch_private
from mulki.runs.environment import environment

# Variables of other packages that decide which kernel runs, or how.
FOREIGN = ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "TRITON_INTERPRET")


@dataclass(frozen=True, repr=False)
class Info:
    """The parts of the report; `str` is the text."""

    versions: Mapping[str, str | None]  # None where a package is not installed
    machine: Mapping[str, str]
    environment: Mapping[str, str]  # MULKI_* and FOREIGN, where they are set
    operators: list[backends.Served]
    fallbacks: list[backends.Served]  # those that have happened in this process

    def __str__(self) -> str:
        versions = {name: version or "not installed" for name, version in self.versions.items()}
        sections = [
            ("versions", _table(versions)),
            ("machine", _table(self.machine)),
            ("environment variables", _table(self.environment or {"none": "is set"})),
            ("operators", _serving(self.operators)),
        ]
        if self.fallbacks:
            sections.append(("fallbacks so far", _serving(self.fallbacks)))
        return "\n\n".join("\n".join((title, *lines)) for title, lines in sections)

    __repr__ = __str__


def info() -> Info:
    """Versions, machine, settings, and who serves every operator and why others do not.

    Loads the C++ kernels and asks for GPUs, which importing mulki does not.
    """
    found = environment()
    packages = ("python", "torch", "triton", "open_clip", "numpy")
    versions = {name: None if found[name] is None else str(found[name]) for name in packages}
    kernels = "not loaded" if loader.load() else loader.capability_in_words()
    variables = {name: os.environ[name] for name in sorted(os.environ) if _decides(name)}
    return Info(
        versions={"mulki": _mulki(found), **versions},
        machine={
            "system": str(found["platform"]),
            "CPU": f"{found['cpu']}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": str(found["threads"]),
            "C++ kernels": kernels,
            "torch internals": f"not used: {why}" if (why := torch_private.reason()) else "used",
            "GPU": ", ".join(gpu_names()) or "none",
        },
        environment=variables,
        operators=_operators(),
        fallbacks=backends.fallbacks(),
    )


class Group(NamedTuple):
    """Operators that one backend serves, better ones being rejected for the same reasons."""

    served: backends.Served  # one of them
    where: str  # device and dtypes in words
    ops: list[str]


def grouped(served: Iterable[backends.Served]) -> list[Group]:
    """Who serves the operators, gathered for people to read."""
    dtypes: dict[tuple[str, ...], list[backends.Served]] = {}
    for one in served:
        dtypes.setdefault((one.op, one.device_type, one.who, one.reasons), []).append(one)
    groups: dict[tuple[str, ...], Group] = {}
    for (op, device, *why), found in dtypes.items():
        names = " and ".join(str(one.dtype).removeprefix("torch.") for one in found)
        group = Group(found[0], f"{device}, {names}", [])
        groups.setdefault((group.where, *why), group).ops.append(op)
    return list(groups.values())


def gpu_names() -> list[str]:
    """The GPUs that torch can use."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names += [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]
    return names + (["MPS"] if torch.backends.mps.is_available() else [])


def _operators() -> list[backends.Served]:
    try:
        return backends.report()
    except ValueError as error:
        # A report is for finding out what is wrong with the settings too.
        print(f"{error}; what follows is for auto", file=sys.stderr)
        with backends.use_backend("auto"):
            return backends.report()


def _mulki(found: Mapping[str, object]) -> str:
    if found["git_commit"] is None:
        return __version__
    modified = ", modified" if found["git_modified"] else ""
    return f"{__version__}, commit {str(found['git_commit'])[:12]}{modified}"


def _decides(variable: str) -> bool:
    return variable.startswith("MULKI_") or variable in FOREIGN


def _table(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {value}" for name, value in rows.items()]


def _serving(served: list[backends.Served]) -> list[str]:
    """One paragraph for all operators that share device, dtypes, backend and reasons."""
    lines = []
    for group in grouped(served):
        lines.append(f"  {group.where}: {group.served.who}")
        lines.append(textwrap.indent(textwrap.fill(", ".join(group.ops), 96), " " * 4))
        # A reason holds a command, which a line break would spoil.
        lines += [f"    not {name}: {why}" for name, why in group.served.rejected.items()]
    return lines


class _CallableModule(ModuleType):
    def __call__(self) -> Info:
        return info()


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    print(info())
