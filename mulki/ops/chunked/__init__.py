"""The operators in plain PyTorch, a block of logits at a time: bounded memory on any device.

`blocks` cuts [N, P] into blocks, `products` multiplies, and a file per family has what is computed
of a block's logits: `rows` (softmax of rows), `pairs` (of rows and of columns), `sigmoids`, and
`matrix`. Nothing waits for the device, no argument is written to, and results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mulki.ops import reference
from mulki.ops.chunked import matrix, pairs, rows, sigmoids
from mulki.ops.operators import Arguments, Operator, Request

_FAMILIES: dict[str, Callable[..., Any]] = {
    "teacher_kl": rows.teacher_kl,
    "prototype_cross_entropy": rows.cross_entropy,
    "contrastive": pairs.contrastive,
    "pair_kl": pairs.pair_kl,
    "siglip": sigmoids.siglip,
    "similarity": matrix.similarity,
}


def run(operator: Operator, x: Arguments, request: Request) -> tuple[Tensor, ...]:
    """The results of an operator; of one that no family has, its reference's."""
    family: Callable[..., Any] = _FAMILIES.get(operator.name, reference.run)
    found: tuple[Tensor, ...] = family(operator, x, request)
    return found
