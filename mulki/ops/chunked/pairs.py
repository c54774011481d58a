"""Losses of N pairs over the softmax of rows and of columns: `contrastive` and `pair_kl`.

A column is known when its last row is. So a first pass over the blocks of [N, N] makes the
statistics of rows and of columns, and a second one G. Where there is one block its logits are
still there; else they are multiplied again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mulki.ops.chunked import results, statistics
from mulki.ops.chunked.blocks import Blocks, Logits, diagonal, own
from mulki.ops.chunked.compiling import compilable
from mulki.ops.chunked.products import Gradients, Products, of_models
from mulki.ops.chunked.statistics import Gate, Statistics, weights_of
from mulki.ops.contrastive import Contrastive
from mulki.ops.logits import wide
from mulki.ops.operators import Operator, Request
from mulki.ops.pair_kl import PairKl

# Copies of the logits that a block stores.
_COPIES = 3
_ROWS, _COLUMNS = -1, -2  # the dimensions of the logits that they are softmaxes over


class _Softmaxes(NamedTuple):
    """Those of one loss, over rows and over columns."""

    models: int  # the first ones of all
    temperature: float  # by which logits of a block are multiplied
    sides: tuple[Statistics, Statistics]  # of rows, of columns
    own: Tensor  # [models, N], the logits of own pairs

    @classmethod
    def empty(cls, like: Tensor, models: int, temperature: float, n: int) -> _Softmaxes:
        sides = Statistics.empty(like, models, n), Statistics.empty(like, models, n)
        return cls(models, temperature, sides, like.new_empty(models, n))

    def logits(self, u: Tensor) -> Tensor:
        """Those of this loss, of the logits of a block."""
        u = u[: self.models]
        return u if self.temperature == 1 else u * self.temperature

    def include(self, u: Tensor, rows: slice, columns: slice, below: Tensor, e: Tensor) -> None:
        """Include the logits of a block; `below` and `e` are written over."""
        u, below, e = self.logits(u), below[: self.models], e[: self.models]
        of_rows, of_columns = self.sides
        for dim, of, part, others in (
            (_ROWS, of_rows, rows, columns),
            (_COLUMNS, of_columns, columns, rows),
        ):
            new = statistics.of_part(u, dim, below, e)
            of.at(part).include(new, is_first=others.start == 0)
        self.own[:, own(rows, columns)] = diagonal(u, rows, columns)

    def log_of_own(self, of: Statistics) -> Tensor:
        """log softmax at the own pairs [models, N]."""
        return (self.own - of.top) - of.log_sum


class _Term(NamedTuple):
    """A loss with what its part of G is multiplied by."""

    softmaxes: _Softmaxes
    # Of rows and of columns: a number, a number of each pair [N], or of each teacher and pair
    # [K, N].
    factors: tuple[Tensor | float, Tensor | float]


@compilable
def _of_side(
    u: Tensor,  # [models, rows, columns]
    of: Statistics,
    dim: int,
    factors: Tensor | float,
    p: Tensor,  # written over
) -> Tensor:
    p = statistics.softmax(u, of, dim, p)
    if isinstance(factors, Tensor) and factors.ndim:
        factors = factors.unsqueeze(dim)
    if len(p) == 1:
        return p[0].mul_(factors)
    assert isinstance(factors, Tensor)
    return statistics.weighted_difference(p, factors)


def _at(values: Tensor | float, part: slice) -> Tensor | float:
    return values[..., part] if isinstance(values, Tensor) and values.ndim else values


class _Passes:
    """The passes over all blocks."""

    def __init__(
        self, models: list[Products], scales: Tensor, gradients: Gradients, copies: int = _COPIES
    ) -> None:
        self._scales, self._gradients = scales.reshape(-1, 1, 1), gradients
        self._n = len(models[0].x)
        self._blocks = Blocks.of(models, copies, gradients.any)
        self._logits = Logits(models, self._blocks, _COPIES)
        self._kept: tuple[Tensor, ...] | None = None  # of the only block

    def _of(self, rows: slice, columns: slice) -> tuple[Tensor, ...]:
        if self._kept is not None:
            return self._kept
        found = self._logits.of(rows, columns)
        found[0].mul_(self._scales)
        if self._blocks.is_one:
            self._kept = found
        return found

    def include(self, *softmaxes: _Softmaxes) -> None:
        """The first pass."""
        if not self._n:
            return
        for rows in self._blocks.rows:
            for columns in self._blocks.columns:
                u, below, e = self._of(rows, columns)
                for one in softmaxes:
                    one.include(u, rows, columns, below, e)

    def add_gradients(self, terms: list[_Term], of_own: Tensor | float | None) -> None:
        """The second pass.

        Args:
            of_own: what is subtracted from G at the own pairs.
        """
        for rows in self._blocks.rows:
            for columns in self._blocks.columns:
                u, *spare = self._of(rows, columns)
                g: Tensor | None = None
                for softmaxes, factors in terms:
                    of_loss = softmaxes.logits(u)
                    sides = zip(
                        (_ROWS, _COLUMNS), softmaxes.sides, (rows, columns), factors, strict=True
                    )
                    for dim, of, part, factor in sides:
                        p = spare[0 if g is None else 1][: len(of_loss)]
                        found = _of_side(of_loss, of.at(part), dim, _at(factor, part), p)
                        g = found if g is None else g.add_(found)
                assert g is not None
                if of_own is not None:
                    diagonal(g, rows, columns).sub_(_at(of_own, own(rows, columns)))
                self._gradients.add(g, rows, columns)


def _log_likelihood(softmaxes: _Softmaxes) -> Tensor:  # [N], minus the contrastive loss
    of_rows, of_columns = (softmaxes.log_of_own(side)[0] for side in softmaxes.sides)
    return (of_rows + of_columns) / 2


def contrastive(operator: Operator, x: Contrastive, request: Request) -> tuple[Tensor, ...]:
    """The results of `mulki.ops.contrastive`."""
    models = [Products(x.image_features, x.text_features)]
    upstream, count = results.upstream_of_rows(request), results.rows_of_mean(operator, x, request)
    gain = results.upstream_of_all(x, request, count)
    bound = results.bound(x.image_features, upstream)
    gradients = Gradients(models[0], request, x.logit_scale, gain, bound)
    passes = _Passes(models, x.logit_scale, gradients)
    softmaxes = _Softmaxes.empty(x.logit_scale, 1, 1.0, len(x.image_features))
    passes.include(softmaxes)
    if gradients.any:
        whole: Tensor | float = 1.0 if upstream is None else upstream
        passes.add_gradients([_Term(softmaxes, (whole / 2, whole / 2))], whole)
    return results.returned(request, count, -_log_likelihood(softmaxes), (), gradients.finished())


def pair_kl(operator: Operator, x: PairKl, request: Request) -> tuple[Tensor, ...]:
    """The results of `mulki.ops.pair_kl`."""
    models = of_models(x[:3], x.teacher_image_features, x.teacher_text_features)
    count = results.rows_of_mean(operator, x, request)
    # Upstream gradients of two losses are in G.
    of_all = request._replace(grad=None) if x.labels else request
    gain = results.upstream_of_all(x, of_all, count)
    gradients = Gradients(models[0], request, x.logit_scale, gain, _bound(x, request))
    scales = torch.cat([x.logit_scale.reshape(1), x.teacher_scales]) / x.temperature
    # Logits of the labels' loss at another temperature are one more copy.
    copies = _COPIES + (x.labels and x.temperature != 1)
    passes = _Passes(models, scales, gradients, copies)
    n, new = len(x.image_features), _Softmaxes.empty
    softmaxes = new(x.logit_scale, len(models), 1.0, n)
    of_labels = new(x.logit_scale, 1, x.temperature, n) if x.labels else None
    passes.include(*([softmaxes] if of_labels is None else [softmaxes, of_labels]))

    own = torch.stack([side.own for side in softmaxes.sides])  # [2, K, N]
    kl = own - torch.stack([side.other for side in softmaxes.sides])
    if x.weights is not None:
        weights = x.weights.to(x.logit_scale.dtype).mT
    else:
        gate = Gate(x.gate_temperature, x.gate_entropy, x.gate_label)
        weights = torch.stack(
            [weights_of(gate, side.own, softmaxes.log_of_own(side)[1:]) for side in softmaxes.sides]
        )
    t2 = x.temperature**2 if x.scale_by_t2 else 1.0
    if gradients.any:
        to_labels, to_teachers = _upstream(x, request)
        factors = weights * (to_teachers * (_factor(x) / 2))
        terms = [_Term(softmaxes, (factors[0], factors[1]))]
        if of_labels is not None:
            terms.append(_Term(of_labels, (to_labels / 2, to_labels / 2)))
        passes.add_gradients(terms, None if of_labels is None else to_labels)
    found = gradients.finished()
    kl = kl * t2
    rows = (weights * kl).sum(1).sum(0) / 2
    if of_labels is not None:
        rows = torch.stack([-_log_likelihood(of_labels), rows])
    details = results.of_teachers(kl, weights, -own)
    return results.returned(request, count, rows, details, found)


def _upstream(x: PairKl, request: Request) -> tuple[Tensor | float, Tensor | float]:
    # Of the labels' loss and of the teachers': a number, or one of each pair [N].
    if request.grad is None:
        return 1.0, 1.0
    if x.labels:
        of_labels, of_teachers = request.grad.to(wide(x.image_features.dtype))
        return of_labels, of_teachers
    return 1.0, 1.0 if request.reduction != "none" else request.grad


def _bound(x: PairKl, request: Request) -> Tensor | None:
    images = x.image_features
    of_weights = results.bound(images, x.weights)
    if images.dtype != torch.float16:
        return None
    one = torch.ones_like(x.logit_scale)
    # The teachers' part of G, and that of the labels.
    of_all = (one if of_weights is None else of_weights) * _factor(x) + (1 if x.labels else 0)
    upstream = request.grad if x.labels else results.upstream_of_rows(request)
    of_upstream = results.bound(images, None if upstream is None else upstream.flatten())
    return of_all if of_upstream is None else of_all * of_upstream


def _factor(x: PairKl) -> float:
    # By which G of the teachers is more than differences of probabilities.
    return (x.temperature**2 if x.scale_by_t2 else 1.0) / x.temperature
