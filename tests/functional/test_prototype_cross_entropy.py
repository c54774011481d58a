from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulki import Similarity
from mulki.functional import (
    REDUCTIONS,
    prototype_cross_entropy,
)
from tests.functional.formulas import (
    MASK,
    META,
    TARGET,
    N,
    P,
    S,
    X,
    assert_same_gradients,
    leaves,
    logits,
)


class TestPrototypeCrossEntropy:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("ignored", [(), (1, 4)])
    def test_equals_torch(self, student, reduction, smoothing, ignored):
        target = TARGET.clone()
        target[list(ignored)] = -100
        options = {"label_smoothing": smoothing, "reduction": reduction}
        got = prototype_cross_entropy(student, target, **options)
        expected = F.cross_entropy(logits(student), target, **options)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, leaves(student))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_a_mask_equals_removing_the_prototypes(self, student, reduction, smoothing):
        got = prototype_cross_entropy(
            student, TARGET, class_mask=MASK, label_smoothing=smoothing, reduction=reduction
        )
        place = MASK.cumsum(0) - 1
        expected = F.cross_entropy(
            logits(student)[:, MASK],
            place[TARGET],
            label_smoothing=smoothing,
            reduction=reduction,
        )
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, leaves(student))
        grad = torch.autograd.grad(got.sum(), student.prototypes)[0]
        assert grad[~MASK].eq(0).all() and grad[MASK].ne(0).any(dim=1).all()

    def test_a_class_may_be_the_ignored_index(self, student):
        got = prototype_cross_entropy(student, TARGET, ignore_index=3, label_smoothing=0.1)
        expected = F.cross_entropy(
            logits(student), TARGET, ignore_index=3, label_smoothing=0.1, reduction="none"
        )
        torch.testing.assert_close(got, expected.sum() / 4)

    def test_ignored_rows_do_not_touch_a_masked_first_class(self, student):
        mask = torch.tensor([False, True, True, True, True])
        target = torch.tensor([-100, 2, 3, -100, 2, -100])
        got = prototype_cross_entropy(student, target, class_mask=mask, label_smoothing=0.1)
        expected = F.cross_entropy(
            logits(student)[:, 1:], (target - 1).where(target > 0, -100), label_smoothing=0.1
        )
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, leaves(student))

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        n=st.integers(1, 7),
        p=st.integers(1, 9),
        d=st.integers(1, 6),
        scale=st.floats(-50, 100),
        smoothing=st.floats(0, 1),
        data=st.data(),
    )
    def test_any_mask_equals_removing_the_prototypes(self, unit, n, p, d, scale, smoothing, data):
        kept = sorted(data.draw(st.sets(st.integers(0, p - 1), min_size=1)))
        target = torch.tensor(
            data.draw(st.lists(st.sampled_from([*kept, -100]), min_size=n, max_size=n))
        )
        x, w = unit(n, d), unit(p, d)
        mask = torch.zeros(p, dtype=torch.bool)
        mask[kept] = True
        place = torch.tensor([kept.index(t) if t >= 0 else -100 for t in target.tolist()])
        torch.testing.assert_close(
            prototype_cross_entropy(
                Similarity(x, w, scale), target, label_smoothing=smoothing, class_mask=mask
            ),
            F.cross_entropy(scale * x @ w[kept].T, place, label_smoothing=smoothing),
            equal_nan=True,
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"similarity": X}, TypeError, "^similarity: got Tensor"),
        ({"target": [0] * N}, TypeError, r"^target: got list.*torch\.as_tensor"),
        ({"target": np.zeros(N, int)}, TypeError, r"^target: got ndarray.*torch\.as_tensor"),
        ({"target": TARGET.float()}, TypeError, "^target: got torch.float32"),
        ({"target": TARGET[:2]}, ValueError, r"^target: got shape \[2\], wanted \[6\]"),
        ({"target": TARGET.to(META)}, ValueError, "^target: got device meta"),
        ({"target": TARGET + 3}, ValueError, r"^target: .*3 to 6, wanted .* \[0, 5\) or ignore"),
        ({"target": TARGET - 1}, ValueError, "^target: got values from -1 to 2"),
        ({"target": TARGET + 1, "class_mask": MASK}, ValueError, "^target: holds class [14]"),
        ({"ignore_index": 3.0}, TypeError, "^ignore_index: got float"),
        ({"ignore_index": None}, TypeError, "^ignore_index: got NoneType"),
        ({"ignore_index": True}, TypeError, "^ignore_index: got bool"),
        ({"ignore_index": 2**63}, ValueError, "^ignore_index: got 9223372036854775808, .*64 bits"),
        ({"label_smoothing": "0.1"}, TypeError, "^label_smoothing: got str"),
        ({"label_smoothing": -0.1}, ValueError, "^label_smoothing: got -0.1"),
        ({"label_smoothing": 1.1}, ValueError, "^label_smoothing: got 1.1"),
        ({"label_smoothing": math.nan}, ValueError, "^label_smoothing: got nan"),
        ({"class_mask": [True] * P}, TypeError, "^class_mask: got list"),
        ({"class_mask": MASK.long()}, TypeError, "^class_mask: got torch.int64"),
        ({"class_mask": MASK[:4]}, ValueError, r"^class_mask: got shape \[4\], wanted \[5\]"),
        ({"class_mask": MASK[None]}, ValueError, r"^class_mask: got shape \[1, 5\]"),
        ({"class_mask": MASK.to(META)}, ValueError, "^class_mask: got device meta"),
        ({"class_mask": torch.zeros_like(MASK)}, ValueError, "^class_mask: masks every class"),
        ({"reduction": "batchmean"}, ValueError, "^reduction: got 'batchmean', .*none, sum, mean"),
    ],
)
def test_errors_of_cross_entropy_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        prototype_cross_entropy(**{"similarity": S, "target": TARGET, **arguments})
