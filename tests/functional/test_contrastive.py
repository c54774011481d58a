from __future__ import annotations

import math

import open_clip.loss
import pytest
import torch

from mulki.functional import (
    REDUCTIONS,
    clip_contrastive,
    siglip,
)
from mulki.ops import loader, use_backend
from tests.functional.formulas import META, PAIRS, D, N, assert_same_gradients, scalar


class TestContrastive:
    @pytest.mark.parametrize("bias", [None, -3.0])
    def test_clip_equals_open_clip(self, unit, bias):
        x, w = unit(N, D).requires_grad_(), unit(N, D).requires_grad_()
        scale = scalar(9.0, requires_grad=True)
        got = clip_contrastive(x, w, scale, bias)
        expected = open_clip.loss.ClipLoss()(x, w, scale, bias)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, (x, w, scale))

    def test_siglip_equals_open_clip(self, unit):
        x, w = unit(N, D).requires_grad_(), unit(N, D).requires_grad_()
        scale, bias = scalar(9.0, requires_grad=True), scalar(-3.0, requires_grad=True)
        got = siglip(x, w, scale, bias)
        expected = open_clip.loss.SigLipLoss()(x, w, scale, bias)
        torch.testing.assert_close(got, expected)
        assert_same_gradients(got, expected, (x, w, scale, bias))

    def test_clip_rows_equal_a_loop(self, unit):
        x, w = unit(N, D), unit(N, D)
        z = (9.0 * x @ w.T).tolist()
        rows = []
        for i in range(N):
            of_row = math.log(sum(math.exp(z[i][j]) for j in range(N))) - z[i][i]
            of_column = math.log(sum(math.exp(z[j][i]) for j in range(N))) - z[i][i]
            rows.append((of_row + of_column) / 2)
        got = clip_contrastive(x, w, 9.0, reduction="none")
        torch.testing.assert_close(got, torch.tensor(rows, dtype=torch.float64))

    def test_siglip_rows_equal_a_loop(self, unit):
        x, w = unit(N, D), unit(N, D)
        z = (9.0 * x @ w.T - 3.0).tolist()
        rows = [
            sum(math.log(1 + math.exp(-z[i][j] if i == j else z[i][j])) for j in range(N))
            for i in range(N)
        ]
        got = siglip(x, w, 9.0, -3.0, reduction="none")
        torch.testing.assert_close(got, torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("loss", [clip_contrastive, siglip])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_features": None}, TypeError, "^image_features: got NoneType"),
        ({"text_features": PAIRS.long()}, TypeError, "^text_features: got dtype torch.int64"),
        ({"image_features": PAIRS[0]}, ValueError, r"^image_features: got shape \[4\]"),
        ({"text_features": PAIRS[:3]}, ValueError, r"^text_features: got shape \[3, 4\]"),
        ({"text_features": PAIRS[:0]}, ValueError, r"^text_features: got shape \[0, 4\], .*6, 4"),
        ({"text_features": PAIRS[:, :3]}, ValueError, r"^text_features: got shape \[6, 3\]"),
        ({"text_features": PAIRS.half()}, TypeError, "^text_features: got dtype torch.float16"),
        ({"text_features": PAIRS.to(META)}, ValueError, "^text_features: got device meta"),
        ({"logit_scale": torch.ones(N)}, ValueError, r"^logit_scale: got shape \[6\]"),
        ({"logit_scale": None}, TypeError, "^logit_scale: got NoneType"),
        ({"logit_bias": torch.ones(N)}, ValueError, r"^logit_bias: got shape \[6\]"),
        ({"logit_bias": "0"}, TypeError, "^logit_bias: got str"),
        ({"reduction": "avg"}, ValueError, "^reduction: got 'avg'"),
    ],
)
def test_errors_of_contrastive_losses_name_the_argument(loss, arguments, error, message):
    given = {"image_features": PAIRS, "text_features": PAIRS, "logit_scale": 1.0, "logit_bias": 0.0}
    with pytest.raises(error, match=message):
        loss(**{**given, **arguments})


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_no_pairs(backend, monkeypatch):
    if backend == "cpp" and (reason := loader.load()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("MULKI_STRICT", "1")
    for grad in (False, True):
        x, w = (PAIRS[:0].clone().requires_grad_(grad) for _ in range(2))
        for loss in (clip_contrastive, siglip):
            with use_backend(backend):
                rows, total, mean = (loss(x, w, 1.0, 0.0, reduction=r) for r in REDUCTIONS)
                assert rows.shape == (0,) and total == 0 and mean.isnan()
                if grad:
                    (dx,) = torch.autograd.grad(rows.sum() + total + mean, x)
                    assert dx.shape == (0, D)


def test_siglip_wants_a_bias():
    with pytest.raises(TypeError, match="^logit_bias: got None"):
        siglip(PAIRS, PAIRS, 1.0, None)


@pytest.mark.parametrize("loss", [clip_contrastive, siglip])
@pytest.mark.parametrize("name", ["image_features", "text_features", "logit_scale", "logit_bias"])
def test_check_finite_of_contrastive_losses(loss, name):
    given = {"image_features": PAIRS, "text_features": PAIRS, "logit_scale": 1.0, "logit_bias": 0.0}
    assert loss(**given, check_finite=True).isfinite()
    bad = PAIRS * torch.tensor(math.nan) if name.endswith("features") else torch.tensor(math.nan)
    with pytest.raises(ValueError, match=f"^{name}: got NaN"):
        loss(**{**given, name: bad}, check_finite=True)
