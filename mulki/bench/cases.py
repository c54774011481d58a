"""The one table of the operators, their inputs and their shapes.

The tests, the benchmark and `mulki doctor` all read it. `losses` has the formulas of an entry, and
`verify` says whether a result is right: nothing is timed before.

N samples, P prototypes, D width, K teachers. A product is one matrix product of 2 N P D operations.
The least number of products is K + 1 for the logits of the student and of K teachers, and 2 more
for the gradients to features and prototypes; recomputing logits in the backward pass takes more,
and counts for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.errors import InputError

Shape = tuple[int, int, int]  # N, P, D

MODES = ("forward", "backward", "both")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Operator(NamedTuple):
    """An entry of the table."""

    name: str  # in torch.ops.mulki
    teachers: int = 0
    paired: bool = False  # on N pairs, so that P = N


OPERATORS = {
    "teacher_kl_1": Operator("teacher_kl", 1),
    "dual_teacher_kl": Operator("teacher_kl", 2),
    "teacher_kl_3": Operator("teacher_kl", 3),
    "pair_kl": Operator("pair_kl", 1, paired=True),
    "prototype_cross_entropy": Operator("prototype_cross_entropy"),
    "contrastive": Operator("contrastive", paired=True),
    "siglip": Operator("siglip", paired=True),
    "similarity": Operator("similarity"),
}

PAIRED = tuple(name for name, operator in OPERATORS.items() if operator.paired)

#: Operators with options, which tests take besides: `class_mask` and `weights` are drawn where they
#: are True, and some rows have a negative `ignore_index` for a target.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "similarity": ("similarity", {}),
    "cosines": ("similarity", {"normalize": True}),
    "ce": ("prototype_cross_entropy", {}),
    "ce_smooth": ("prototype_cross_entropy", {"label_smoothing": 0.2, "ignore_index": 3}),
    "ce_all": (
        "prototype_cross_entropy",
        {"label_smoothing": 0.2, "class_mask": True, "ignore_index": -100},
    ),
    "kl": ("teacher_kl_1", {"temperature": 1.0}),
    "kl_label": ("dual_teacher_kl", {"gate_temperature": 0.5, "class_mask": True}),
    "kl_confidence": (
        "teacher_kl_3",
        {"gate": "confidence", "temperature": 1.5, "gate_temperature": 2.0, "scale_by_t2": False},
    ),
    "kl_blend": (
        "dual_teacher_kl",
        {"gate": "blend", "gate_entropy": 0.7, "gate_label": 0.4, "class_mask": True},
    ),
    "kl_weights": ("teacher_kl_3", {"weights": True, "class_mask": True}),
    "pairs": ("pair_kl", {"temperature": 1.0}),
    "pairs_label": ("pair_kl", {"gate": "label", "gate_temperature": 0.5}),
    "pairs_blend": (
        "pair_kl",
        {"gate": "blend", "gate_entropy": 0.7, "gate_label": 0.4, "scale_by_t2": False},
    ),
    "pairs_weights": ("pair_kl", {"weights": True}),
    "contrastive": ("contrastive", {}),
    "siglip": ("siglip", {}),
    "siglip_block": ("siglip", {"offset": 3}),  # of which the last rows have no match
}

WIDTH = 512  # D of a shape that does not say

#: Batches of continual learning, the same at other widths, and one that is large.
SMALL: tuple[Shape, ...] = ((8, 8, 16), (16, 10, 256), (64, 100, 512))
GRID: tuple[Shape, ...] = (
    *SMALL,
    (256, 1000, 512),
    (256, 1000, 768),
    (256, 1000, 1024),
    (1024, 1000, 512),
    (4096, 4096, 512),
)
PAIRED_GRID: tuple[Shape, ...] = (
    (8, 8, 16),
    *((n, n, 512) for n in (64, 256, 512, 1024, 2048, 4096, 8192)),
)

QUICK: tuple[Shape, ...] = ((64, 100, 512), (256, 1000, 512))
PAIRED_QUICK: tuple[Shape, ...] = ((256, 256, 512),)

#: Where blocks, tiles and lanes end in the middle of one.
RAGGED: tuple[Shape, ...] = (
    *((1, 1, 1), (1, 7, 3), (7, 1, 64), (64, 100, 17), (130, 257, 33), (5, 1000, 8)),
    *((1, 1, 64), (64, 65, 127), (130, 257, 100), (5, 1000, 65), (9, 31, 2048)),
)

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
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments by name

    def call(self, loss: Callable[..., Tensor], **options: Any) -> Tensor:
        """The loss of these inputs, with more options."""
        return loss(*self.arguments, **self.options, **options)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same inputs with every tensor changed, on leaves of their own."""
        made: dict[int, Tensor] = {}

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            if not isinstance(value, Tensor):
                return value
            if id(value) not in made:
                made[id(value)] = change(value.detach()).detach()
                made[id(value)].requires_grad_(value.requires_grad)
            return made[id(value)]

        leaves = {name: changed(leaf) for name, leaf in self.leaves.items()}
        options = {name: changed(value) for name, value in self.options.items()}
        return Inputs(changed(self.arguments), leaves, changed(self.upstream), options)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another floating dtype."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def without(self, names: Sequence[str]) -> Inputs:
        """The same inputs, with no gradients to the leaves of these names."""
        fixed = [id(leaf) for name, leaf in self.leaves.items() if name in names]

        def cut(value: Any) -> Any:
            return value.detach() if id(value) in fixed else value

        leaves = {name: leaf for name, leaf in self.leaves.items() if name not in names}
        options = {name: cut(value) for name, value in self.options.items()}
        return Inputs(tuple(map(cut, self.arguments)), leaves, self.upstream, options)


