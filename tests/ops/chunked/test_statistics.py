"""Statistics of softmaxes: of parts, merged, are those of the whole."""

from __future__ import annotations

import pytest
import torch

from mulki.ops.chunked import statistics
from mulki.ops.chunked.statistics import Gate, merged, weights_of
from mulki.ops.gates import row_weights


def of(u: torch.Tensor, dim: int) -> statistics.Statistics:
    return statistics.of_part(u, dim, torch.empty_like(u), torch.empty_like(u))


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dim", [-1, -2])
def test_parts_together_are_the_whole(dim, scale):
    u = scale * torch.randn(3, 8, 8, dtype=torch.float64)
    parts = u.split([1, 5, 2], dim)
    found = merged(merged(of(parts[0], dim), of(parts[1], dim)), of(parts[2], dim))
    log_p = u.log_softmax(dim)
    p = log_p[1:].exp()
    expected = (
        u.amax(dim),
        (u - u.amax(dim, keepdim=True)).logsumexp(dim),
        (p * log_p[1:]).sum(dim),
        (p * log_p[0]).sum(dim),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    out = statistics.softmax(u, found, dim, torch.empty_like(u))
    torch.testing.assert_close(out, log_p.exp())


@pytest.mark.parametrize("gate", [Gate(1.0, 0.0, 0.0), Gate(2.0, 0.7, 0.0), Gate(0.5, 0.3, 1.5)])
def test_weights_are_those_of_the_gate(gate):
    log_p = torch.randn(6, 2, 9, dtype=torch.float64).log_softmax(-1)  # [N, K, P]
    target = torch.arange(6)
    own = (log_p.exp() * log_p).sum(-1)
    at_target = log_p[torch.arange(6), :, target]
    found = weights_of(gate, own.T, at_target.T)
    expected = row_weights(log_p, -own, gate.entropy, gate.label, target, gate.temperature)
    torch.testing.assert_close(found, expected.T)
