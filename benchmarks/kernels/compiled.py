"""Triton kernels compiled ahead of time, without a GPU: registers, memory and instructions.

The figures come from the output of Triton's compilers: what cuobjdump prints of the cubin, the
metadata in AMD's assembly, and the instructions in PTX or in that assembly.
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

from benchmarks.kernels.ahead_of_time import TARGETS, Variant, variants
from mulki.runs.environment import cores

_MATRIX_INSTRUCTION = re.compile(
    r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]*|\bv_s?mfmac?_\w+"
)
# Modifiers that every instruction has. The rest of a name is the shape and the number formats.
_COMMON_MODIFIERS = re.compile(r"\.(?:sync|aligned|row|col|cta_group::1)(?=\.)")
_DOT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
BATCH = 8


@dataclass(frozen=True)
class Compiled:
    """A variant of a kernel, and what one of its programs takes."""

    architecture: str
    number_format: str
    operator: str
    kernel: str
    tile: str
    identity: str
    warps: int
    stages: int
    registers: int  # of a thread; on AMD vector registers
    stack: int  # bytes of a thread in memory, where spilled registers go
    spills: int | None  # vector registers spilled; None on NVIDIA
    shared: int  # bytes
    tensor_memory: int  # columns of 128 lanes of 4 bytes
    dots: int  # tl.dot in the kernel
    split_dots: int  # those that ask for tf32x3
    products: int  # matrix products in the compiler's last IR; more than dots where it peels loops
    instructions: str  # of tensor cores, with their number in the code

    @property
    def name(self) -> str:
        where = (
            f"{self.architecture} {self.number_format} {self.operator} {self.kernel} {self.tile}"
        )
        return f"{where.rstrip()} ({self.warps} warps, {self.stages} stages)"


def compile_variant(variant: Variant) -> Compiled:
    """Compile one variant, or take it from Triton's cache.

    Raises:
        Exception: whatever the compilers raise.
    """
    compiled = _compile(variant)
    cubin, text = compiled.asm.get("cubin"), _text(compiled)
    registers, stack, spills = _amd_usage(text) if cubin is None else _nvidia_usage(cubin)
    instructions = Counter(_COMMON_MODIFIERS.sub("", x) for x in _MATRIX_INSTRUCTION.findall(text))
    ttir = compiled.asm["ttir"]
    return Compiled(
        architecture=variant.architecture,
        number_format=variant.number_format,
        operator=variant.operator,
        kernel=variant.kernel.__name__,
        tile=variant.tile,
        identity=variant.identity,
        warps=variant.options["num_warps"],
        stages=variant.options["num_stages"],
        registers=registers,
        stack=stack,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        dots=len(_DOT.findall(ttir)),
        split_dots=len(re.findall(r"\btt\.dot .*inputPrecision = tf32x3\b", ttir)),
        products=len(_DOT.findall(compiled.asm["ttgir"])),
        instructions="; ".join(f"{count} {name}" for name, count in sorted(instructions.items())),
    )


def assembly(variant: Variant) -> str:
    """PTX, or AMD's assembly."""
    return _text(_compile(variant))


def ir(variant: Variant) -> str:
    """Triton's first representation, in which offsets have their types."""
    text: str = _compile(variant).asm["ttir"]
    return text


def sass(variant: Variant) -> str:
    """The machine code of NVIDIA's GPU, by nvdisasm."""
    return _printed(knobs.nvidia.nvdisasm.path, _compile(variant).asm["cubin"], "-c")


def _text(compiled: triton.compiler.CompiledKernel) -> str:
    text: str = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    return text


def _compile(variant: Variant) -> triton.compiler.CompiledKernel:
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    return triton.compile(source, target=TARGETS[variant.architecture], options=variant.options)


def _nvidia_usage(cubin: bytes) -> tuple[int, int, None]:
    printed = _printed(knobs.nvidia.cuobjdump.path, cubin, "--dump-resource-usage")
    found = re.findall(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump: wanted the resources of one kernel, got {printed!r}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local, None


def _printed(tool: str, cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        command = [tool, option, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    def number(name: str) -> int:
        found = re.findall(rf"^\s*\.{name}:\s*(\d+)\s*$", assembly, re.MULTILINE)
        if len(found) != 1:
            raise RuntimeError(f"{name}: wanted it once in the metadata, got {found}")
        return int(found[0])

    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    registers, stack, spills = map(number, names)
    return registers, stack, spills


def compile_all(wanted: Iterable[Variant], processes: int | None = None) -> list[Compiled]:
    """Compile variants of `variants` in several processes, equal ones once.

    Raises:
        RuntimeError: some do not compile; the message has the last line of each error.
    """
    wanted = list(wanted)
    # fp32 on AMD is ieee, and kernels without products do not depend on how float32 is multiplied.
    first = {_compile_key(variant): variant for variant in reversed(wanted)}
    groups: dict[tuple[str, str], list[str]] = {}
    for variant in first.values():
        groups.setdefault((variant.architecture, variant.number_format), []).append(
            variant.identity
        )
    context = get_context("spawn")
    with ProcessPoolExecutor(processes or cores(), mp_context=context) as pool:
        batches = [
            pool.submit(_compile_batch, *group, identities[start : start + BATCH])
            for group, identities in groups.items()
            for start in range(0, len(identities), BATCH)
        ]
        outcomes = [one for batch in batches for one in batch.result()]
    done = {(one.architecture, one.identity): one for one in all_compiled(outcomes)}
    return [_copy_for(variant, done[_compile_key(variant)]) for variant in wanted]


def _compile_key(variant: Variant) -> tuple[str, str]:
    return variant.architecture, variant.identity


def _copy_for(variant: Variant, like: Compiled) -> Compiled:
    return replace(like, number_format=variant.number_format, operator=variant.operator)


@lru_cache(maxsize=1)
def _variants_by_identity(architecture: str, number_format: str) -> dict[str, Variant]:
    return {variant.identity: variant for variant in variants(architecture, number_format)}


def _compile_batch(
    architecture: str, number_format: str, identities: list[str]
) -> list[Compiled | str]:
    # A kernel cannot be pickled, so that another process gets the identity of the variant.
    here = _variants_by_identity(architecture, number_format)
    return [try_compile(here[identity]) for identity in identities]


def try_compile(variant: Variant) -> Compiled | str:
    """The compiled variant, or why it does not compile."""
    try:
        return compile_variant(variant)
    except Exception as error:
        # The first lines of a compiler's message quote the kernel.
        message = (str(error).strip().splitlines() or [""])[-1]
        where = f"{variant.architecture} {variant.number_format} {variant.name}"
        return f"{where}: {type(error).__name__}: {message}"


def all_compiled(outcomes: Iterable[Compiled | str]) -> list[Compiled]:
    outcomes = list(outcomes)
    failures = [one for one in outcomes if isinstance(one, str)]
    if failures:
        raise RuntimeError("\n".join([f"{len(failures)} kernels do not compile:", *failures]))
    return [one for one in outcomes if isinstance(one, Compiled)]
