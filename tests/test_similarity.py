from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from mulki import Similarity
from mulki.ops.arguments import rounded

FLOAT = torch.float32


def test_materialize_is_the_scaled_matrix_of_dot_products(unit):
    x, w = unit(3, 4), unit(5, 4)
    got = Similarity(x, w, 2.5).materialize()
    for i in range(3):
        for j in range(5):
            assert got[i, j].item() == pytest.approx(2.5 * sum(x[i] * w[j]).item(), abs=1e-14)


def test_shape_dtype_device_and_default_scale(unit):
    s = Similarity(unit(3, 4), unit(5, 4))
    assert (s.shape, s.dtype, s.device) == ((3, 5), torch.float64, torch.device("cpu"))
    assert s.scale == 1.0


def test_transpose_swaps_the_roles(unit):
    s = Similarity(unit(3, 4), unit(5, 4), 3.0)
    assert s.T.shape == (5, 3)
    torch.testing.assert_close(s.T.materialize(), s.materialize().T)
    assert s.T.T.features is s.features


@pytest.mark.parametrize("which", [0, 1, 2, None])
def test_requires_grad_of_any_operand_and_detach_cuts_all(unit, which):
    operands = [unit(3, 4), unit(5, 4), torch.tensor(2.0)]
    if which is not None:
        operands[which].requires_grad_()
    s = Similarity(*operands)
    assert s.requires_grad == (which is not None)
    assert not s.detach().requires_grad
    torch.testing.assert_close(s.detach().materialize(), s.materialize().detach())


def test_gradcheck(unit):
    leaves = [unit(3, 4), unit(5, 4), torch.tensor(2.0, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda *o: Similarity(*o).materialize(), leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT])
def test_materialize_keeps_the_dtype_and_accumulates_in_float32(unit, dtype):
    x, w = unit(6, 300).to(dtype), unit(7, 300).to(dtype)
    got = Similarity(x, w, 50.0).materialize()
    assert got.dtype == dtype
    exact = 50.0 * x.double() @ w.double().T
    # One rounding of the result is all that half precision may cost.
    torch.testing.assert_close(got.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("scale_dtype", [FLOAT, torch.float64, torch.bfloat16])
def test_the_dtype_of_the_scale_does_not_decide_that_of_the_result(unit, scale_dtype):
    s = Similarity(unit(2, 3).float(), unit(2, 3).float(), torch.tensor(2.0, dtype=scale_dtype))
    assert s.materialize().dtype == FLOAT


def test_autocast_rounds_features_and_prototypes_alone(unit):
    x, w, scale = unit(3, 4).float(), unit(5, 4).float(), torch.tensor(7.123)
    with torch.autocast("cpu", torch.bfloat16):
        features, prototypes, kept = rounded((x, w, scale))
        materialized = Similarity(x, w, scale).materialize()
    assert features.equal(x.bfloat16()) and prototypes.equal(w.bfloat16())
    assert kept is scale
    assert materialized.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone(unit):
    s = Similarity(unit(3, 4), unit(5, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert rounded((s.features, s.prototypes, s.scale))[0] is s.features
        assert s.materialize().dtype == torch.float64


X, W = torch.ones(2, 3), torch.ones(4, 3)


def test_autocast_takes_mixed_dtypes_but_float64():
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Similarity(X.bfloat16(), W, 2.0)
        assert mixed.materialize().dtype == torch.bfloat16
        assert mixed.T.materialize().equal(mixed.materialize().T)
        for operands in ((X.bfloat16(), W.double()), (X.double(), W)):
            with pytest.raises(TypeError, match="^prototypes: got dtype"):
                Similarity(*operands)
    for use in (mixed.materialize, mixed.detach):
        with pytest.raises(TypeError, match="^prototypes: got dtype .*float32, .*bfloat16"):
            use()


def test_on_a_device_without_autocast():
    assert Similarity(X.to("meta"), W.to("meta"), 2.0).materialize().shape == (2, 4)


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        (([1.0], W), TypeError, "^features: got list"),
        ((X, None), TypeError, "^prototypes: got NoneType"),
        ((X.long(), W), TypeError, "^features: got dtype torch.int64"),
        ((X, W.bool()), TypeError, "^prototypes: got dtype torch.bool"),
        ((X[0], W), ValueError, r"^features: got shape \[3\]"),
        ((X, W[None]), ValueError, r"^prototypes: got shape \[1, 4, 3\]"),
        ((X, W[:, :2]), ValueError, r"^prototypes: got shape \[4, 2\]"),
        ((X, W[:0]), ValueError, r"^prototypes: got shape \[0, 3\]"),
        ((X, W.double()), TypeError, "^prototypes: got dtype torch.float64"),
        ((X, W.to("meta")), ValueError, "^prototypes: got device meta"),
        ((X, W, torch.ones(1)), ValueError, r"^scale: got shape \[1\]"),
        ((X, W, torch.tensor(1)), TypeError, "^scale: got dtype torch.int64"),
        ((X, W, torch.ones((), device="meta")), ValueError, "^scale: got device meta"),
        ((X, W, "100"), TypeError, "^scale: got str"),
        ((X, W, True), TypeError, "^scale: got bool"),
        ((X, W, None), TypeError, "^scale: got NoneType"),
    ],
)
def test_errors_name_the_argument(operands, error, message):
    with pytest.raises(error, match=message):
        Similarity(*operands)


def test_is_immutable(unit):
    with pytest.raises(AttributeError):
        Similarity(unit(2, 3), unit(2, 3)).scale = 2.0


def test_repr_is_one_line(unit):
    s = Similarity(unit(3, 4), unit(5, 4), torch.tensor(2.5, requires_grad=True))
    assert repr(s) == "Similarity([3, 5], width=4, scale=2.5, float64, cpu)"
    elsewhere = Similarity(*(torch.empty(3, 4, device="meta"),) * 2, torch.empty((), device="meta"))
    assert repr(elsewhere) == "Similarity([3, 3], width=4, scale=a tensor, float32, meta)"
    shown = []
    torch.vmap(lambda scale: shown.append(repr(replace(s, scale=scale))) or scale)(torch.ones(2))
    assert shown == ["Similarity([3, 5], width=4, scale=a tensor, float64, cpu)"]


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s @ torch.ones(5, 2),
        lambda s: torch.ones(2, 3) @ s,
        lambda s: s[0],
        lambda s: s + 1,
        lambda s: 2 * s,
        lambda s: s / 2,
        lambda s: -s,
        lambda s: torch.softmax(s, dim=1),
        lambda s: torch.nn.functional.cross_entropy(s, torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_used_as_a_tensor_it_names_materialize(use, unit):
    with pytest.raises(TypeError, match=r"call \.materialize\(\)"):
        use(Similarity(unit(3, 4), unit(5, 4)))


def test_attributes_of_tensors_name_materialize(unit):
    s = Similarity(unit(3, 4), unit(5, 4))
    with pytest.raises(AttributeError, match="'softmax'.*materialize"):
        s.softmax(dim=1)
    with pytest.raises(AttributeError, match="'nonsense'$"):
        s.nonsense()
    assert copy.deepcopy(s).shape == pickle.loads(pickle.dumps(s)).shape == (3, 5)
