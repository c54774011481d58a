"""`mulki doctor`: what this installation can do, and for each problem what solves it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from mulki.errors import InputError, counted
from mulki.info import FOREIGN, gpu_names, grouped
from mulki.ops import backends, loader
from mulki.runs.environment import cores

Level = Literal["ok", "note", "problem"]

# A run keeps the weights of every task.
_FREE_DISK = 2 << 30
_SHAPE = (64, 100, 512)
_PAIRS = (64, 64, 512)


@dataclass(frozen=True)
class Finding:
    """What was found at one place.

    Args:
        topic: what was looked at.
        level: "note" is worth knowing, "problem" is worth solving.
        text: what was found.
        remedy: a command or what else to do.
    """

    topic: str
    level: Level
    text: str
    remedy: str | None = None


def examine(folder: str | os.PathLike[str] = ".", seconds: float = 10.0) -> Iterator[Finding]:
    """The findings, as they are made.

    Args:
        folder: where runs are to be written.
        seconds: for the self-test of the operators; 0 leaves it out.
    """
    yield from packages()
    yield kernels()
    yield from operators()
    yield from devices()
    yield threads()
    yield from variables()
    yield compiler()
    yield bundled()
    yield disk(folder)
    if seconds:
        yield from self_test(seconds)


def packages() -> Iterator[Finding]:
    """What mulki requires, and what is installed of it."""
    try:
        wanted = [Requirement(line) for line in metadata.requires("mulki") or ()]
    except metadata.PackageNotFoundError:
        here = Path(__file__).parents[2]
        yield Finding("packages", "note", f"mulki is not installed, only imported from {here}")
        return
    found = [f"python {sys.version.split()[0]}"]
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            text = f"{requirement.name} is not installed"
            yield Finding("packages", "problem", text, remedy)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
        else:
            text = f"{requirement.name} is {version}, wanted {requirement.specifier}"
            yield Finding("packages", "problem", text, remedy)
    yield Finding("packages", "ok", ", ".join(found))


def kernels() -> Finding:
    """The C++ kernels."""
    failed = loader.load()
    # The loader puts a remedy behind a colon.
    text, colon, last = (failed or loader.capability_in_words()).rpartition(": ")
    level: Level = "problem" if failed else "note" if colon else "ok"
    return Finding("C++ kernels", level, *((text, last) if colon else (last, None)))


def operators() -> Iterator[Finding]:
    """Who serves the operators on every device, and why better ones do not."""
    try:
        served = backends.report()
    except ValueError as error:
        yield Finding("operators", "problem", str(error), "unset MULKI_BACKEND")
        return
    for group in grouped(served):
        if group.served.device_type != "cpu" and not torch.accelerator.is_available():
            continue
        text = f"{group.where}: {group.served.who} serves {counted(len(group.ops), 'operator')}"
        level: Level = "note" if group.served.rejected else "ok"
        yield Finding("operators", level, text, group.served.reasons or None)


def devices() -> Iterator[Finding]:
    """GPUs, and one that torch cannot use."""
    if names := gpu_names():
        yield Finding("devices", "ok", ", ".join(names))
    elif _has_nvidia_card():
        built = torch.version.cuda
        why = f"torch for CUDA {built} does not find it" if built else "torch has no CUDA"
        remedy = (
            "update the driver (nvidia-smi shows the newest CUDA that it takes)"
            if built
            else "pip install --force-reinstall torch torchvision, as pytorch.org/get-started says"
        )
        yield Finding("devices", "problem", f"an NVIDIA GPU is here, but {why}", remedy)
    else:
        yield Finding("devices", "ok", "no GPU; the CPU computes")


def _has_nvidia_card() -> bool:
    return Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/nvidia0").exists()


def threads() -> Finding:
    """Whether torch takes as many threads as there are cores for this process."""
    taken, here = torch.get_num_threads(), cores()
    text = f"{counted(taken, 'thread')} on {counted(here, 'core')}"
    if taken > here:
        return Finding("threads", "problem", text, f"export OMP_NUM_THREADS={here}")
    return Finding("threads", "ok", text)


def variables() -> Iterator[Finding]:
    """Environment variables that decide what computes."""
    for name in sorted(os.environ):
        if name.startswith("MULKI_") or name in FOREIGN:
            text = f"{name}={os.environ[name]}"
            yield Finding("environment", "note", text, "docs/environment-variables.md explains it")


def compiler() -> Finding:
    """A C++ compiler, for building the kernels and for torch.compile."""
    found = loader.compiler()
    if found:
        return Finding("compiler", "ok", found)
    text = "no C++ compiler: the kernels cannot be built anew, torch.compile does not work"
    return Finding("compiler", "note", text, "install g++ or clang++, or set CXX")


def bundled() -> Finding:
    """The bundled images and the start model."""
    from mulki.clip.models import BUNDLED, load
    from mulki.data import load_sequence

    try:
        tasks = load_sequence(["embedded"])
        load(BUNDLED)
    except InputError as error:
        text, _, remedy = str(error).rpartition("; ")
        return Finding("bundled data", "problem", text or remedy, remedy)
    except Exception as error:
        # As where torchvision was built for another torch.
        text = f"cannot be loaded ({type(error).__name__}: {error})"
        remedy = "pip install --force-reinstall torch torchvision open_clip_torch"
        return Finding("bundled data", "problem", text, remedy)
    images = sum(len(task.train) + len(task.test) for task in tasks)
    text = f"{len(tasks)} tasks, {images} images, start model {BUNDLED}"
    return Finding("bundled data", "ok", text)


def disk(folder: str | os.PathLike[str]) -> Finding:
    """Free space where runs are written."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        remedy = "pass mulki run --logs a folder that can be written"
        return Finding("disk", "problem", f"{place} cannot be written", remedy)
    text = f"{free / 2**30:.1f} GiB free at {place}"
    if free < _FREE_DISK:
        remedy = "free some, or pass mulki run --logs a folder on another disk"
        return Finding("disk", "problem", text, remedy)
    return Finding("disk", "ok", text)


def self_test(seconds: float) -> Iterator[Finding]:
    """Values and gradients of every operator against float64, and its time beside plain PyTorch.

    Args:
        seconds: for all of it, on a machine with nothing else to do.
    """
    from mulki.bench.cases import OPERATORS, PAIRED, Case
    from mulki.bench.point import measure_case

    gpu = torch.accelerator.current_accelerator() if gpu_names() not in ([], ["MPS"]) else None
    device = "cpu" if gpu is None else gpu.type
    for operator in OPERATORS:
        case = Case(operator, *(_PAIRS if operator in PAIRED else _SHAPE), "float32", device)
        # Checks take as long again as the timing of the two ways.
        each = seconds / len(OPERATORS) / 4
        results = measure_case(case, ("eager", "mulki"), ("both",), each)
        ours = next(result for result in results if result.provider == "mulki")
        what = f"{operator} at {case.shape} on {device}"
        if ours.status != "timed":
            text = f"{what}: {'; '.join(ours.notes)}"
            remedy = "MULKI_BACKEND=reference computes it in plain PyTorch; please report this"
            yield Finding("self-test", "problem", text, remedy)
            continue
        ratio = ours.metrics["speedup_over_eager"].median
        error = ours.metrics["gradient_error"].median
        text = f"{what}: right (gradients to {error:.0e}), {ratio:.2f} times plain PyTorch's speed"
        yield Finding("self-test", "ok" if ratio >= 1 else "note", text)
