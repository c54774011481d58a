"""Schemas, fake kernels, and what direct calls of the operators are refused for."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from mulki.ops.operators import OPERATORS
from tests.ops.op_cases import (
    FORMS,
    LABELS,
    LOSSES,
    NAMES,
    OPS,
    Case,
    asking,
    make,
    requiring_grad,
    run,
    with_argument,
)

FORMS = [(name, form) for name in NAMES for form in FORMS]
FORMS = [(n, f) for n, f in FORMS if n in LOSSES or f != "reduced"]
# Each operator, with and without the tensors that may be left out.
OPCHECKED = (
    "similarity",
    "ce",
    "ce_all",
    "kl",
    "kl_blend",
    "pairs_weights",
    "contrastive",
    "siglip",
)


@pytest.mark.parametrize(("name", "form"), [(n, f) for n, f in FORMS if n in OPCHECKED])
def test_opcheck(name, form, backend):
    case = make(name, dtype=torch.float64 if backend == "reference" else torch.bfloat16)
    if form != "backward":
        case = requiring_grad(case)
    case = asking(case, form)
    opcheck(getattr(OPS, case.op).default, case.args)


def test_opcheck_of_given_weights_and_of_scaled(unit):
    case = requiring_grad(make("kl_weights"), [True, False, True])
    case = with_argument(case, 6, case.args[6].requires_grad_())
    for form in ("rows", "reduced"):
        opcheck(OPS.teacher_kl.default, asking(case, form, [True, False, True]).args)
    given = unit(1, 1)[0, 0], unit(3, 4), unit(3, 4).bfloat16(), torch.zeros(())
    opcheck(OPS.scaled.default, given)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_fake_kernels_give_the_same_shapes_dtypes_and_strides(name, form, backend):
    for n, wanted in ((6, (True, False, True, False)), (0, (False, True, False, True))):
        case = make(name, n=n, dtype=torch.float32)
        # Transposed rows: the layout of the result must not follow.
        columns = [t.T.contiguous().T for t in case.args[:2]]
        case = Case(case.op, (*columns, *case.args[2:]))
        case = asking(case, form, wanted[: case.leaves])
        real = run(case)
        with FakeTensorMode() as mode:
            fake = run(Case(case.op, tuple(_fake(mode, a) for a in case.args)))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.is_contiguous() and b.is_contiguous()


def _fake(mode: FakeTensorMode, value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [mode.from_tensor(v) for v in value]
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


def test_both_namespaces_have_the_same_schemas():
    for op in OPERATORS:
        public, cpp = (str(getattr(space, op).default._schema) for space in _namespaces())
        assert public.replace("mulki::", "") == cpp.replace("mulki_cpp::", "")


def _namespaces():
    return torch.ops.mulki, torch.ops.mulki_cpp


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_no_argument_is_mutated_and_none_comes_back(name, form, backend):
    case = asking(make(name, dtype=torch.float32), form)
    tensors = [t for a in case.args for t in (a if isinstance(a, list) else [a])]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    before = [(t.clone(), t._version) for t in tensors]
    output = run(case)
    for tensor, (old, version) in zip(tensors, before, strict=True):
        assert tensor.equal(old) and tensor._version == version
    given = {t.untyped_storage().data_ptr() for t in tensors}
    for out in output:
        assert out.numel() == 0 or out.untyped_storage().data_ptr() not in given


# Of the first teacher of a case, and what the second one is called.
ONE, SIX, FIVE, SECOND = torch.ones(()), torch.ones(6, 4), torch.ones(5, 4), r"teachers\[1\]"


# Arguments are looked at before a backend is chosen: kernels check nothing.
@pytest.mark.parametrize(
    ("name", "position", "value", "error", "argument"),
    [
        ("similarity", 0, torch.ones(4), ValueError, "features"),
        ("similarity", 1, torch.ones(5, 3), ValueError, "prototypes"),
        ("similarity", 1, torch.ones(5, 4, dtype=torch.float16), TypeError, "prototypes"),
        ("similarity", 1, torch.ones(0, 4), ValueError, "prototypes"),
        ("similarity", 1, torch.ones(5, 4, device="meta"), ValueError, "prototypes"),
        ("similarity", 2, torch.ones(2), ValueError, "scale"),
        ("ce", 1, torch.ones(5, 3), ValueError, "prototypes"),
        ("ce", 3, LABELS + 2, ValueError, "target"),
        ("ce", 3, LABELS - 1, ValueError, "target"),
        ("ce", 3, LABELS[:5], ValueError, "target"),
        ("ce", 3, LABELS.int(), TypeError, "target"),
        ("ce", 3, LABELS.to("meta"), ValueError, "target"),
        ("ce_all", 3, LABELS + 1, ValueError, "target"),
        ("ce", 4, torch.ones(4).bool(), ValueError, "class_mask"),
        ("ce", 4, torch.ones(5), TypeError, "class_mask"),
        ("ce", 4, torch.zeros(5).bool(), ValueError, "class_mask"),
        ("ce", 4, torch.ones(5, device="meta").bool(), ValueError, "class_mask"),
        ("kl", 1, torch.ones(5, 3), ValueError, "prototypes"),
        ("kl_label", 7, LABELS + 2, ValueError, "target"),
        ("kl_label", 7, LABELS - 1, ValueError, "target"),
        ("kl_label", 7, LABELS + 1, ValueError, "target"),
        ("kl_label", 7, None, ValueError, "target"),
        ("kl", 12, 1.0, ValueError, "target"),
        ("kl", 8, torch.zeros(5).bool(), ValueError, "class_mask"),
        ("kl_weights", 6, torch.ones(6, 3), ValueError, "weights"),
        ("kl_weights", 6, torch.ones(5, 2), ValueError, "weights"),
        ("kl_weights", 6, torch.ones(12), ValueError, "weights"),
        ("kl_weights", 6, torch.ones(6, 2, device="meta"), ValueError, "weights"),
        ("kl", 9, 0.0, ValueError, "temperature"),
        ("kl", 10, -1.0, ValueError, "gate_temperature"),
        ("kl", 3, [], ValueError, "teacher_features"),
        ("kl", 4, [], ValueError, "teacher_prototypes"),
        # The second teacher alone.
        ("kl", 3, [SIX, torch.ones(5, 7)], ValueError, SECOND),
        ("kl", 3, [SIX, torch.ones(42)], ValueError, f"{SECOND}.features"),
        ("kl", 3, [SIX, torch.ones(6, 7, device="meta")], ValueError, f"{SECOND}.prototypes"),
        ("kl", 4, [FIVE, torch.ones(4, 7)], ValueError, SECOND),
        ("kl", 4, [FIVE, torch.ones(5, 3)], ValueError, f"{SECOND}.prototypes"),
        ("kl", 4, [FIVE, torch.ones(5, 7).half()], TypeError, f"{SECOND}.prototypes"),
        ("kl", 5, [ONE], ValueError, "teacher_scales"),
        ("kl", 5, [ONE, ONE.to("meta")], ValueError, r"teacher_scales\[1\]"),
        ("pairs_weights", 6, torch.ones(2, 6, 3), ValueError, "weights"),
        ("pairs", 1, torch.ones(5, 4), ValueError, "text_features"),
        ("pairs", 3, [], ValueError, "teacher_image_features"),
        ("pairs", 4, [], ValueError, "teacher_text_features"),
        ("pairs", 5, [ONE] * 3, ValueError, "teacher_scales"),
        ("pairs", 7, 0.0, ValueError, "temperature"),
        ("pairs", 8, -1.0, ValueError, "gate_temperature"),
        ("contrastive", 1, torch.ones(5, 4), ValueError, "text_features"),
        ("contrastive", 1, torch.ones(6, 4).half(), TypeError, "text_features"),
        ("contrastive", 1, torch.ones(6, 4, device="meta"), ValueError, "text_features"),
        ("siglip", 1, torch.ones(7, 3), ValueError, "text_features"),
        ("siglip", 3, torch.ones(2), ValueError, "logit_bias"),
    ],
)
def test_direct_calls_refuse_what_does_not_fit(name, position, value, error, argument):
    case = make(name, dtype=torch.float32)
    bad = with_argument(case, position, value)
    with pytest.raises(error, match=f"^{argument}: "):
        run(bad)
    if name in LOSSES:
        with pytest.raises(error, match=f"^{argument}: "):
            run(asking(bad, "reduced", [True] * case.leaves))


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_tensor_that_is_left_out_is_named(name, wanted):
    case = make(name, dtype=torch.float32)
    operator = OPERATORS[case.op]
    for place in operator.tensors:
        left_out = with_argument(case, place, None)
        with pytest.raises(TypeError, match=f"^{operator.arguments._fields[place]}: got None"):
            run(asking(left_out, "reduced", [wanted] * case.leaves))


@pytest.mark.parametrize("name", ["similarity", "siglip", "pairs"])
def test_what_is_asked_has_to_fit(name):
    case = make(name, dtype=torch.float32)
    leaves = case.leaves

    def ask(grad, reduction, wanted):
        run(Case(case.op, (*case.args, grad, reduction, wanted)))

    with pytest.raises(ValueError, match="^reduction: got 'max'"):
        ask(None, "max", [False] * leaves)
    with pytest.raises(ValueError, match="^wanted: got 2"):
        ask(None, "none", [True] * 2)
    with pytest.raises(ValueError, match="^grad: got shape"):
        ask(torch.ones(7), "none", [True] * leaves)
    with pytest.raises(ValueError, match="^grad: got"):
        # Of the rows for a sum; none for a matrix.
        asked = (None, "none") if name == "similarity" else (torch.ones(6), "sum")
        ask(*asked, [True] * leaves)
    _, second, third, *_ = OPERATORS[case.op].arguments._fields
    with pytest.raises(ValueError, match=f"^{second}: got shape"):
        run(asking(with_argument(case, 1, case.args[1][:, :3]), "backward"))
    with pytest.raises(TypeError, match=f"^{third}: got torch.float64"):
        run(with_argument(case, 2, case.args[2].double()))
