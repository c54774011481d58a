"""Other packages beside the operators, without having any."""

from __future__ import annotations

import benchmarks.ops.packages  # noqa: F401
from mulki.bench.cases import Case
from mulki.bench.providers import PROVIDERS


def test_a_package_says_why_it_is_not_timed() -> None:
    assert PROVIDERS["memeff"].absence("cpu") == "wants a CUDA GPU"
    for name, operator, reason in (
        ("liger", "dual_teacher_kl", "no weight per row"),
        ("cce", "siglip", "cross-entropy alone"),
        ("memeff", "siglip", "contrastive loss alone"),
    ):
        assert reason in str(PROVIDERS[name].refusal(Case(operator, 4, 4, 8, "bfloat16")))
