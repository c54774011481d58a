"""Cases whose rows, columns and casts are cut, against the reference and against float64."""

from __future__ import annotations

import torch

from mulki.ops import use_backend
from tests.ops.op_cases import FORMS, LOSSES, asking, make, run
from tests.ops.rounding import DTYPES, check

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def same_as_the_reference(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Values, by-products and gradients of all forms, with their shapes and dtypes."""
    for dtype in dtypes:
        for form in FORMS if name in LOSSES else FORMS[:2]:
            case = asking(make(name, n=19, p=23, d=7, dtype=dtype), form)
            found = run(case)
            with use_backend("reference"):
                expected = run(case)
            for one, other in zip(found, expected, strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                error = (one.double() - other.double()).norm()
                assert error <= TOLERANCES[dtype] * (other.double().norm() + 1e-3), (form, dtype)


def right(name: str) -> None:
    """In all dtypes as the reference, and with no more rounding than PyTorch's in float32."""
    same_as_the_reference(name, (torch.float64, *DTYPES))
    for gap in (None, 0.01):
        case = make(name, n=19, p=53, d=33, dtype=torch.float32, scale=50.0, gap=gap)
        check(case, True if name in LOSSES else None)