@dataclass(frozen=True)
class Case:
    """An operator at a shape in a dtype on a device."""

    operator: str
    n: int
    p: int
    d: int
    dtype: str
    device: str = "cpu"
    options: tuple[tuple[str, Any], ...] = ()  # of the functions of `losses`, see VARIANTS
    scale: float | None = None  # of the logits; None for that of CLIP or SigLIP
    gap: float | None = GAP  # of the teachers; None for others, each 3 wider than the one before
    seed: int = 0

    @property
    def shape(self) -> str:
        """N, P and D as they are written on the command line."""
        return f"{self.n}x{self.p}x{self.d}"

    @property
    def teachers(self) -> int:
        """K."""
        return OPERATORS[self.operator].teachers

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
            generator = torch.Generator(self.device).manual_seed(self.seed)
        wide = given_in or torch.float32
        given = dict(self.options)

        def random(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=self.device)

        def unit(rows: int, width: int = self.d) -> Tensor:
            return F.normalize(random(rows, width), dim=1)

        def rounded(t: Tensor) -> Tensor:
            return t.to(DTYPES[self.dtype]).to(given_in or DTYPES[self.dtype])

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=wide, device=self.device)

        siglip = self.operator == "siglip"
        x = unit(self.n)
        # Pairs are a little closer than chance, as early in training: neither solved nor noise.
        w = unit(self.p)
        if self.operator in PAIRED and self.n == self.p:
            w = F.normalize(w + 0.1 * x, dim=1)
        target = torch.randint(max(self.p, 1), (self.n,), generator=generator, device=self.device)
        scale, bias = self.scale, -3.0
        if scale is None:
            scale, bias = (SIGLIP_SCALE if siglip else SCALE), SIGLIP_BIAS

        def teacher(k: int) -> tuple[Tensor, Tensor, Tensor]:
            if self.gap is None:
                width = self.d + 3 * k
                u, v, factor = unit(self.n, width), unit(self.p, width), scale / (k + 1)
            else:
                u, v = (F.normalize(t + self.gap * unit(len(t)), dim=1) for t in (x, w))
                factor = scale
            return rounded(u), rounded(v), number(factor)

        others = tuple(teacher(k) for k in range(self.teachers))
        if given.get("class_mask"):
            given["class_mask"] = torch.arange(self.p, device=self.device) % 3 != 1
            target = target.where(target % 3 != 1, 0)
        if given.get("ignore_index", 0) < 0:
            target[1::4] = given["ignore_index"]
        if given.get("normalize"):
            x = x * torch.linspace(0.5, 3, self.n, device=self.device)[:, None]
        extra: tuple[Any, ...] = ()
        if self.teachers:
            extra = (others, target)
        elif self.operator == "prototype_cross_entropy":
            extra = (target,)
        leaves = {"features": rounded(x), "prototypes": rounded(w), "scale": number(scale)}
        if siglip:
            leaves["bias"] = number(bias)
        arguments = (*leaves.values(), *extra)
        if given.get("weights"):
            sides = (2,) if self.operator == "pair_kl" else ()
            size = (*sides, self.n, self.teachers)
            drawn = torch.rand(size, generator=generator, device=self.device).to(wide)
            leaves["weights"] = given["weights"] = drawn
        for leaf in leaves.values():
            leaf.requires_grad_()
        upstream = None
        if self.operator == "similarity":
            # In part along the similarity, or the gradient to the scale would be what is left of
            # a sum of random signs.
            upstream = rounded(random(self.n, self.p) + self.d**0.5 * x @ w.T)
        return Inputs(arguments, leaves, upstream, given)


def variant(
    name: str, n: int = 6, p: int = 5, d: int = 4, dtype: str = "float32", **more: Any
) -> Case:
    """The case of a variant by its name, of teachers that are far from their student.

    Args:
        more: other fields of the case.
    """
    operator, options = VARIANTS[name]
    if operator in PAIRED and "offset" not in options:
        p = n
    more = {"scale": 9.0, "gap": None, **more}
    return Case(operator, n, p, d, dtype, options=tuple(options.items()), **more)


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
