"""Triton kernels compiled ahead of time, without a GPU: registers, memory and instructions.

The figures are read from what Triton's compilers leave behind: cuobjdump's account of the cubin,
the metadata of AMD's assembly, and the instructions in PTX or in that assembly.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context

import triton
from triton import knobs
from triton.compiler import ASTSource

from mulki.kernels.entries import TARGETS, Entry, entries

_MATRIX_INSTRUCTION = re.compile(
    r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]*|\bv_s?mfmac?_\w+"
)
# Modifiers that every instruction has; without them a name says shape and numbers.
_EVERYWHERE = re.compile(r"\.(?:sync|aligned|row|col|cta_group::1)(?=\.)")
_DOT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
BATCH = 8


@dataclass(frozen=True)
class Compiled:
    """An entry, and what one program of it takes."""

    architecture: str
    numbers: str
    operator: str
    kernel: str
    tile: str
    identity: str
    warps: int
    stages: int
    registers: int  # of a thread; on AMD vector registers
    stack: int  # bytes of a thread in memory, where spilled registers go
    spills: int | None  # vector registers spilled; a cubin does not tell
    shared: int  # bytes
    tensor_memory: int  # columns of 128 lanes of 4 bytes
    dots: int  # tl.dot in the kernel
    split_dots: int  # those that ask for tf32x3
    products: int  # what the compiler made of the dots; more where it peels loops
    instructions: str  # those of tensor cores, with how often they are written

    @property
    def name(self) -> str:
        where = f"{self.architecture} {self.numbers} {self.operator} {self.kernel} {self.tile}"
        return f"{where.rstrip()} ({self.warps} warps, {self.stages} stages)"


def compile_entry(entry: Entry) -> Compiled:
    """Compile one entry, or take it from Triton's cache.

    Raises what the compilers raise.
    """
    source = ASTSource(entry.kernel, entry.signature, entry.constants, entry.attributes)
    done = triton.compile(source, target=TARGETS[entry.architecture], options=entry.options)
    cubin = done.asm.get("cubin")
    text = done.asm["amdgcn"] if cubin is None else done.asm["ptx"]
    registers, stack, spills = _amd_usage(text) if cubin is None else _nvidia_usage(cubin)
    instructions = Counter(_EVERYWHERE.sub("", x) for x in _MATRIX_INSTRUCTION.findall(text))
    ttir = done.asm["ttir"]
    return Compiled(
        architecture=entry.architecture,
        numbers=entry.numbers,
        operator=entry.operator,
        kernel=entry.kernel.__name__,
        tile=entry.tile,
        identity=entry.identity,
        warps=entry.options["num_warps"],
        stages=entry.options["num_stages"],
        registers=registers,
        stack=stack,
        spills=spills,
        shared=done.metadata.shared,
        tensor_memory=getattr(done.metadata, "tmem_size", None) or 0,
        dots=len(_DOT.findall(ttir)),
        split_dots=len(re.findall(r"\btt\.dot .*inputPrecision = tf32x3\b", ttir)),
        products=len(_DOT.findall(done.asm["ttgir"])),
        instructions="; ".join(f"{count} {name}" for name, count in sorted(instructions.items())),
    )


def _nvidia_usage(cubin: bytes) -> tuple[int, int, None]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump: wanted the resources of one kernel, got {told!r}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local, None


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    def number(name: str) -> int:
        found = re.findall(rf"^\s*\.{name}:\s*(\d+)\s*$", assembly, re.MULTILINE)
        if len(found) != 1:
            raise RuntimeError(f"{name}: wanted it once in the metadata, got {found}")
        return int(found[0])

    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    registers, stack, spills = map(number, names)
    return registers, stack, spills


def compile_all(
    wanted: Iterable[Entry], full: bool = False, processes: int | None = None
) -> list[Compiled]:
    """Compile entries of `entries(..., full)`, what is alike once, in processes of their own.

    Raises:
        RuntimeError: some do not compile; it names each, with the last line of the reason.
    """
    wanted = list(wanted)
    # Strict float32 on AMD is ieee, and kernels without products do not ask for the numbers.
    first = {_likeness(entry): entry for entry in reversed(wanted)}
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in first.values():
        groups.setdefault((entry.architecture, entry.numbers), []).append(entry.identity)
    context = get_context("spawn")
    with ProcessPoolExecutor(processes or _processors(), mp_context=context) as pool:
        batches = [
            pool.submit(_compile_batch, *group, full, identities[start : start + BATCH])
            for group, identities in groups.items()
            for start in range(0, len(identities), BATCH)
        ]
        outcomes = [one for batch in batches for one in batch.result()]
    done = {(one.architecture, one.identity): one for one in all_compiled(outcomes)}
    return [_as(entry, done[_likeness(entry)]) for entry in wanted]


def _likeness(entry: Entry) -> tuple[str, str]:
    return entry.architecture, entry.identity


def _as(entry: Entry, like: Compiled) -> Compiled:
    return replace(like, numbers=entry.numbers, operator=entry.operator)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def _entries(architecture: str, numbers: str, full: bool) -> dict[str, Entry]:
    return {entry.identity: entry for entry in entries(architecture, numbers, full)}


def _compile_batch(
    architecture: str, numbers: str, full: bool, identities: list[str]
) -> list[Compiled | str]:
    # Kernels cannot be sent to another process; their identities can.
    here = _entries(architecture, numbers, full)
    return [outcome(here[identity]) for identity in identities]


def outcome(entry: Entry) -> Compiled | str:
    """The entry compiled, or why it does not compile."""
    try:
        return compile_entry(entry)
    except Exception as error:
        # The first lines of a compiler's complaint quote the kernel.
        told = (str(error).strip().splitlines() or [""])[-1]
        where = f"{entry.architecture} {entry.numbers} {entry.name}"
        return f"{where}: {type(error).__name__}: {told}"


def all_compiled(outcomes: Iterable[Compiled | str]) -> list[Compiled]:
    outcomes = list(outcomes)
    failures = [one for one in outcomes if isinstance(one, str)]
    if failures:
        raise RuntimeError("\n".join([f"{len(failures)} kernels do not compile:", *failures]))
    return [one for one in outcomes if isinstance(one, Compiled)]
