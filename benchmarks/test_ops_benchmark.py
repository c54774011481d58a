"""A small selection of the operator benchmark under pytest-benchmark.

pytest benchmarks --benchmark-only --benchmark-group-by=param:case,param:mode
pytest benchmarks --benchmark-only -k "dual_teacher_kl and not compile"

The whole of it, with providers taking turns, memory and a CSV, is `python -m benchmarks.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mulki.bench.cases import MODES, Case
from mulki.bench.losses import Loss
from mulki.bench.outcomes import outcome
from mulki.bench.providers import PROVIDERS
from mulki.bench.verify import Verifier

pytest.importorskip("pytest_benchmark")

CASES = [
    *(
        Case("dual_teacher_kl", n, p, 512, dtype)
        for n, p in ((64, 100), (256, 1000), (1024, 1000))
        for dtype in ("float32", "bfloat16")
    ),
    Case("prototype_cross_entropy", 256, 1000, 512, "float32"),
    Case("contrastive", 1024, 1024, 512, "float32"),
    Case("siglip", 1024, 1024, 512, "float32"),
    Case("similarity", 64, 100, 512, "float32"),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case.operator}-{case.shape}-{case.dtype}")
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=PROVIDERS)
def loss(request: pytest.FixtureRequest, case: Case, mode: str) -> Iterator[Loss]:
    """What the provider computes the case by, once it is verified."""
    provider = PROVIDERS[request.param]
    if reason := provider.absence(case.device) or provider.refusal(case):
        pytest.skip(reason)
    if provider.products:
        pytest.skip("computes no loss")
    if mode == "backward" and provider.early_gradients and case.operator != "similarity":
        pytest.skip("forms gradients in the forward pass")
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    with provider.context(case):
        found = provider.make(case)
        errors = verifier.errors(outcome(found, inputs))
        problems = verifier.problems(errors, provider.strict)
        assert not problems
        yield found


@pytest.mark.parametrize("mode", MODES)
def test_operator(benchmark: Any, case: Case, loss: Loss, mode: str) -> None:
    inputs = case.inputs()
    leaves = list(inputs.leaves.values())

    def backward(output: torch.Tensor) -> None:
        torch.autograd.grad(output, leaves, inputs.upstream)

    if mode == "forward":
        with torch.no_grad():
            benchmark(loss, *inputs.arguments)
    elif mode == "backward":
        # A graph is walked once, so every round has a new one, made outside the timing.
        benchmark.pedantic(
            backward, setup=lambda: ((loss(*inputs.arguments),), {}), rounds=50, warmup_rounds=3
        )
    else:
        benchmark(lambda: backward(loss(*inputs.arguments)))
