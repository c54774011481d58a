"""The limits that every compiled kernel must keep."""

from __future__ import annotations

import re

from benchmarks.kernels.ahead_of_time import TARGETS
from benchmarks.kernels.compiled import Compiled

# Bytes of shared memory (LDS) of a program: "Technical Specifications per Compute Capability" in
# NVIDIA's CUDA C++ Programming Guide, and the MI300 ISA guide. The compilers check none of them.
# "sm_80" has that of sm_86, sm_89 and sm_120, which take the same tiles.
SHARED = {
    "sm_80": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
}
# Threads of a program: a launch of more fails. The warps of AMD's gfx9 have 64 threads.
THREADS = 1024
TENSOR_MEMORY = {"sm_80": 0, "sm_90": 0, "sm_100": 512, "gfx942": 0, "gfx1100": 0}
# Bytes of a thread's stack, where spilled registers go. In half precision none spills with Triton
# 3.9; with 3.6 two kernels without products spill up to four registers. In float32 a few tiles
# spill two or four registers, and up to ten where products take no tensor cores.
STACK = {"bf16": 16, "fp16": 16, "fp32": 16, "tf32": 16, "ieee": 40}
# Kernels that compute no matrix product. All other kernels do.
WITHOUT_PRODUCTS = {
    *("pair_gradient", "pair_rows", "project", "row_count", "row_inverse_norms"),
    *("row_totals", "scaled", "siglip_rows", "stored_rows"),
}
# Instructions of tensor cores with float32 accumulators, by the number format of the operands.
# tcgen05 has one name for bf16 and fp16. NVIDIA's tensor cores do not multiply float32.
_NVIDIA = {
    "bf16": r"(mma|wgmma)\S*\.f32\.bf16\.bf16(\.f32)?|tcgen05\.mma\.kind::f16",
    "fp16": r"(mma|wgmma)\S*\.f32\.f16\.f16(\.f32)?|tcgen05\.mma\.kind::f16",
    "fp32": r"(mma|wgmma)\S*\.f32\.tf32\.tf32(\.f32)?|tcgen05\.mma\.kind::tf32",
    "tf32": r"(mma|wgmma)\S*\.f32\.tf32\.tf32(\.f32)?|tcgen05\.mma\.kind::tf32",
}
_AMD = {
    "bf16": r"v_mfma_f32_\d+x\d+x\d+_?bf16(_1k)?",
    "fp16": r"v_mfma_f32_\d+x\d+x\d+_?f16",
    "fp32": r"v_mfma_f32_\d+x\d+x\d+_?f32",
    "tf32": r"v_mfma_f32_\d+x\d+x\d+_?xf32",
    "ieee": r"v_mfma_f32_\d+x\d+x\d+_?f32",
}


def multiplies(one: Compiled) -> bool:
    """Whether a compiled kernel computes a matrix product."""
    return one.kernel not in WITHOUT_PRODUCTS


def violations(one: Compiled) -> list[str]:
    """A sentence for each limit that is broken."""
    return [*_of_memory(one), *_of_products(one)]


def _of_memory(one: Compiled) -> list[str]:
    found = {
        "bytes of stack": (one.stack, STACK[one.number_format]),
        "registers spilled": (one.spills or 0, 0),
        "bytes of shared memory": (one.shared, SHARED[one.architecture]),
        "threads": (one.warps * TARGETS[one.architecture].warp_size, THREADS),
        "columns of tensor memory": (one.tensor_memory, TENSOR_MEMORY[one.architecture]),
    }
    return [
        f"{value} {what}, limit {limit}" for what, (value, limit) in found.items() if value > limit
    ]


def _of_products(one: Compiled) -> list[str]:
    names = re.findall(r"\d+ ([^;]+)", one.instructions)
    if not multiplies(one):
        return ["a product where none is expected"] if one.dots or names else []
    problems = [] if one.dots else ["no tl.dot"]
    kinds = _NVIDIA if one.architecture.startswith("sm_") else _AMD
    allowed = kinds.get(one.number_format)
    if allowed is None:
        problems += [f"{name} in strict float32" for name in names]
    else:
        problems += [] if names else ["no matrix instruction"]
        problems += [
            f"{name} does not multiply {one.number_format}"
            for name in names
            if not re.fullmatch(allowed, name)
        ]
    if one.number_format == "fp32" and kinds is _NVIDIA:
        # Every tl.dot must be three tf32 products; no loop is peeled here, so the count is exact.
        if one.split_dots != one.dots or one.products != 3 * one.dots:
            problems.append(
                f"{one.products} tf32 products of {one.dots} in tf32x3, wanted three each"
            )
    elif one.split_dots:
        problems.append(f"{one.split_dots} products in tf32x3")
    return problems
