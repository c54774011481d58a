"""Whether a provider computes a case rightly: its loss and gradients against float64.

The yardstick is plain PyTorch in float64 on the rounded inputs. A result is right if its error is
no worse than that of an unfused computation, plus a tolerance. For mulki the inputs of that one are
widened to float32; for others it runs under autocast in their own dtype, which rounds the logits.
Of large cases both are computed in chunks of rows (`outcomes`), so that all of the result is
checked at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mulki.bench.cases import Case, Inputs
from mulki.bench.outcomes import Outcome, in_chunks
from mulki.bench.providers import PROVIDERS
from mulki.ops.backends import use_backend

#: Relative L2 error allowed on top of the unfused one's, by dtype: a few roundings of a result.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-3, "float16": 1e-3}

Compute = Callable[[Inputs], Outcome]


class Verifier:
    """The float64 outcome of a case, and the errors of unfused computations.

    Args:
        compute: the outcome of inputs, in plain PyTorch or by our functions, which then take the
            reference; None for that of the case.
    """

    def __init__(self, case: Case, inputs: Inputs, compute: Compute | None = None) -> None:
        compute = compute or partial(in_chunks, case)
        self._tolerance = TOLERANCE[case.dtype]
        with use_backend("reference"):
            self._truth = compute(case.inputs(torch.float64))
            self._widened = self.errors(compute(case.inputs(torch.float32)))
            with PROVIDERS["eager"].context(case):
                self._under_autocast = self.errors(compute(inputs))

    def errors(self, found: Outcome) -> dict[str, float]:
        """Relative L2 error of each outcome; infinite where it is not finite."""
        return {name: _error(value, self._truth[name]) for name, value in found.items()}

    def problems(self, errors: dict[str, float], strict: bool) -> list[str]:
        """What is wrong, in words; empty if nothing is.

        Args:
            strict: forgive no rounding of logits.
        """
        found = []
        for name, error in errors.items():
            unfused = (self._widened if strict else self._under_autocast)[name]
            allowed = (unfused if math.isfinite(unfused) else 0.0) + self._tolerance
            # A comparison that NaN fails, and infinity since what is allowed is finite.
            if not error <= allowed:
                found.append(f"{name}: relative error {error:.2g}, allowed {allowed:.2g}")
        return found


def worst_gradient(errors: dict[str, float]) -> float | None:
    """The largest error of a gradient; None where there is none."""
    of = (error for name, error in errors.items() if name.startswith("gradient"))
    return max(of, default=None)


def _error(found: Tensor, truth: Tensor) -> float:
    if found.shape != truth.shape or not found.isfinite().all():
        return float("inf")
    difference = torch.linalg.vector_norm(found.double() - truth)
    # Both may be zero, as the loss over a single class.
    return float(difference / torch.linalg.vector_norm(truth)) if difference else 0.0
