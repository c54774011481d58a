"""Arguments for every operator, and what they should give: the reference under autograd.

A case is an operator with arguments of the kind its name says. `asking` adds what is asked of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mulki.ops.logits import wide
from mulki.ops.operators import OPERATORS

OPS = torch.ops.mulki

ALL = [True] * 3  # wanted gradients: of features, prototypes and scale
LABELS = torch.tensor([0, 2, 3, 0, 2, 0])  # a target of 6 rows that the masks of cases allow


class Case(NamedTuple):
    op: str
    args: tuple[Any, ...]

    @property
    def leaves(self) -> int:
        """Features, prototypes, scale and, of siglip, bias."""
        return 4 if self.op == "siglip" else 3


class Operations(TorchDispatchMode):
    """The names of the operations that are called, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def unit_rows(generator: torch.Generator, n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def make(
    name: str,
    n: int = 6,
    p: int = 5,
    d: int = 4,
    dtype: torch.dtype = torch.float64,
    scale: float = 9.0,
    gap: float | None = None,
    seed: int = 0,
    teacher_scales: Sequence[float] | None = None,
    stretched: bool = False,
) -> Case:
    """A case by its name. With a `gap`, teachers are the student but for noise of that size.

    Args:
        teacher_scales: one for each teacher; without a gap, each is 3 wider than the model before.
        stretched: whether the rows of "cosines" have norms of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    p = n if name in ("contrastive", "siglip") or name.startswith("pairs") else p
    x, w = unit_rows(generator, n, d), unit_rows(generator, p, d)
    if stretched and name == "cosines":
        x = x * torch.linspace(0.5, 3, n, dtype=x.dtype)[:, None]
    scales = [scale, scale / 2] if teacher_scales is None else list(teacher_scales)
    widths = [d if gap is not None else d + 3 * i for i in range(len(scales))]
    teacher_x = [unit_rows(generator, n, width) for width in widths]
    teacher_w = [unit_rows(generator, p, width) for width in widths]
    if gap is not None:
        teacher_x = [F.normalize(x + gap * u, dim=1) for u in teacher_x]
        teacher_w, scales = [w, w], [scale, scale]
    mask = torch.arange(p) % 3 != 1  # class 0 takes part
    target = torch.randint(max(p, 1), (n,), generator=generator)
    kept = torch.where(target % 3 != 1, target, 0)
    ignored = torch.where(torch.arange(n) % 4 == 1, -100, kept)
    weights = torch.rand(n, len(scales), generator=generator, dtype=torch.float64)
    of_sides = torch.stack([weights, weights.flip(0)]).to(wide(dtype))

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=wide(dtype))

    operands = x.to(dtype), w.to(dtype), number(scale)
    teachers = (
        [u.to(dtype) for u in teacher_x],
        [v.to(dtype) for v in teacher_w],
        [number(value) for value in scales],
    )
    given = weights.to(wide(dtype))
    cases = {
        "similarity": ("similarity", (False,)),
        "cosines": ("similarity", (True,)),
        "ce": ("prototype_cross_entropy", (target, None, 0.0, -100)),
        "ce_smooth": ("prototype_cross_entropy", (target, None, 0.2, 3)),
        "ce_all": ("prototype_cross_entropy", (ignored, mask, 0.2, -100)),
        "kl": ("teacher_kl", (*teachers, None, None, None, 2.0, 1.0, 0.0, 0.0, True)),
        "kl_label": ("teacher_kl", (*teachers, None, kept, mask, 2.0, 0.5, 0.0, 1.0, True)),
        "kl_confidence": (
            "teacher_kl",
            (*teachers, None, None, None, 1.5, 2.0, 1.0, 0.0, False),
        ),
        "kl_blend": ("teacher_kl", (*teachers, None, kept, mask, 2.0, 1.0, 0.7, 0.4, True)),
        "kl_weights": ("teacher_kl", (*teachers, given, None, mask, 2.0, 1.0, 0.0, 0.0, True)),
        "pairs": ("pair_kl", (*teachers, None, 1.0, 1.0, 0.0, 0.0, True, 2.0, 1.0)),
        "pairs_label": ("pair_kl", (*teachers, None, 2.0, 0.5, 0.0, 1.0, True, 1.0, 0.0)),
        "pairs_blend": ("pair_kl", (*teachers, None, 1.5, 2.0, 0.7, 0.4, False, 0.7, 1.3)),
        "pairs_weights": ("pair_kl", (*teachers, of_sides, 2.0, 1.0, 0.0, 0.0, True, 0.5, 0.0)),
        "contrastive": ("contrastive", ()),
        "siglip": ("siglip", (number(-3.0), 0)),
        # The last rows have no match.
        "siglip_block": ("siglip", (number(-3.0), max(2, p - n + 2))),
    }
    op, rest = cases[name]
    return Case(op, (*operands, *rest))


NAMES = (
    "similarity",
    "cosines",
    "ce",
    "ce_smooth",
    "ce_all",
    "kl",
    "kl_label",
    "kl_confidence",
    "kl_blend",
    "kl_weights",
    "pairs",
    "pairs_label",
    "pairs_blend",
    "pairs_weights",
    "contrastive",
    "siglip",
    "siglip_block",
)
LOSSES = NAMES[2:]


def arguments(case: Case) -> Any:
    """The arguments of a case as the reference takes them."""
    operator = OPERATORS[case.op]
    return operator.arguments._make(case.args[: len(operator.arguments._fields)])


def specification(case: Case) -> Tensor:
    """The losses of rows by the reference, or the matrix."""
    return OPERATORS[case.op].reference(arguments(case))[0]


def requiring_grad(case: Case, wanted: Sequence[bool] | None = None) -> Case:
    """The same case on leaves of its own."""
    wanted = [True] * case.leaves if wanted is None else wanted
    leaves = [
        t.detach().clone().requires_grad_(grad)
        for t, grad in zip(case.args[: case.leaves], wanted, strict=True)
    ]
    return Case(case.op, (*leaves, *case.args[case.leaves :]))


def upstream(case: Case) -> Tensor:
    """A gradient for every row (every entry of a similarity), of both signs."""
    x, w = case.args[:2]
    if case.op == "similarity":
        grad = torch.linspace(-1.5, 2, x.shape[0] * w.shape[0], dtype=torch.float64)
        return grad.reshape(x.shape[0], w.shape[0]).to(x.dtype)
    return torch.linspace(-1.5, 2, x.shape[0], dtype=wide(x.dtype))


FORMS = ("rows", "backward", "reduced")


def asking(case: Case, form: str, wanted: Sequence[bool] | None = None, mean: bool = True) -> Case:
    """The whole call: "rows", their gradients ("backward"), or "reduced" with its gradients."""
    wanted = [True] * case.leaves if wanted is None else list(wanted)
    asked: tuple[Any, ...] = (None, "none", [False] * case.leaves)
    if form == "reduced":
        asked = None, "mean" if mean else "sum", wanted
    elif form == "backward":
        asked = upstream(case), "none", wanted
    return Case(case.op, (*case.args, *asked))


def run(case: Case) -> tuple[Tensor, ...]:
    """The results of a call; of rows, where nothing was asked."""
    fields = len(OPERATORS[case.op].arguments._fields)
    whole = asking(case, "rows") if len(case.args) == fields else case
    return getattr(OPS, case.op)(*whole.args)


def count(case: Case) -> Tensor | int:
    """How many rows a mean is over."""
    if case.op == "prototype_cross_entropy":
        return (case.args[3] != case.args[6]).sum()
    return case.args[0].shape[0]


def expected(case: Case, mean: bool | None = None) -> tuple[Tensor, list[Tensor]]:
    """The reference's rows (mean: None), sum or mean in float64, and its gradients by autograd."""
    double = requiring_grad(Case(case.op, tuple(doubled(a) for a in case.args)))
    out = specification(double)
    if mean is not None:
        out = out.sum() / (count(case) if mean else 1)
    grad = upstream(case).double() if mean is None else None
    leaves = double.args[: case.leaves]
    return out.detach(), list(torch.autograd.grad(out, leaves, grad))


def doubled(value: Any) -> Any:
    if isinstance(value, list):
        return [doubled(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def relative(got: Tensor, want: Tensor) -> float:
    """The error of a tensor, as a part of its size."""
    return ((got.double() - want).norm() / want.norm()).item()


def cross_entropy(
    x: Tensor, w: Tensor, target: list[int], mask: Tensor | None = None, scale: float = 9.0
) -> Case:
    """A case of given rows and classes; -100 ignores a row."""
    return Case(
        "prototype_cross_entropy",
        (x, w, torch.tensor(scale), torch.tensor(target), mask, 0.0, -100),
    )


def with_argument(case: Case, position: int, value: object) -> Case:
    """The same case but for one argument."""
    return Case(case.op, (*case.args[:position], value, *case.args[position + 1 :]))
