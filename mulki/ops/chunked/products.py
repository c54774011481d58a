"""Products of X, W and G, and the gradients that are added up of them.

Logits and gradients are wide (`mulki.ops.logits`) whatever the operands are. Operands of half
precision are multiplied as they are where torch has such products, and G is rounded to their dtype
before; elsewhere they are cast to float32, some rows of W at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mulki.ops.logits import Operands, multiplies_halves, multiply, waiting, wide
from mulki.ops.operators import Request

_DEFAULT = {"cpu": 16}  # mebibytes; on the CPU what lies in the caches is faster
#: What the largest values of G are near in float16, which has few numbers below 6e-5.
LARGEST = 256.0


def budget(device_type: str) -> int:
    """The bytes of a block.

    Raises:
        ValueError: MULKI_CHUNK_MB is no positive number.
    """
    given = os.environ.get("MULKI_CHUNK_MB", "")
    if not given:
        return _DEFAULT.get(device_type, 64) << 20
    try:
        size = float(given)
    except ValueError:
        size = 0
    if not 0 < size < float("inf"):
        raise ValueError(f"MULKI_CHUNK_MB: got {given!r}, wanted a positive number of mebibytes")
    return int(size * (1 << 20))


class Products:
    """Those of the operands X [N, D] and W [P, D] of one model.

    Args:
        kept: [N, 1] bool, the rows of X that count; others are taken for zeros. None for all.
    """

    def __init__(self, x: Tensor, w: Tensor, kept: Tensor | None = None) -> None:
        self.x, self.w, self.kept = x, w, kept
        self.dtype = wide(x.dtype)
        is_half = x.dtype != self.dtype
        self.is_cast = is_half and not multiplies_halves(x.device, x.dtype)
        self.rounds_g = is_half and not self.is_cast
        self._last: tuple[slice, Tensor] | None = None

    def rows(self, rows: slice) -> Tensor:
        """Rows of X as they are multiplied; a block asks for them more than once."""
        if self._last is None or self._last[0] != rows:
            x = self.x[rows]
            if self.kept is not None:
                x = x.where(self.kept[rows], 0)
            self._last = rows, x.to(self.dtype) if self.is_cast else x
        return self._last[1]

    def logits(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Write X W^T of these rows and columns, without the scale."""
        x, w = self.rows(rows), self.w[columns]
        if not self.is_cast:
            multiply(x, w.mT, out)
            return
        for part, cast in self._parts(w):
            multiply(x, cast.mT, out[:, part])

    def of_x(self, g: Tensor, columns: slice, out: Tensor, add: bool) -> None:
        """out = G W, or out += G W; G [rows, columns], out [rows, D]."""
        w = self.w[columns]
        if not self.is_cast:
            multiply(g, w, out, add)
            return
        for part, cast in self._parts(w):
            multiply(g[:, part], cast, out, add or part.start > 0)

    def of_w(self, g: Tensor, rows: slice, out: Tensor, add: bool) -> None:
        """out = G^T X, or out += G^T X; G [rows, columns], out [columns, D]."""
        multiply(g.mT, self.rows(rows), out, add)

    def _parts(self, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
        # Some rows of W at a time, cast.
        size = max(w.shape[1], 1) * self.dtype.itemsize
        count = max(budget(w.device.type) // 8 // size, 1)
        # No rows are a part, too: their product is zero.
        for first in range(0, max(len(w), 1), count):
            part = slice(first, min(first + count, len(w)))
            yield part, w[part].to(self.dtype)


def of_models(student: Operands, xs: Sequence[Tensor], ws: Sequence[Tensor]) -> list[Products]:
    """Those of a student, then of its teachers with X and W from these lists."""
    x, w, _ = student
    return [Products(*operands) for operands in zip((x, *xs), (w, *ws), strict=True)]


class Gradients:
    """dX = s g G W, dW = s g G^T X and ds = g <X, G W>, added up over blocks of G.

    Args:
        request: which of the three are wanted, in which dtype.
        scale: s.
        gain: g.
        bound: no |G| is larger; None for 1. It is used in float16 alone.
    """

    def __init__(
        self,
        products: Products,
        request: Request,
        scale: Tensor,
        gain: Tensor | float,
        bound: Tensor | None = None,
    ) -> None:
        x, w, dtype = products.x, products.w, products.dtype
        self._products, self._scale, self._gain = products, scale, gain
        self._to_x, self._to_w, self._to_scale = request.wanted[:3]
        self.any = any(request.wanted[:3])
        self._dtype = waiting(x) if request.grad is None else x.dtype
        # Rows of dX in another dtype are finished a block of rows at a time.
        self._finishes_rows = self._to_x and self._dtype != dtype
        self._of_x: Tensor | None = None
        if self._to_x or self._to_scale:
            self._of_x = x.new_empty(x.shape, dtype=self._dtype if self._to_x else dtype)
        self._of_rows: Tensor | None = None
        self._of_w = w.new_empty(w.shape, dtype=dtype) if self._to_w else None
        self._half = x.dtype if products.rounds_g else None
        self._factor: Tensor | float = 1.0
        if self._half == torch.float16:
            self._factor = LARGEST if bound is None else LARGEST / bound
        self._of_scale: list[Tensor] = []

    def add(self, g: Tensor, rows: slice, columns: slice) -> None:
        """Add the products with a block of G."""
        if self._half is not None:
            g = torch.mul(g, self._factor, out=torch.empty_like(g, dtype=self._half))
        if self._of_x is not None:
            of_x = self._of_x[rows]
            if self._finishes_rows:
                if columns.start == 0:
                    self._of_rows = torch.empty_like(of_x, dtype=self._products.dtype)
                assert self._of_rows is not None
                of_x = self._of_rows
            self._products.of_x(g, columns, of_x, columns.start > 0)
            if columns.stop == len(self._products.w):
                if self._to_scale:
                    self._of_scale.append((self._products.rows(rows) * of_x).sum())
                if self._finishes_rows:
                    torch.mul(of_x, self._whole_factor()[1], out=self._of_x[rows])
        if self._of_w is not None:
            self._products.of_w(g, rows, self._of_w[columns], rows.start > 0)

    def _whole_factor(self) -> tuple[Tensor | float, Tensor]:
        # What is left of g, and s times that.
        gain = self._gain
        if self._half == torch.float16:
            gain = gain / self._factor
        return gain, self._scale * gain

    def finished(self) -> list[Tensor]:
        """dX, dW and ds; empty where not wanted."""
        scale, (gain, factor) = self._scale, self._whole_factor()
        of_x = self._of_x
        if of_x is None or not self._finishes_rows:
            of_x = self._scaled(of_x if self._to_x else None, factor)
        if self._to_x and self._products.kept is not None:
            of_x.masked_fill_(~self._products.kept, 0)
        of_scale = scale.new_empty(0)
        if self._to_scale:
            of_scale = sum(self._of_scale, torch.zeros_like(scale)) * gain
        return [of_x, self._scaled(self._of_w, factor), of_scale]

    def _scaled(self, of: Tensor | None, factor: Tensor) -> Tensor:
        if of is None:
            return factor.new_empty(0, dtype=self._dtype)
        out = of if of.dtype == self._dtype else torch.empty_like(of, dtype=self._dtype)
        return torch.mul(of, factor, out=out)
