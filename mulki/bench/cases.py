"""A case: an operator at a shape in a dtype, its inputs, and the least work it takes.

N samples, P prototypes, D width, K teachers. A product is one matrix product of 2 N P D operations.
The least number of products is K + 1 for the logits of the student and of K teachers, and 2 more
for the gradients to features and prototypes; recomputing logits in the backward pass takes more,
and counts for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.errors import InputError

Shape = tuple[int, int, int]  # N, P, D

MODES = ("forward", "backward", "both")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The operators, and how many teachers each has.
OPERATORS = {
    "teacher_kl_1": 1,
    "dual_teacher_kl": 2,
    "teacher_kl_3": 3,
    "pair_kl": 1,
    "prototype_cross_entropy": 0,
    "contrastive": 0,
    "siglip": 0,
    "similarity": 0,
}

#: Operators on N pairs, so that P = N.
PAIRED = ("pair_kl", "contrastive", "siglip")

WIDTH = 512  # D of a shape that does not say

#: Batches of continual learning, the same at other widths, and one that is large.
GRID: tuple[Shape, ...] = (
    (64, 100, 512),
    (256, 1000, 512),
    (256, 1000, 768),
    (256, 1000, 1024),
    (1024, 1000, 512),
    (4096, 4096, 512),
)
PAIRED_GRID: tuple[Shape, ...] = tuple((n, n, 512) for n in (256, 512, 1024, 2048, 4096, 8192))

QUICK: tuple[Shape, ...] = ((64, 100, 512), (256, 1000, 512))
PAIRED_QUICK: tuple[Shape, ...] = ((256, 256, 512),)

#: On a GPU, the most important first: small batches and large ones take turns.
GPU_GRID: tuple[Shape, ...] = (
    (64, 100, 512),
    (8192, 8192, 512),
    (256, 1000, 512),
    (4096, 1000, 768),
    (512, 10, 512),
    (32768, 1000, 512),
    (16384, 16384, 768),
    (512, 1000, 1280),
    (4096, 21841, 1024),
    (65536, 1000, 1280),
    (64, 10, 768),
    (65536, 65536, 512),
)
PAIRED_GPU_GRID: tuple[Shape, ...] = tuple(
    (n, n, d)
    for n, d in (
        *((256, 512), (8192, 512), (512, 768), (32768, 512)),
        *((4096, 1024), (16384, 1280), (64, 512), (65536, 512)),
    )
)

#: The most entries of a matrix that is asked for: the similarity and its upstream gradient.
MATRIX_ENTRIES = 1 << 28

#: Distance of a teacher's unit rows from the student's, before they are normalised again. Continual
#: learning starts with a student that is its teacher, and there rounding hurts the gradient most.
GAP = 0.1

#: Of the student, and of each teacher.
SCALE = 100.0
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0


@dataclass(frozen=True)
class Inputs:
    """What the functions of one case are called with; the same tensors for all providers."""

    # x [N, D], w [P, D], scale; then, by operator, target [N] (cross-entropy), bias (siglip), or
    # the teachers' (x, w, scale) and target (teacher KL).
    arguments: tuple[Any, ...]
    leaves: dict[str, Tensor]  # those of the arguments that gradients flow to, by name
    upstream: Tensor | None  # [N, P] gradient of the similarity; a loss has none

    def without(self, names: Sequence[str]) -> Inputs:
        """The same inputs, with no gradients to the leaves of these names."""
        fixed = [self.leaves[name] for name in names if name in self.leaves]
        arguments = tuple(
            a.detach() if any(a is leaf for leaf in fixed) else a for a in self.arguments
        )
        leaves = {name: leaf for name, leaf in self.leaves.items() if name not in names}
        return replace(self, arguments=arguments, leaves=leaves)


@dataclass(frozen=True)
class Case:
    """An operator at a shape in a dtype on a device."""

    operator: str
    n: int
    p: int
    d: int
    dtype: str
    device: str = "cpu"

    @property
    def shape(self) -> str:
        """N, P and D as they are written on the command line."""
        return f"{self.n}x{self.p}x{self.d}"

    @property
    def teachers(self) -> int:
        """K."""
        return OPERATORS[self.operator]

    def operations(self, mode: str) -> int:
        """Floating point operations of the least number of products."""
        products = {"forward": self.teachers + 1, "backward": 2, "both": self.teachers + 3}[mode]
        return products * 2 * self.n * self.p * self.d

    def least_bytes(self, mode: str) -> int:
        """Bytes of the inputs, each read once, and of the outputs, each written once."""
        size = DTYPES[self.dtype].itemsize
        rows = (self.n + self.p) * self.d * size
        read, output = rows * (1 + self.teachers), 4
        if self.operator in ("dual_teacher_kl", "prototype_cross_entropy"):
            read += 8 * self.n
        if self.operator == "similarity":
            output = self.n * self.p * size
            read += 0 if mode == "forward" else output
        return read + {"forward": output, "backward": rows, "both": output + rows}[mode]

    def inputs(self, given_in: torch.dtype | None = None) -> Inputs:
        """Draw the inputs on the device, the same ones at every call.

        Args:
            given_in: give the values, rounded to the case's dtype as ever, in this one; None for
                the case's own.
        """
        generator = None
        if self.device != "meta":  # which has no values
            generator = torch.Generator(self.device).manual_seed(0)
        wide = given_in or torch.float32

        def random(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=self.device)

        def unit(rows: int) -> Tensor:
            return F.normalize(random(rows, self.d), dim=1)

        def near(t: Tensor, gap: float) -> Tensor:
            return F.normalize(t + gap * unit(t.shape[0]), dim=1)

        def rounded(t: Tensor) -> Tensor:
            return t.to(DTYPES[self.dtype]).to(given_in or DTYPES[self.dtype])

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=wide, device=self.device)

        paired, siglip = self.operator in PAIRED, self.operator == "siglip"
        x = unit(self.n)
        # Pairs are a little closer than chance, as early in training: neither solved nor noise.
        w = F.normalize(unit(self.p) + 0.1 * x, dim=1) if paired else unit(self.p)
        target = torch.randint(self.p, (self.n,), generator=generator, device=self.device)
        extra: tuple[Any, ...] = ()
        if self.teachers:
            teachers = tuple(
                (rounded(near(x, GAP)), rounded(near(w, GAP)), number(SCALE))
                for _ in range(self.teachers)
            )
            extra = (teachers, target)
        elif self.operator == "prototype_cross_entropy":
            extra = (target,)
        leaves = {
            "features": rounded(x),
            "prototypes": rounded(w),
            "scale": number(SIGLIP_SCALE if siglip else SCALE),
        }
        if siglip:
            leaves["bias"] = number(SIGLIP_BIAS)
        for leaf in leaves.values():
            leaf.requires_grad_()
        upstream = None
        if self.operator == "similarity":
            # In part along the similarity, or the gradient to the scale would be what is left of
            # a sum of random signs.
            upstream = rounded(random(self.n, self.p) + self.d**0.5 * x @ w.T)
        return Inputs((*leaves.values(), *extra), leaves, upstream)


def parse_shape(text: str) -> Shape:
    """N, P and D from ``NxP`` or ``NxPxD``.

    Raises:
        InputError: it is neither, or a number is zero or has more than 9 digits.
    """
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})(?:x(\d{1,9}))?", text, flags=re.ASCII)
    if not match or 0 in (shape := tuple(int(part or WIDTH) for part in match.groups())):
        raise InputError(
            f"--shapes: got {text!r}, wanted NxP or NxPxD of positive numbers of at most 9 "
            "digits, as 1024x1000x512"
        )
    n, p, d = shape
    return n, p, d


def make_cases(
    operators: Sequence[str],
    shapes: Sequence[Shape] | None,
    dtypes: Sequence[str],
    device: str = "cpu",
    quick: bool = False,
    by_shape: bool = False,
) -> list[Case]:
    """Every combination; an operator on pairs takes only the shapes with P = N.

    Args:
        shapes: None for each operator's own grid, or the short one with `quick`.
        by_shape: the first shape of all operators first, not the first operator.
    """
    ranked = []
    for operator in operators:
        of_operator = own_grid(operator, device, quick) if shapes is None else shapes
        for rank, (n, p, d) in enumerate(of_operator):
            if operator not in PAIRED or n == p:
                cases = (Case(operator, n, p, d, dtype, device) for dtype in dtypes)
                ranked += [(rank, case) for case in cases]
    if by_shape:
        ranked.sort(key=lambda pair: pair[0])
    return [case for _, case in ranked]


def own_grid(operator: str, device: str, quick: bool) -> tuple[Shape, ...]:
    """The shapes of an operator where none are asked for."""
    paired = operator in PAIRED
    if quick:
        return PAIRED_QUICK if paired else QUICK
    if torch.device(device).type == "cpu":
        return PAIRED_GRID if paired else GRID
    if operator == "similarity":
        return tuple(shape for shape in GPU_GRID if shape[0] * shape[1] <= MATRIX_ENTRIES)
    return PAIRED_GPU_GRID if paired else GPU_GRID
