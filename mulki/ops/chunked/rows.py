"""Losses over the softmax of rows: `teacher_kl` and `prototype_cross_entropy`.

A block has all columns where these fit, and one pass over its logits is enough. Else a first pass
over parts of the columns makes the statistics of its rows, and a second one G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mulki.ops.chunked import results, statistics
from mulki.ops.chunked.blocks import Blocks, Logits
from mulki.ops.chunked.compiling import compilable, filled, into
from mulki.ops.chunked.products import Gradients, Products, of_models
from mulki.ops.chunked.statistics import Gate, Statistics, weights_of
from mulki.ops.logits import in_range
from mulki.ops.operators import Operator, Request
from mulki.ops.prototype_cross_entropy import PrototypeCrossEntropy
from mulki.ops.teacher_kl import TeacherKl

# Copies of the logits that a block stores: for one pass over them, and for two.
_WHOLE, _PARTS = 2, 3


def run(
    loss: TeacherKlLoss | CrossEntropyLoss,
    operator: Operator,
    x: TeacherKl | PrototypeCrossEntropy,
    request: Request,
) -> tuple[Tensor, ...]:
    """The results of an operator, whose loss this is."""
    count = results.rows_of_mean(operator, x, request)
    gain = results.upstream_of_all(x, request, count) * loss.factor
    gradients = Gradients(loss.models[0], request, x.scale, gain, loss.bound())
    visit(loss, gradients)
    return results.returned(request, count, *loss.finished(), gradients.finished())


def visit(loss: TeacherKlLoss | CrossEntropyLoss, gradients: Gradients) -> None:
    """Compute a loss a block after the other, and add up the products with its G."""
    copies = _WHOLE
    blocks = Blocks.of(loss.models, copies, gradients.any)
    if len(blocks.columns) > 1:
        copies = _PARTS
        blocks = Blocks.of(loss.models, copies, gradients.any)
    logits = Logits(loss.models, blocks, copies)
    for rows in blocks.rows:
        if copies == _WHOLE:
            (columns,) = blocks.columns
            u, spare = logits.of(rows, columns)
            g = loss.whole(u, spare, rows, gradients.any)
            if gradients.any:
                gradients.add(g, rows, columns)
            continue
        of = _first_pass(loss, logits, rows, blocks.columns)
        if gradients.any:
            for columns in blocks.columns:
                u, p, _ = logits.of(rows, columns)
                _scaled(u, loss.scales, _part(loss.masked, columns))
                statistics.softmax(u, of, -1, p)
                gradients.add(loss.gradient(p, rows, columns), rows, columns)


def _first_pass(
    loss: TeacherKlLoss | CrossEntropyLoss, logits: Logits, rows: slice, parts: list[slice]
) -> Statistics:
    of: Statistics | None = None
    at_target = sums = None
    for columns in parts:
        u, below, e = logits.of(rows, columns)
        _scaled(u, loss.scales, _part(loss.masked, columns))
        new = statistics.of_part(u, -1, below, e)
        of = new if of is None else statistics.merged(of, new)
        if loss.target is not None:
            place, inside = _within(loss.target[rows], columns, len(loss.models[0].w))
            value = u.gather(2, place.expand(len(u), -1, 1)).where(inside, 0).squeeze(2)
            at_target = value if at_target is None else at_target + value
        if loss.sums_classes:
            value = _sum_of_active(below[0].copy_(u[0]), _part(loss.masked, columns))
            sums = value if sums is None else sums + value
    assert of is not None
    loss.keep(of, at_target, sums, rows)
    return of


def _within(target: Tensor, columns: slice, classes: int) -> tuple[Tensor, Tensor]:
    # Places of targets [n, 1] in a part of the columns, and whether they lie there.
    inside = torch.ones_like(target, dtype=torch.bool)
    if columns.start > 0:
        inside &= target >= columns.start
    if columns.stop < classes:
        inside &= target < columns.stop
    return (target - columns.start).where(inside, 0), inside


def _part(masked: Tensor | None, columns: slice) -> Tensor | None:
    return None if masked is None else masked[columns]


def _scaled(u: Tensor, scales: Tensor, masked: Tensor | None) -> Tensor:  # u is written over
    # Logits times their scales; those of masked classes are so low that p is zero.
    u = torch.mul(u, scales, out=into(u))
    # Not minus infinity, of which a product with zero is NaN.
    return u if masked is None else filled(u, masked, torch.finfo(u.dtype).min / 4)


def _sum_of_active(u: Tensor, masked: Tensor | None) -> Tensor:  # u is written over
    return (u if masked is None else filled(u, masked, 0)).sum(-1)


@compilable
def _kl_block(
    u: Tensor,  # [1 + K, n, P], written over
    spare: Tensor,
    scales: Tensor,
    masked: Tensor | None,
    weights: Tensor | None,  # [K, n]
    gate: Gate,
    target: Tensor | None,  # [n, 1]
    upstream: Tensor | None,  # [n]
    with_g: bool,
) -> tuple[Tensor, ...]:
    u = _scaled(u, scales, masked)
    log_p = torch.log_softmax(u, 2, out=into(spare))
    p = torch.exp(log_p, out=into(u))
    log_q, of_teachers = log_p[0], log_p[1:]
    at_target = None
    if target is not None:
        at_target = of_teachers.gather(2, target.expand(len(of_teachers), -1, 1)).squeeze(2)
    own = torch.mul(p[1:], of_teachers, out=into(of_teachers)).sum(2)
    other = torch.mul(p[1:], log_q, out=into(of_teachers)).sum(2)
    if weights is None:
        weights = weights_of(gate, own, at_target)
    g = u[0]
    if with_g:
        of_g = weights if upstream is None else weights * upstream
        g = statistics.weighted_difference(p, of_g.unsqueeze(2))
    return own, other, weights, g


class TeacherKlLoss:
    """The loss of `teacher_kl`.

    Args:
        upstream: the upstream gradient of each row [N]; None for 1.
    """

    sums_classes = False  # whether it needs the sum of the logits of a row

    def __init__(self, x: TeacherKl, upstream: Tensor | None = None) -> None:
        # The student, then its teachers; [1 + K, 1, 1]; [P] bool, what does not take part; [N, 1].
        self.models = of_models(x[:3], x.teacher_features, x.teacher_prototypes)
        self.scales = torch.stack([x.scale, *x.teacher_scales]) / x.temperature
        self.scales = self.scales.reshape(-1, 1, 1)
        self.masked = None if x.class_mask is None else ~x.class_mask
        self.gate = Gate(x.gate_temperature, x.gate_entropy, x.gate_label)
        self.weights = None if x.weights is None else x.weights.to(x.scale.dtype).mT
        self.target = self._outside = None
        if x.weights is None and x.gate_label != 0 and x.target is not None:
            target, self._outside = in_range(x.target, len(x.prototypes))
            self.target = target.unsqueeze(1)
        self._x, self._upstream = x, upstream
        self._t2 = x.temperature**2 if x.scale_by_t2 else 1.0
        self.factor = self._t2 / x.temperature
        # E_k[log p_k], E_k[log q] and weights, [K, n] of each block.
        self.found: list[tuple[Tensor, ...]] = []

    def bound(self) -> Tensor | None:
        return results.bound(self._x.features, self._upstream, self._x.weights)

    def finished(self) -> tuple[Tensor, Sequence[Tensor]]:
        """The losses of all rows, and the details."""
        own, other, weights = (
            torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            for parts in zip(*self.found, strict=True)
        )
        if self._outside is not None:
            weights = weights.masked_fill(self._outside, torch.nan)
        kl = own - other
        if self._t2 != 1:
            kl = kl * self._t2
        return (weights * kl).sum(0), results.of_teachers(kl, weights, -own)

    def _weights(self, rows: slice) -> Tensor | None:
        return None if self.weights is None else self.weights[:, rows]

    def whole(self, u: Tensor, spare: Tensor, rows: slice, with_g: bool) -> Tensor:
        """Keep the losses of rows and return G, given the unscaled logits of all columns."""
        target = None if self.target is None else self.target[rows]
        upstream = None if self._upstream is None else self._upstream[rows]
        *found, g = _kl_block(
            u, spare, self.scales, self.masked, self._weights(rows), self.gate, target, upstream,
            with_g,
        )  # fmt: skip
        self.found.append(tuple(found))
        return g

    def keep(
        self, of: Statistics, at_target: Tensor | None, sums: Tensor | None, rows: slice
    ) -> None:
        """Keep the losses of rows, given their statistics.

        Args:
            at_target: [1 + K, n], the logits there.
            sums: [n], of the student's logits over the classes that take part.
        """
        weights = self._weights(rows)
        if weights is None:
            if at_target is not None:
                at_target = (at_target[1:] - of.top[1:]) - of.log_sum[1:]
            weights = weights_of(self.gate, of.own, at_target)
        self.found.append((of.own, of.other, weights))

    def gradient(self, p: Tensor, rows: slice, columns: slice) -> Tensor:
        """G of the rows that were kept last, given their softmaxes [1 + K, n, columns]."""
        weights = self.found[-1][2]
        if self._upstream is not None:
            weights = weights * self._upstream[rows]
        return statistics.weighted_difference(p, weights.unsqueeze(2))


@compilable
def _cross_entropy_block(
    u: Tensor,  # [1, n, P], written over
    spare: Tensor,
    scales: Tensor,
    masked: Tensor | None,
    target: Tensor,  # [n, 1]
    smoothing: float,
    uniform: Tensor | float,  # e / C of classes that take part, [P] where some do not
    count: Tensor | int,  # C
    upstream: Tensor | None,
    with_g: bool,
) -> tuple[Tensor, Tensor]:
    u = _scaled(u, scales, masked)
    log_q = torch.log_softmax(u, 2, out=into(spare))[0]
    at_target = log_q.gather(1, target)
    loss = at_target.squeeze(1) * (smoothing - 1)
    g = torch.exp(log_q, out=into(u[0])) if with_g else u[0]
    if smoothing:
        loss = loss - smoothing / count * _sum_of_active(log_q, masked)
    if with_g:
        _to_gradient(g, target, smoothing, uniform, None)
        if upstream is not None:
            g.mul_(upstream.unsqueeze(1))
    return loss, g


def _to_gradient(
    q: Tensor, target: Tensor, smoothing: float, uniform: Tensor | float, inside: Tensor | None
) -> None:
    # From a part of the softmax of rows to G; `inside` are the rows whose target lies in the part.
    if smoothing:
        q.sub_(uniform)
    at_target = q.gather(1, target) - (1 - smoothing)
    if inside is not None:
        at_target = at_target.where(inside, q.gather(1, target))
    q.scatter_(1, target, at_target)


class CrossEntropyLoss:
    """The loss of `prototype_cross_entropy`.

    Args:
        upstream: the upstream gradient of each row [N]; None for 1.
    """

    factor = 1.0

    def __init__(self, x: PrototypeCrossEntropy, upstream: Tensor | None = None) -> None:
        kept = x.target != x.ignore_index
        self.kept = kept.unsqueeze(1)
        if upstream is not None:
            upstream = upstream.where(kept, 0)
        self.models = [Products(x.features, x.prototypes, self.kept)]
        self.scales = x.scale.reshape(1, 1, 1)
        self.masked = None if x.class_mask is None else ~x.class_mask
        target, self._outside = in_range(x.target * kept, len(x.prototypes))
        self.target = target.unsqueeze(1)
        self.sums_classes = x.label_smoothing != 0
        self._smoothing = x.label_smoothing
        self._uniform: Tensor | float = x.label_smoothing / max(len(x.prototypes), 1)
        self._count: Tensor | int = len(x.prototypes)
        if x.class_mask is not None and self.sums_classes:
            self._count = x.class_mask.sum().to(x.scale.dtype)
            self._uniform = x.class_mask * (x.label_smoothing / self._count)
        self._features, self._upstream = x.features, upstream
        self.found: list[Tensor] = []

    def bound(self) -> Tensor | None:
        return results.bound(self._features, self._upstream)

    def finished(self) -> tuple[Tensor, Sequence[Tensor]]:
        """The losses of all rows, and no details."""
        rows = torch.cat(self.found) if len(self.found) > 1 else self.found[0]
        rows = rows * self.kept.squeeze(1)
        return rows if self._outside is None else rows.masked_fill(self._outside, torch.nan), ()

    def whole(self, u: Tensor, spare: Tensor, rows: slice, with_g: bool) -> Tensor:
        loss, g = _cross_entropy_block(
            u, spare, self.scales, self.masked, self.target[rows], self._smoothing, self._uniform,
            self._count, None if self._upstream is None else self._upstream[rows], with_g,
        )  # fmt: skip
        self.found.append(loss)
        return g

    def keep(
        self, of: Statistics, at_target: Tensor | None, sums: Tensor | None, rows: slice
    ) -> None:
        assert at_target is not None
        top, log_sum = of.top[0], of.log_sum[0]
        loss = (at_target[0] - top - log_sum) * (self._smoothing - 1)
        if sums is not None:
            loss = loss - self._smoothing * (sums / self._count - top - log_sum)
        self.found.append(loss)

    def gradient(self, p: Tensor, rows: slice, columns: slice) -> Tensor:
        place, inside = _within(self.target[rows], columns, len(self.models[0].w))
        uniform = self._uniform
        if isinstance(uniform, Tensor):
            uniform = uniform[columns]
        _to_gradient(p[0], place, self._smoothing, uniform, inside)
        if self._upstream is not None:
            p[0].mul_(self._upstream[rows].unsqueeze(1))
        return p[0]
