"""From G, the gradient of the logits, to those of X, W and the scale; and an operator's results.

    dX = s g G W    dW = s g G^T X    ds = g sum_ij G_ij y_ij,  y = X W^T

s is the scale, and g = 1 / count for a mean. Kernels write G, a block of rows at a time, into a
buffer of its own in the dtype of X, multiplied by s g before it is rounded. Not in float16, which
has few numbers below 6e-5: there G is multiplied so that its largest values are near 256, and the
products, in float32, by what is left. Products are the library's, and sums over blocks of rows are
float32, in the order of the blocks. So results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mulki.ops import logits
from mulki.ops.operators import Request

from .tiles import Operands, ceil_div, dtype_of_g

MEMORY = 64 << 20  # bytes of the largest buffer
LARGEST = 256.0  # of G in float16


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a b to `out`, or add it; the interpreter's CPU multiplies in the dtype of `out`."""
    if a.is_cpu:
        a, b = a.to(out.dtype), b.to(out.dtype)
    logits.multiply(a, b, out, add)


class Gradients:
    """What a request asks of an operator beside its loss, and how G is to be written for it.

    Args:
        leaves: X, W, the scale, and what else has a gradient.
        count: the rows of a mean where they are counted, 0-d; None for N.
        largest: |G| is at most this, times the largest upstream gradient and sum of weights.
        weights: of teachers [..., N, K]; None for 1.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        operands: Operands,
        request: Request,
        count: Tensor | None = None,
        largest: float = 1.0,
        weights: Tensor | None = None,
    ) -> None:
        self._leaves, self._request = leaves, request
        self._x, self._w = operands.x[0], operands.w[0]
        self.any = any(request.wanted)
        self.to_operands = any(request.wanted[:2])
        #: That of each row, [N]; None for 1.
        self.upstream = request.grad
        if request.grad is not None and request.reduction != "none":
            self.upstream = request.grad.expand(len(self._x))
        #: Elements from a row of G to the next: rows are aligned.
        self.stride = ceil_div(len(self._w), 16) * 16
        self.count = count
        self._is_mean = request.reduction == "mean" and count is None
        self.inverse_count = 1.0 / len(self._x) if self._is_mean else 1.0
        #: 0-d, what G is multiplied by when it is written; None for s g.
        self.factor: Tensor | None = None
        self._rest: Tensor | None = None
        if self._x.dtype == torch.float16 and self.to_operands:
            bound = self._x.new_full((), largest / LARGEST, dtype=torch.float32)
            for factor in (self.upstream, weights):
                if factor is not None:
                    of_rows = factor.abs() if factor.ndim == 1 else factor.abs().sum(-1)
                    bound = bound * of_rows.float().nan_to_num(0.0, 0.0).amax()
            bound = bound.clamp(min=1e-30)  # a smaller one would give infinity
            share = self.inverse_count if count is None else 1.0 / count.clamp(min=1)
            self.factor, self._rest = bound.reciprocal(), bound * leaves[2] * share
        self._of_x: Tensor | None = None
        self._of_w: Tensor | None = None

    def dtype(self, leaf: Tensor) -> torch.dtype:
        """That of its gradient."""
        return logits.waiting(leaf) if self._request.grad is None else leaf.dtype

    def rows(self, multiple: int) -> int:
        """How many rows of G are written at a time: all where memory allows it."""
        n, size = len(self._x), dtype_of_g(self._x).itemsize
        most = max(MEMORY // (size * self.stride) // multiple, 1) * multiple
        return min(n, most) if self.to_operands else n

    def over_rows(self, multiple: int, launch: Callable[[slice, Tensor | None], None]) -> None:
        """Launch a kernel for blocks of rows, with [rows, stride] for G, and add its products."""
        n, p, step = len(self._x), len(self._w), self.rows(multiple)
        g: Tensor | None = None
        if self.to_operands:
            g = self._x.new_empty((min(step, n), self.stride), dtype=dtype_of_g(self._x))
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            launch(rows, g)
            if g is not None:
                self.add(g[: rows.stop - first, :p], rows)

    def add(self, g: Tensor, rows: slice, columns: slice | None = None) -> None:
        """Add the products with rows of G, which have all columns."""
        x, w, wanted = self._x, self._w, self._request.wanted
        if wanted[0]:
            if self._of_x is None:
                self._of_x = x.new_empty(x.shape, dtype=self._dtype_of_product(x))
            multiply(g, w, self._of_x[rows])
        if wanted[1]:
            if self._of_w is None:
                whole = rows.stop - rows.start == len(x)
                dtype = self._dtype_of_product(w) if whole else torch.float32
                self._of_w = w.new_empty(w.shape, dtype=dtype)
            multiply(g.mT, x[rows], self._of_w, add=rows.start > 0)

    def _dtype_of_product(self, operand: Tensor) -> torch.dtype:
        return self.dtype(operand) if self._rest is None else torch.float32

    def _finished(self, of: Tensor | None, leaf: Tensor) -> Tensor:
        if of is None:
            return leaf.new_empty(0, dtype=self.dtype(leaf))
        return (of if self._rest is None else of.mul_(self._rest)).to(self.dtype(leaf))

    def results(
        self, loss: Tensor, details: Sequence[Tensor], of_scalars: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """The results of the operator, of the losses of rows [N].

        `of_scalars` are what rows add to the gradient of each leaf behind X and W.
        """
        request, scalars = self._request, []
        for leaf, of, want in zip(self._leaves[2:], of_scalars, request.wanted[2:], strict=True):
            value = loss.new_empty(0) if of is None or not want else of.sum()
            scalars.append(value.to(self.dtype(leaf)))
        if request.grad is not None:
            loss, details = loss.new_empty(0), [one.new_empty(0) for one in details]
        elif request.reduction != "none":
            loss = loss.mean() if self._is_mean else loss.sum()
            if self.count is not None:
                loss = loss / self.count  # the mean over no rows is NaN; its gradient is zero
        of_x, of_w = self._finished(self._of_x, self._x), self._finished(self._of_w, self._w)
        return loss, *details, of_x, of_w, *scalars
