"""The operators as torch sees them: schemas, fake kernels, tracing, and calls that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mulki.bench import cases
from mulki.bench.cases import VARIANTS, variant
from mulki.bench.losses import MULKI
from mulki.ops import use_backend
from mulki.ops.operators import OPERATORS
from tests.ops.conftest import Backend

#: Each operator with and without the tensors that may be left out.
CHECKED = (
    *("ce", "ce_all", "kl", "kl_blend", "kl_weights"),
    *("pairs", "pairs_weights", "contrastive", "siglip"),
)


class Calls(TorchDispatchMode):
    """The calls of operators of mulki."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mulki" and func.overloadpacket.__name__ in OPERATORS:
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def call_of(name: str, backend: Backend, reduction: str) -> tuple[Any, tuple[Any, ...]]:
    """The operator that the public function of a variant calls, and its arguments."""
    dtype = torch.float64 if backend.name == "reference" else None
    case = variant(name, 7, 5, 4, device=backend.device)
    with Calls() as calls:
        case.inputs(dtype).call(MULKI[case.operator], reduction=reduction)
    ((operator, args),) = calls.made
    leaves = OPERATORS[operator.overloadpacket.__name__].leaves
    fresh = [t.detach().clone().requires_grad_() for t in args[:leaves]]
    return operator, (*fresh, *args[leaves:])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str, reduction: str, backend: Backend) -> None:
    """Nothing is mutated or handed back; fake kernels give shapes and strides; it traces."""
    operator, args = call_of(name, backend, reduction)
    opcheck(operator, args)


@pytest.mark.parametrize("name", CHECKED)
def test_fake_kernels_of_gradients_and_of_no_rows(name: str, backend: Backend) -> None:
    """Of transposed operands, whose layout results must not follow."""
    operator, (*args, _, _, wanted) = call_of(name, backend, "mean")
    x, w = (t.detach() for t in args[:2])
    grad = torch.ones(7, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    backward = grad.to(backend.device), "none", [True, False, *wanted[2:]]
    columns = [t.T.contiguous().T for t in (x, w)]
    plain = [t.detach() if isinstance(t, Tensor) else t for t in args[2:]]
    opcheck(operator, (*columns, *plain, *backward), test_utils="test_faketensor")


def test_only_asked_gradients_are_asked_of_a_kernel(backend: Backend) -> None:
    """It is what saves two of five products for a frozen text side."""
    case = variant("kl_label", device=backend.device)
    for frozen in (["prototypes"], ["features", "scale"]):
        inputs = case.inputs().without(frozen)
        with Calls() as calls:
            inputs.call(MULKI[case.operator]).backward()
        (_, args), *_ = calls.made
        assert args[-1] == [leaf not in frozen for leaf in ("features", "prototypes", "scale")]


def test_a_gradient_that_was_not_asked_for_is_an_error(backend: Backend) -> None:
    operator, (*args, _) = call_of("ce", backend, "mean")
    loss = operator(*args, [True, False, True])[0]
    with pytest.raises(RuntimeError, match=r"^wanted\[1\]: got False"):
        loss.backward()


def test_every_operator_has_a_variant_and_both_namespaces_the_same_schema() -> None:
    assert {*OPERATORS} <= {cases.OPERATORS[operator].name for operator, _ in VARIANTS.values()}
    for name in OPERATORS:
        public, cpp = (
            getattr(space, name).default._schema for space in (torch.ops.mulki, torch.ops.mulki_cpp)
        )
        assert str(public).replace("mulki::", "") == str(cpp).replace("mulki_cpp::", "")


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("siglip", {-2: "max"}, ValueError, "^reduction: got 'max'"),
        ("siglip", {-1: [True] * 2}, ValueError, "^wanted: got 2"),
        ("ce", {-3: torch.ones(9), -2: "none"}, ValueError, "^grad: got shape"),
        ("ce", {-3: torch.ones(7), -2: "sum"}, ValueError, "^grad: got"),
        ("ce", {0: None}, TypeError, "^features: got None"),
        ("kl", {1: torch.ones(5, 3)}, ValueError, "^prototypes: got shape"),
        ("contrastive", {2: torch.ones((), dtype=torch.float64)}, TypeError, "^logit_scale: got"),
        ("siglip", {3: torch.ones(2)}, ValueError, "^logit_bias: got shape"),
        ("ce", {3: torch.full((7,), 99)}, ValueError, "^target: got values from 99 to 99"),
    ],
)
def test_direct_calls_refuse_what_does_not_fit(
    name: str, change: dict[int, Any], error: type[Exception], message: str
) -> None:
    """Arguments are looked at before a backend is chosen, in compiled code too."""
    case = variant(name, 7, 5, 4)
    with Calls() as calls:
        case.inputs().call(MULKI[case.operator])
    operator, args = calls.made[0]
    bad = [a.detach() if isinstance(a, Tensor) else a for a in args]
    for place, value in change.items():
        bad[place] = value
    with pytest.raises(error, match=message):
        operator(*bad)


def test_targets_are_checked_in_compiled_code_too() -> None:
    case = variant("ce")
    inputs = case.inputs()
    *rest, target = inputs.arguments
    compiled = torch.compile(
        lambda target: MULKI[case.operator](*rest, target), backend="eager", fullgraph=True
    )
    with use_backend("chunked"):
        compiled(target)
        with pytest.raises(ValueError, match="target"):
            compiled(target + 99)
