"""NaN and infinity in arguments, with and without `check_finite`."""

from __future__ import annotations

import math

import pytest
import torch

from mulki import Similarity
from mulki.functional import (
    dual_teacher_kl,
    prototype_cross_entropy,
    prototype_similarity,
    teacher_kl,
)
from tests.functional.formulas import TARGET, N, S, W, X


def spoilt(s, part, value):
    """The similarity with one bad value, in row 3 of features or prototypes."""
    parts = {"features": s.features.clone(), "prototypes": s.prototypes.clone(), "scale": s.scale}
    if part == "scale":
        parts["scale"] = value
    else:
        parts[part][3, 1] = value
    return Similarity(**parts)


@pytest.mark.parametrize(("value", "told"), [(math.nan, "NaN"), (-math.inf, "infinity")])
@pytest.mark.parametrize("part", ["features", "prototypes", "scale"])
def test_check_finite_names_the_argument_and_the_row(part, value, told):
    bad = spoilt(S, part, value)
    where = "" if part == "scale" else " in row 3"
    for name, call in {
        "similarity": lambda: prototype_cross_entropy(bad, TARGET, check_finite=True),
        "student": lambda: teacher_kl(bad, [S], check_finite=True),
        r"teachers\[1\]": lambda: dual_teacher_kl(S, S, bad, target=TARGET, check_finite=True),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}\.{part}: got {told}{where}, wanted finite"):
            call()
    with pytest.raises(ValueError, match=rf"^{part}: got {told}{where}"):
        prototype_similarity(bad.features, bad.prototypes, bad.scale, check_finite=True)


def test_check_finite_of_weights_and_of_what_is_fine():
    weights = torch.ones(N, 1)
    assert teacher_kl(S, [S], weights=weights, check_finite=True).isfinite()
    weights[4] = math.inf
    with pytest.raises(ValueError, match="^weights: got infinity in row 4"):
        teacher_kl(S, [S], weights=weights, check_finite=True)


def test_without_check_finite_values_pass_through():
    bad = spoilt(S, "features", math.nan)
    rows = prototype_cross_entropy(bad, TARGET, reduction="none")
    assert rows.isnan().tolist() == [i == 3 for i in range(N)]


def test_a_large_number_in_float64_is_finite():
    huge = Similarity(X.double(), W.double(), 1e300)
    assert prototype_cross_entropy(huge, TARGET, check_finite=True, reduction="none").shape == (N,)
