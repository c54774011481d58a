"""Whether a provider computes a case rightly: its loss and gradients against float64.

The yardstick is plain PyTorch in float64 on the rounded inputs. A result is right if its error is
no worse than that of an unfused computation, plus a tolerance. For mulki the inputs of that one are
widened to float32; for others it runs under autocast in their own dtype, which rounds the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mulki.bench.cases import Case, Inputs
from mulki.bench.losses import EAGER
from mulki.bench.outcomes import Outcome, outcome
from mulki.bench.providers import PROVIDERS

#: Relative L2 error allowed on top of the unfused one's, by dtype: a few roundings of a result.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-3, "float16": 1e-3}


class Verifier:
    """The float64 outcome of a case, and the errors of unfused computations."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        eager = EAGER[case.operator]
        self._tolerance = TOLERANCE[case.dtype]
        self._truth = outcome(eager, inputs.to(torch.float64))
        self._widened = self.errors(outcome(eager, inputs.to(torch.float32)))
        with PROVIDERS["eager"].context(case):
            self._under_autocast = self.errors(outcome(eager, inputs))

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
