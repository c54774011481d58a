"""What the public functions say of arguments that do not fit, and of values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mulki import Similarity
from mulki.functional import (
    clip_contrastive,
    dual_teacher_kl,
    pair_teacher_kl,
    prototype_cross_entropy,
    prototype_similarity,
    siglip,
    teacher_kl,
)
from mulki.ops import use_backend

N, P, D = 6, 5, 4
MASK = torch.tensor([True, False, True, True, False])
TARGET = torch.tensor([0, 2, 3, 3, 2, 0])  # of classes that MASK lets take part
X, W = torch.ones(N, D), torch.ones(P, D)
S, PAIRS = Similarity(X, W), Similarity(X, X)
META = torch.device("meta")
ON_META = Similarity(X.to(META), W.to(META))
DOUBLE = Similarity(X.double(), W.double())
LEAF = Similarity(X, W.clone().requires_grad_())
NARROW = Similarity(X[:, :2], W[:, :2])

CE: tuple[Callable[..., Any], dict[str, Any]] = (
    prototype_cross_entropy,
    {"similarity": S, "target": TARGET},
)
KL: tuple[Callable[..., Any], dict[str, Any]] = teacher_kl, {"student": S, "teachers": [S]}
PAIR: tuple[Callable[..., Any], dict[str, Any]] = (
    pair_teacher_kl,
    {"student": PAIRS, "teachers": [PAIRS]},
)
OF_PAIRS = {"image_features": X, "text_features": X, "logit_scale": 1.0, "logit_bias": 0.0}
CLIP: tuple[Callable[..., Any], dict[str, Any]] = clip_contrastive, OF_PAIRS
SIGLIP: tuple[Callable[..., Any], dict[str, Any]] = siglip, OF_PAIRS


@pytest.mark.parametrize(
    ("call", "change", "error", "message"),
    [
        (CE, {"similarity": X}, TypeError, "^similarity: got Tensor"),
        (CE, {"target": [0] * N}, TypeError, r"^target: got list.*torch\.as_tensor"),
        (CE, {"target": np.zeros(N, int)}, TypeError, r"^target: got ndarray.*torch\.as_tensor"),
        (CE, {"target": TARGET.float()}, TypeError, "^target: got torch.float32"),
        (CE, {"target": TARGET[:2]}, ValueError, r"^target: got shape \[2\], wanted \[6\]"),
        (CE, {"target": TARGET.to(META)}, ValueError, "^target: got device meta"),
        (CE, {"target": TARGET + 3}, ValueError, r"^target: .*3 to 6, wanted .* \[0, 5\) or ign"),
        (CE, {"target": TARGET - 1}, ValueError, "^target: got values from -1 to 2"),
        (CE, {"target": TARGET + 1, "class_mask": MASK}, ValueError, "^target: holds class [14]"),
        (CE, {"ignore_index": 3.0}, TypeError, "^ignore_index: got float"),
        (CE, {"ignore_index": True}, TypeError, "^ignore_index: got bool"),
        (CE, {"ignore_index": 2**63}, ValueError, "^ignore_index: got 9223372036854775808, .*64"),
        (CE, {"label_smoothing": "0.1"}, TypeError, "^label_smoothing: got str"),
        (CE, {"label_smoothing": 1.1}, ValueError, "^label_smoothing: got 1.1"),
        (CE, {"label_smoothing": math.nan}, ValueError, "^label_smoothing: got nan"),
        (CE, {"class_mask": [True] * P}, TypeError, "^class_mask: got list"),
        (CE, {"class_mask": MASK.long()}, TypeError, "^class_mask: got torch.int64"),
        (CE, {"class_mask": MASK[:4]}, ValueError, r"^class_mask: got shape \[4\], wanted \[5\]"),
        (CE, {"class_mask": MASK.to(META)}, ValueError, "^class_mask: got device meta"),
        (CE, {"class_mask": torch.zeros_like(MASK)}, ValueError, "^class_mask: masks every class"),
        (CE, {"reduction": "avg"}, ValueError, "^reduction: got 'avg', .*none, sum, mean"),
        (KL, {"student": X}, TypeError, "^student: got Tensor"),
        (KL, {"teachers": S}, TypeError, "^teachers: got Similarity.*list"),
        (KL, {"teachers": []}, ValueError, "^teachers: got none"),
        (KL, {"teachers": [S, X]}, TypeError, r"^teachers\[1\]: got Tensor"),
        (KL, {"teachers": [S, S.T]}, ValueError, r"^teachers\[1\]: got shape \[5, 6\], wanted \[6"),
        (KL, {"teachers": [ON_META]}, ValueError, r"^teachers\[0\]: got device meta"),
        (KL, {"teachers": [S, LEAF]}, ValueError, r"^teachers\[1\]: requires grad"),
        (KL, {"teachers": [S, DOUBLE]}, TypeError, r"^teachers\[1\]: got dtype .*64, .*float32"),
        (KL, {"student": DOUBLE}, TypeError, r"^teachers\[0\]: got dtype .*float32, .*float64"),
        (KL, {"temperature": "2"}, TypeError, "^temperature: got str"),
        (KL, {"temperature": 0}, ValueError, "^temperature: got 0"),
        (KL, {"temperature": math.inf}, ValueError, "^temperature: got inf"),
        (KL, {"gate_temperature": None}, TypeError, "^gate_temperature: got NoneType"),
        (KL, {"gate_temperature": 0.0}, ValueError, "^gate_temperature: got 0"),
        (KL, {"gate": "lable"}, ValueError, "^gate: got 'lable', wanted one of uniform"),
        (KL, {"gate": "label"}, ValueError, "^target: got None"),
        (KL, {"gate": "label", "target": TARGET - 100}, ValueError, "^target: got values from -1"),
        (KL, {"gate": "discrepancy"}, ValueError, "^teachers: got features of shapes.*discrepancy"),
        (
            KL,
            {"gate": "discrepancy", "teachers": [S, NARROW]},
            ValueError,
            "^teachers: got features of shapes",
        ),
        (KL, {"gate": "blend"}, TypeError, "^gate_entropy: got NoneType"),
        (
            KL,
            {"weights": torch.ones(N, 1), "gate": "uniform"},
            ValueError,
            "^gate: got 'uniform' t",
        ),
        (KL, {"weights": 0.5}, TypeError, "^weights: got float"),
        (KL, {"weights": torch.ones(N, 1).long()}, TypeError, "^weights: got torch.int64"),
        (KL, {"weights": torch.ones(N)}, ValueError, r"^weights: got shape \[6\], wanted \[6, 1\]"),
        (KL, {"weights": torch.ones(N, 1, device=META)}, ValueError, "^weights: got device meta"),
        (KL, {"class_mask": MASK.long()}, TypeError, "^class_mask: got torch.int64"),
        (KL, {"reduction": "avg"}, ValueError, "^reduction: got 'avg'"),
        (PAIR, {"teachers": PAIRS}, TypeError, "^teachers: got Similarity"),
        (PAIR, {"teachers": []}, ValueError, "^teachers: got none"),
        (PAIR, {"student": S}, ValueError, r"^student: got shape \[6, 5\]"),
        (PAIR, {"weights": torch.ones(N, 1)}, ValueError, r"^weights: got shape \[6, 1\]"),
        (PAIR, {"temperature": 0.0}, ValueError, "^temperature: got 0.0"),
        (PAIR, {"gate": "oracle"}, ValueError, "^gate: got 'oracle'"),
        (PAIR, {"reduction": "max"}, ValueError, "^reduction: got 'max'"),
        *(
            (of, change, error, message)
            for of in (CLIP, SIGLIP)
            for change, error, message in (
                ({"image_features": None}, TypeError, "^image_features: got NoneType"),
                ({"text_features": X.long()}, TypeError, "^text_features: got dtype torch.int64"),
                ({"image_features": X[0]}, ValueError, r"^image_features: got shape \[4\]"),
                ({"text_features": X[:3]}, ValueError, r"^text_features: got shape \[3, 4\]"),
                ({"text_features": X[:0]}, ValueError, r"^text_features: got shape \[0, 4\], .*6,"),
                ({"text_features": X[:, :3]}, ValueError, r"^text_features: got shape \[6, 3\]"),
                ({"text_features": X.half()}, TypeError, "^text_features: got dtype torch.float16"),
                ({"text_features": X.to(META)}, ValueError, "^text_features: got device meta"),
                ({"logit_scale": torch.ones(N)}, ValueError, r"^logit_scale: got shape \[6\]"),
                ({"logit_scale": None}, TypeError, "^logit_scale: got NoneType"),
                ({"logit_bias": torch.ones(N)}, ValueError, r"^logit_bias: got shape \[6\]"),
                ({"logit_bias": "0"}, TypeError, "^logit_bias: got str"),
                ({"reduction": "avg"}, ValueError, "^reduction: got 'avg'"),
            )
        ),
        (SIGLIP, {"logit_bias": None}, TypeError, "^logit_bias: got None"),
    ],
)
def test_the_argument_is_named(
    call: tuple[Callable[..., Any], dict[str, Any]],
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    function, given = call
    with pytest.raises(error, match=message):
        function(**{**given, **change})


@pytest.mark.parametrize("distil", [teacher_kl, pair_teacher_kl])
def test_a_teacher_of_two_dtypes_is_named(distil: Callable[..., Any]) -> None:
    with torch.autocast("cpu"):
        mixed = Similarity(X, X.bfloat16(), 1.0)
    with pytest.raises(TypeError, match=r"^teachers\[1\]\.prototypes: got dtype torch.bfloat16"):
        distil(PAIRS, [PAIRS, mixed])


@pytest.mark.parametrize("size", ["0", "-1", "many", "inf", "nan"])
def test_a_size_of_chunks_that_is_none_is_refused(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULKI_CHUNK_MB", size)
    with use_backend("chunked"), pytest.raises(ValueError, match="^MULKI_CHUNK_MB: got"):
        prototype_cross_entropy(S, TARGET)


def spoilt(s: Similarity, part: str, value: float) -> Similarity:
    """The similarity with one bad value, in row 3 of features or prototypes."""
    parts: dict[str, Any] = {
        "features": s.features.clone(),
        "prototypes": s.prototypes.clone(),
        "scale": s.scale,
    }
    if part == "scale":
        parts["scale"] = value
    else:
        parts[part][3, 1] = value
    return Similarity(**parts)


@pytest.mark.parametrize(("value", "told"), [(math.nan, "NaN"), (-math.inf, "infinity")])
@pytest.mark.parametrize("part", ["features", "prototypes", "scale"])
def test_check_finite_names_the_argument_and_the_row(part: str, value: float, told: str) -> None:
    bad, bad_pairs = spoilt(S, part, value), spoilt(PAIRS, part, value)
    where = "" if part == "scale" else " in row 3"
    calls: dict[str, Callable[[], Any]] = {
        "similarity": lambda: prototype_cross_entropy(bad, TARGET, check_finite=True),
        "student": lambda: teacher_kl(bad, [S], check_finite=True),
        r"teachers\[1\]": lambda: dual_teacher_kl(S, S, bad, target=TARGET, check_finite=True),
        r"teachers\[0\]": lambda: pair_teacher_kl(PAIRS, [bad_pairs], check_finite=True),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name}\.{part}: got {told}{where}, wanted finite"):
            call()
    with pytest.raises(ValueError, match=rf"^{part}: got {told}{where}"):
        prototype_similarity(bad.features, bad.prototypes, bad.scale, check_finite=True)


def test_check_finite_of_weights_of_pairs_and_of_what_is_fine() -> None:
    weights = torch.ones(N, 1)
    assert teacher_kl(S, [S], weights=weights, check_finite=True).isfinite()
    weights[4] = math.inf
    with pytest.raises(ValueError, match="^weights: got infinity in row 4"):
        teacher_kl(S, [S], weights=weights, check_finite=True)
    nan = torch.tensor(math.nan)
    for loss, name in ((loss, name) for loss in (clip_contrastive, siglip) for name in OF_PAIRS):
        assert loss(**OF_PAIRS, check_finite=True).isfinite()
        bad = X * nan if name.endswith("features") else nan
        with pytest.raises(ValueError, match=f"^{name}: got NaN"):
            loss(**{**OF_PAIRS, name: bad}, check_finite=True)
    # A large number in float64 is finite.
    huge = Similarity(X.double(), W.double(), 1e300)
    assert prototype_cross_entropy(huge, TARGET, check_finite=True, reduction="none").shape == (N,)


def test_without_check_finite_values_pass_through() -> None:
    rows = prototype_cross_entropy(spoilt(S, "features", math.nan), TARGET, reduction="none")
    assert rows.isnan().tolist() == [i == 3 for i in range(N)]
