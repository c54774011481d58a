"""Operators: what the public functions compute.

One file for each operator holds all that is known of it in Python, from top to bottom: formula,
arguments, their check, reference in plain PyTorch, and the function that the public functions call.
The reference is the specification, and its gradient is autograd's; the kernels in csrc/ (C++, for
the CPU) and in kernels/ (Triton, for GPUs) may not change a result beyond rounding.

Shared by all of them: `operators` (the table), `registry` (definition), `autograd` (gradients),
`backends` (which kernel serves a call), `wins` (where Triton's are faster), `reference` (the kernel
that always does), `loader` (of the C++ kernels), `direct` (the short way to them), `checks`
(messages), `arguments`, `logits`, `namespaces`, `toolchain` (what Triton needs), and
`torch_private` (names of torch that are not public). `gates` computes the weights of teachers.
"""

from mulki.ops import (
    contrastive,
    gates,
    pair_kl,
    prototype_cross_entropy,
    siglip,
    similarity,
    teacher_kl,
)
from mulki.ops.backends import Served, fallbacks, report, share_kernels, use_backend

__all__ = [
    "Served",
    "contrastive",
    "fallbacks",
    "gates",
    "pair_kl",
    "prototype_cross_entropy",
    "report",
    "share_kernels",
    "siglip",
    "similarity",
    "teacher_kl",
    "use_backend",
]
