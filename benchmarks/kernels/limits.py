"""What a compiled kernel has to keep to."""

from __future__ import annotations

import re

from benchmarks.kernels.compiled import Compiled

# Bytes of shared memory (LDS) of a program: "Technical Specifications per Compute Capability" in
# NVIDIA's CUDA C++ Programming Guide, and the MI300 ISA guide. No compiler minds more than these.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_MEMORY = {"sm_80": 0, "sm_90": 0, "sm_100": 512, "gfx942": 0}
# Bytes of a thread's stack: nothing spills in half precision. In float32 a few tiles do, by two or
# four registers, and up to ten where products take no tensor cores.
STACK = {"bf16": 0, "fp16": 0, "fp32": 16, "tf32": 16, "ieee": 40}
# Kernels that see rows, sums or stored logits alone. Whatever else there is multiplies matrices.
WITHOUT_PRODUCTS = {
    *("chunk_gradient", "contrastive_rows", "cross_entropy_rows", "part_sums", "project"),
    *("row_inverse_norms", "row_totals", "teacher_kl_rows"),
}
# Instructions of products on tensor cores: float32 accumulators, and operands of these numbers.
# tcgen05 has one name for both kinds of half precision. NVIDIA's have no float32 operands.
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
    """Whether an entry has a product of matrices."""
    return one.kernel not in WITHOUT_PRODUCTS and "STORED=True" not in one.tile


def violations(one: Compiled) -> list[str]:
    """What an entry does not keep to, in words; empty where all is well."""
    return [*_of_memory(one), *_of_products(one)]


def _of_memory(one: Compiled) -> list[str]:
    found = {
        "bytes of stack": (one.stack, STACK[one.numbers]),
        "registers spilled": (one.spills or 0, 0),
        "bytes of shared memory": (one.shared, SHARED[one.architecture]),
        "columns of tensor memory": (one.tensor_memory, TENSOR_MEMORY[one.architecture]),
    }
    return [f"{is_} {what}, limit {limit}" for what, (is_, limit) in found.items() if is_ > limit]


def _of_products(one: Compiled) -> list[str]:
    names = re.findall(r"\d+ ([^;]+)", one.instructions)
    if not multiplies(one):
        return ["a product where none is expected"] if one.dots or names else []
    told = [] if one.dots else ["no tl.dot"]
    kinds = _NVIDIA if one.architecture.startswith("sm_") else _AMD
    allowed = kinds.get(one.numbers)
    if allowed is None:
        told += [f"{name} in strict float32" for name in names]
    else:
        told += [] if names else ["no matrix instruction"]
        told += [
            f"{name} does not multiply {one.numbers}"
            for name in names
            if not re.fullmatch(allowed, name)
        ]
    if one.numbers == "fp32" and kinds is _NVIDIA:
        # Each of three tf32 products; a loop is not peeled here, so that the count is exact.
        if one.split_dots != one.dots or one.products != 3 * one.dots:
            told.append(f"{one.products} tf32 products of {one.dots} in tf32x3, wanted three each")
    elif one.split_dots:
        told.append(f"{one.split_dots} products in tf32x3")
    return told
