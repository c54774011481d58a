"""Bad arguments of `torch.ops.mulki` raise an error that names the argument, before a kernel runs.

The kernels check nothing. A kernel that ran on these arguments would read or write other memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.kernels import common
from mulki.ops import use_backend
from tests.kernels.triton_cases import Case, make

POSITIONS = {
    "similarity": ("features", "prototypes", "scale"),
    "prototype_cross_entropy": ("features", "prototypes", "scale", "target", "class_mask"),
    "teacher_kl": (
        *("features", "prototypes", "scale"),
        *("teacher_features", "teacher_prototypes", "teacher_scales"),
        *("weights", "target", "class_mask"),
    ),
    "contrastive": ("image_features", "text_features", "logit_scale"),
    "siglip": ("image_features", "text_features", "logit_scale", "logit_bias"),
}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setenv("MULKI_STRICT", "1")
    common.empty_float32(torch.ones(1), 1)  # the memory fixture wants an allocation
    with use_backend("triton"):
        yield


def narrow(t: Tensor) -> Tensor:
    return t[..., :3]


def short(t: Tensor) -> Tensor:
    return t[:3]


def empty(t: Tensor) -> Tensor:
    return t[:0]


def flat(t: Tensor) -> Tensor:
    return t.flatten()


def two(t: Tensor) -> Tensor:
    return t.expand(2)


def on_meta(t: Tensor) -> Tensor:
    return t.to("meta")


def of_second(change: Any) -> Any:
    return lambda tensors: [tensors[0], change(tensors[1])]


SHAPES = (
    *[(name, "features", flat) for name in ("similarity", "ce_all", "kl_label")],
    *[(name, "prototypes", narrow) for name in ("cosines", "ce_all", "kl_label")],
    *[(name, "prototypes", empty) for name in ("similarity", "ce_all", "kl_label")],
    *[(name, "scale", two) for name in ("similarity", "ce_all", "kl_label")],
    *[("ce_all", "target", change) for change in (short, on_meta)],
    *[("ce_all", "class_mask", change) for change in (short, on_meta)],
    *[("kl_label", "target", change) for change in (short, on_meta, lambda _: None)],
    *[("kl_blend", "target", lambda _: None), ("kl_label", "class_mask", short)],
    *[("kl_label", "teacher_features", of_second(change)) for change in (short, flat, on_meta)],
    *[("kl_label", "teacher_prototypes", of_second(change)) for change in (short, narrow, empty)],
    *[("kl_label", "teacher_prototypes", lambda tensors: tensors[:1])],
    *[("kl_label", "teacher_features", lambda tensors: [])],
    *[("kl_label", "teacher_scales", change) for change in (lambda t: t[:1], on_meta)],
    *[("kl_weights", "weights", change) for change in (short, flat, on_meta)],
    *[(name, "text_features", narrow) for name in ("contrastive", "siglip")],
    *[("contrastive", "text_features", short), ("contrastive", "text_features", on_meta)],
    *[(name, "logit_scale", two) for name in ("contrastive", "siglip")],
    *[("siglip", "logit_bias", two)],
)
DTYPES = (
    *[(name, "prototypes", Tensor.half) for name in ("similarity", "ce_all", "kl_label")],
    *[(name, "target", Tensor.int) for name in ("ce_all", "kl_label")],
    *[(name, "class_mask", Tensor.float) for name in ("ce_all", "kl_label")],
    *[("kl_label", "teacher_prototypes", of_second(Tensor.half))],
    *[(name, "text_features", Tensor.half) for name in ("contrastive", "siglip")],
)


def changed(case: Case, argument: str, change: Any) -> list[Any]:
    args = list(case.args)
    position = POSITIONS[case.op].index(argument)
    args[position] = change(args[position])
    return args


def calls(case: Case, args: list[Any]) -> list[tuple[Any, ...]]:
    """For the losses of rows and, of a loss, for the mean with its gradients."""
    rows = *args, None, "none", [False] * case.leaves
    mean = *args, None, "mean", [True] * case.leaves
    return [rows] if case.op == "similarity" else [rows, mean]


@pytest.mark.parametrize(
    ("name", "argument", "change", "error"),
    [*((*one, ValueError) for one in SHAPES), *((*one, TypeError) for one in DTYPES)],
)
def test_arguments_that_do_not_fit(name, argument, change, error):
    case = make(name)
    # A teacher is named by its place, whether its features or its prototypes do not fit.
    named = rf"teachers\[1\]|{argument}" if argument.startswith("teacher_") else argument
    for args in calls(case, changed(case, argument, change)):
        with pytest.raises(error, match=rf"^({named})(?!\w)"):
            getattr(torch.ops.mulki, case.op)(*args)


@pytest.mark.parametrize("name", ["similarity", "ce_all", "kl_weights", "contrastive", "siglip"])
def test_a_gradient_of_arguments_that_do_not_fit(name):
    case = make(name)
    n, op = case.x.shape[0], getattr(torch.ops.mulki, case.op)
    wanted = [True] * case.leaves
    grad = torch.ones(n, case.args[1].shape[0]) if case.op == "similarity" else torch.ones(n)
    assert op(*case.args, grad, "none", wanted)[0].shape == (0,)
    with pytest.raises(ValueError, match=r"\bgrad\b"):
        op(*case.args, grad[:3], "none", wanted)
    second = POSITIONS[case.op][1]
    with pytest.raises(ValueError, match=rf"\b{second}\b"):
        op(*changed(case, second, narrow), grad, "none", wanted)
    if case.op != "similarity":
        with pytest.raises(ValueError, match=r"\bgrad\b"):
            op(*case.args, grad, "mean", wanted)


def test_arguments_that_fit():
    """The calls above fail by their bad argument, not by how they are made."""
    for name in ("similarity", "ce_all", "kl_label", "kl_weights", "contrastive", "siglip"):
        case = make(name)
        for args in calls(case, list(case.args)):
            assert getattr(torch.ops.mulki, case.op)(*args)[0].isfinite().all()
