"""Statistics of softmaxes that are known of a part of their logits, and of all by merging.

Model 0 is the student, the K others are its teachers. With u the logits at the temperature of the
loss, p_k the softmax of teacher k and q that of the student over the same part:

    top       max_j u_j
    log_sum   log sum_j exp(u_j - top)
    own       E_k[log p_k], minus the entropy of teacher k
    other     E_k[log q], E_k the mean over p_k

`own` and `other` of a teacher that equals the student differ by the rounding of sums at most.
The weights of teachers are given, or those of a row-wise gate (`mulki.ops.gates`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mulki.ops.chunked.compiling import compilable, into


class Statistics(NamedTuple):
    top: Tensor  # [1 + K, n]
    log_sum: Tensor  # [1 + K, n]
    own: Tensor  # [K, n]
    other: Tensor  # [K, n]

    @classmethod
    def empty(cls, like: Tensor, models: int, n: int) -> Statistics:
        return cls(
            *(like.new_empty(count, n) for count in (models, models, models - 1, models - 1))
        )

    def at(self, part: slice) -> Statistics:
        """Those of some rows."""
        return Statistics(*(one[:, part] for one in self))

    def include(self, new: Statistics, is_first: bool) -> None:
        """Write those of the parts before and of a new one; of the new one if it is the first."""
        for to, value in zip(self, new if is_first else merged(self, new), strict=True):
            if len(to):
                to.copy_(value)


@compilable
def of_part(u: Tensor, dim: int, below: Tensor, e: Tensor) -> Statistics:
    """Of logits [1 + K, rows, columns] along a dimension; `below` and `e` are written over."""
    top = u.amax(dim, keepdim=True)
    below = torch.sub(u, top, out=into(below))
    e = torch.exp(below, out=into(e))
    sums = e.sum(dim)
    log_sum = sums.log()
    own = other = sums[1:]
    if len(u) > 1:
        of_student, of_teachers = below[0], below[1:]
        moments = torch.mul(e[1:], of_teachers, out=into(of_teachers)).sum(dim)
        own = moments.div_(sums[1:]).sub_(log_sum[1:])
        moments = torch.mul(e[1:], of_student, out=into(e[1:])).sum(dim)
        other = moments.div_(sums[1:]).sub_(log_sum[0])
    return Statistics(top.squeeze(dim), log_sum, own, other)


def merged(old: Statistics, new: Statistics) -> Statistics:
    """Of two parts together."""
    top = torch.maximum(old.top, new.top)
    # The difference of tops first: what is left has more digits.
    log_sums = [(part.top - top) + part.log_sum for part in (old, new)]
    log_sum = torch.logaddexp(*log_sums)
    own, other = torch.zeros_like(old.own), torch.zeros_like(old.other)
    for part, of_part in zip((old, new), log_sums, strict=True):
        log_share = of_part - log_sum
        share = log_share[1:].exp()
        own += share * (part.own + log_share[1:])
        other += share * (part.other + log_share[0])
    return Statistics(top, log_sum, own, other)


def softmax(u: Tensor, of: Statistics, dim: int, out: Tensor) -> Tensor:
    """The softmaxes [1 + K, rows, columns] of logits, written to `out`."""
    below = torch.sub(u, of.top.unsqueeze(dim), out=into(out))
    return below.sub_(of.log_sum.unsqueeze(dim)).exp_()


def weighted_difference(p: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k (q - p_k) of [1 + K, rows, columns], which are written over; `weights` fit K."""
    # Each difference is zero where a teacher is the student.
    g = torch.sub(p[0], p[1:], out=into(p[1:])).mul_(weights)
    return g[0] if len(g) == 1 else torch.sum(g, 0, out=into(p[0]))


class Gate(NamedTuple):
    temperature: float
    entropy: float  # a
    label: float  # b


def weights_of(
    gate: Gate,
    own: Tensor,  # [K, n], E_k[log p_k]
    at_target: Tensor | None,  # [K, n], log p_k of the target, wanted where b is not 0
) -> Tensor:  # [K, n]
    """softmax over k of (a E_k[log p_k] + b log p_k[target]) / temperature."""
    scores = []
    if gate.entropy:
        scores.append(own * (gate.entropy / gate.temperature))
    if gate.label:
        assert at_target is not None
        factor = gate.label / gate.temperature
        scores.append(at_target if factor == 1 else at_target * factor)
    if not scores:
        return torch.full_like(own, 1 / len(own))
    return torch.softmax(sum(scores[1:], scores[0]), 0)
