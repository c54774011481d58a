"""Losses of N pairs over the softmax of rows and of columns: `contrastive` and `pair_kl`.

A column is known when its last row is. So a first pass over the blocks of [N, N] makes the
statistics of rows and of columns, and a second one G. Where there is one block its logits are
still there; else they are multiplied again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mulki.ops.chunked import results, statistics
from mulki.ops.chunked.blocks import Blocks, Logits, diagonal, own
from mulki.ops.chunked.compiling import compilable
from mulki.ops.chunked.products import Gradients, Products, of_models
from mulki.ops.chunked.statistics import Gate, Statistics, weights_of
from mulki.ops.contrastive import Contrastive
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
        self, models: list[Products], scales: Tensor, gradients: Gradients, copies: int
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


class ContrastiveLoss:
    """The loss of `contrastive`.

    Args:
        upstream: the upstream gradient of each pair [N]; None for 1.
    """

    copies = _COPIES

    def __init__(self, x: Contrastive, upstream: Tensor | None = None) -> None:
        self.models = [Products(x.image_features, x.text_features)]
        self.scales = x.logit_scale
        self._x, self._upstream = x, upstream
        self._rows: Tensor | None = None

    def softmaxes(self) -> list[_Softmaxes]:
        """Of which the first pass makes the statistics."""
        return [_Softmaxes.empty(self.scales, 1, 1.0, len(self._x.image_features))]

    def keep(self, softmaxes: list[_Softmaxes]) -> tuple[list[_Term], Tensor | float | None]:
        """Keep the losses of all pairs.

        Returns:
            The terms of G, and what is subtracted from G at the own pairs.
        """
        (one,) = softmaxes
        self._rows = -_log_likelihood(one)
        whole: Tensor | float = 1.0 if self._upstream is None else self._upstream
        return [_Term(one, (whole / 2, whole / 2))], whole

    def bound(self) -> Tensor | None:
        return results.bound(self._x.image_features, self._upstream)

    def finished(self) -> tuple[Tensor, Sequence[Tensor]]:
        assert self._rows is not None
        return self._rows, ()


class PairKlLoss:
    """The loss of `pair_kl`.

    Args:
        upstream: the upstream gradient of each pair [N]; None for 1.
    """

    def __init__(self, x: PairKl, upstream: Tensor | None = None) -> None:
        self.models = of_models(x[:3], x.teacher_image_features, x.teacher_text_features)
        scales = torch.stack([x.logit_scale, *x.teacher_scales])
        self.scales = (scales / x.temperature).reshape(-1, 1, 1)
        self._x, self._upstream = x, upstream
        self._t2 = x.temperature**2 if x.scale_by_t2 else 1.0
        # By which the divergences' part of G is more than differences of probabilities.
        self._factor = x.weight * self._t2 / x.temperature
        self._gate = Gate(x.gate_temperature, x.gate_entropy, x.gate_label)
        self._given = None if x.weights is None else x.weights.to(x.logit_scale.dtype).mT
        # Logits of the labels' loss at another temperature are one more copy.
        self.copies = _COPIES + (self._has_labels and x.temperature != 1)
        self._labels = x.logit_scale.new_empty(0)
        self._own = self._other = self._weights = self._labels  # [2, K, N]

    @property
    def _has_labels(self) -> bool:
        return self._x.label_weight != 0

    def _given_sides(self) -> Sequence[Tensor | None]:
        return (None, None) if self._given is None else tuple(self._given)

    def softmaxes(self) -> list[_Softmaxes]:
        """Of which the first pass makes the statistics."""
        x, n = self._x, len(self._x.image_features)
        of_all = _Softmaxes.empty(x.logit_scale, len(self.models), 1.0, n)
        if not self._has_labels:
            return [of_all]
        return [of_all, _Softmaxes.empty(x.logit_scale, 1, x.temperature, n)]

    def keep(self, softmaxes: list[_Softmaxes]) -> tuple[list[_Term], Tensor | float | None]:
        """Keep the losses of all pairs.

        Returns:
            The terms of G, and what is subtracted from G at the own pairs.
        """
        of_all, *of_labels = softmaxes
        self._own = torch.stack([side.own for side in of_all.sides])
        self._other = torch.stack([side.other for side in of_all.sides])
        self._weights = torch.stack(
            [
                weights_of(self._gate, side.own, of_all.log_of_own(side)[1:])
                if given is None
                else given
                for side, given in zip(of_all.sides, self._given_sides(), strict=True)
            ]
        )
        upstream: Tensor | float = 1.0 if self._upstream is None else self._upstream
        factors = self._weights * (upstream * (self._factor / 2))
        terms, of_own = [_Term(of_all, (factors[0], factors[1]))], None
        for one in of_labels:
            self._labels = -_log_likelihood(one)
            of_own = upstream * self._x.label_weight
            terms.append(_Term(one, (of_own / 2, of_own / 2)))
        return terms, of_own

    def bound(self) -> Tensor | None:
        if self._x.image_features.dtype != torch.float16:
            return None
        # The teachers' part of G, and that of the labels.
        of_weights = results.bound(self._x.image_features, self._x.weights)
        one = torch.ones_like(self._x.logit_scale)
        of_all = one if of_weights is None else of_weights
        of_all = of_all * self._factor + self._x.label_weight
        of_upstream = results.bound(self._x.image_features, self._upstream)
        return of_all if of_upstream is None else of_all * of_upstream

    def finished(self) -> tuple[Tensor, Sequence[Tensor]]:
        kl = (self._own - self._other) * self._t2
        rows = (self._weights * kl).sum(1).sum(0) * (self._x.weight / 2)
        if self._has_labels:
            rows = rows + self._labels * self._x.label_weight
        return rows, [*results.of_teachers(kl, self._weights, -self._own), self._labels]


def run(
    loss: ContrastiveLoss | PairKlLoss,
    operator: Operator,
    x: Contrastive | PairKl,
    request: Request,
) -> tuple[Tensor, ...]:
    """The results of an operator, whose loss this is."""
    count = results.rows_of_mean(operator, x, request)
    gain = results.upstream_of_all(x, request, count)
    gradients = Gradients(loss.models[0], request, x.logit_scale, gain, loss.bound())
    passes = _Passes(loss.models, loss.scales, gradients, loss.copies)
    softmaxes = loss.softmaxes()
    passes.include(*softmaxes)
    terms, of_own = loss.keep(softmaxes)
    if gradients.any:
        passes.add_gradients(terms, of_own)
    return results.returned(request, count, *loss.finished(), gradients.finished())
