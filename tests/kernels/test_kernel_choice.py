"""What is chosen without running a kernel: reasons, plans, launches."""

from __future__ import annotations

import importlib
import itertools
import json
import sys

import pytest
import torch
from torch.utils._pytree import tree_map_only

from mulki.kernels import lookup
from mulki.ops import backends
from mulki.ops.operators import OPERATORS, Request
from tests.kernels.triton_cases import make


@pytest.fixture
def triton(monkeypatch):
    """A module that can be imported as Triton, whether Triton is there or not."""
    monkeypatch.setitem(sys.modules, "triton", sys)


def test_every_operator_has_a_kernel():
    assert sorted(lookup.OPERATORS) == sorted(OPERATORS)


def test_reasons_without_a_gpu(triton, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    op = "teacher_kl"
    assert "no Triton kernel for it" in lookup.why_not("sort", "cuda", torch.float32)
    assert "not torch.float64" in lookup.why_not(op, "cuda", torch.float64)
    assert "TRITON_INTERPRET=1" in lookup.why_not(op, "cpu", torch.float32)
    assert "no GPU" in lookup.why_not(op, "cuda", torch.float32)
    assert "not mps" in lookup.why_not(op, "mps", torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert lookup.why_not(op, "cpu", torch.bfloat16) is None


@pytest.fixture
def cards(monkeypatch, triton):
    """An old GPU beside one that serves."""
    capabilities, names = [(7, 5), (8, 0)], ["an old card", "a new card"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    monkeypatch.setattr(lookup.toolchain, "missing", list)


def test_the_card_of_the_tensors_is_asked(cards):
    assert lookup.why_not("siglip", "cuda:1", torch.float32) is None
    for device in ("cuda:0", "cuda"):
        reason = lookup.why_not("siglip", device, torch.float32)
        assert "8.0" in reason and "an old card has 7.5" in reason


def test_what_triton_builds_with_is_looked_for(cards, monkeypatch):
    monkeypatch.setattr(lookup.toolchain, "missing", lambda: ["no gcc", "no Python.h"])
    assert lookup.why_not("siglip", "cuda:1", torch.float32) == "no gcc; no Python.h"


def test_an_older_torch_is_named(triton, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    assert "wants torch 2.11" in lookup.why_not("siglip", "cuda", torch.float32)


def test_reason_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = lookup.why_not("siglip", "cuda", torch.float32)
    assert reason.startswith("triton is not importable (") and "install" in reason


common = importlib.import_module("mulki.kernels.common")
schedule = importlib.import_module("mulki.kernels.schedule")


def test_precision(monkeypatch):
    monkeypatch.delenv("MULKI_INPUT_PRECISION", raising=False)
    single, half = torch.float32, torch.bfloat16
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert common.precision("sm_90", single) == "tf32x3"
        assert common.precision("gfx942", single) == "ieee"
        matmul.fp32_precision = "tf32"
        assert common.precision("sm_80", single) == "tf32"
        assert common.precision("gfx90a", single) == "ieee"
        assert common.precision("sm_80", half) == "ieee"
        monkeypatch.setenv("MULKI_INPUT_PRECISION", "ieee")
        assert common.precision("sm_80", single) == "ieee"
        monkeypatch.setenv("MULKI_INPUT_PRECISION", "high")
        with pytest.raises(ValueError, match="wanted one of ieee, tf32, tf32x3"):
            common.precision("sm_80", single)
        for architecture, refused in (("gfx942", "tf32x3"), ("gfx90a", "tf32")):
            monkeypatch.setenv("MULKI_INPUT_PRECISION", refused)
            with pytest.raises(ValueError, match=f"'{refused}', which {architecture} does not"):
                common.precision(architecture, single)
    finally:
        matmul.fp32_precision = before


@pytest.fixture
def launches():
    """Records the kernels that an operator would launch on an architecture."""
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    launch = importlib.import_module("mulki.kernels.launch")

    def of(op, *arguments, grad=None, reduction="mean", wanted=(True,) * 3):
        with launch.recording("sm_90") as made:
            x = OPERATORS[op].arguments(*arguments)
            lookup.kernel(op)(x, Request(grad, reduction, wanted))
        return [one for one in made if isinstance(one, launch.Launch)]

    return of


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(n, p, d=64, dtype=torch.bfloat16):
    return meta(n, d, dtype=dtype), meta(p, d, dtype=dtype), meta(dtype=torch.float32)


def test_the_device_of_the_tensors_is_made_the_current_one_once(launches, monkeypatch):
    noted, usual = [], lookup.current_device
    monkeypatch.setattr(
        lookup, "current_device", lambda device: (noted.append(device), usual(device))[1]
    )
    assert len(launches("contrastive", *operands(300, 300))) > 3
    assert noted == [torch.device("meta")]


@pytest.mark.parametrize(("n", "p"), [(20_000_000, 10), (10, 20_000_000)])
def test_grids_stay_within_their_limits(launches, n, p):
    rows = operands(n, p)
    target = meta(n, dtype=torch.int64)
    made = launches("similarity", *rows, True, wanted=(False,) * 3, reduction="none")
    made += launches("similarity", *rows, True, grad=meta(n, p), reduction="none")
    made += launches("prototype_cross_entropy", *rows, target, None, 0.1, -100)
    for one in made:
        assert 0 < one.grid[0] < 2**31 and all(0 < size <= 65535 for size in one.grid[1:])


def test_other_counts_are_no_other_kernel(launches):
    """What a kernel is compiled for, apart from tiles, does not follow N and P about."""
    ahead_of_time = importlib.import_module("benchmarks.kernels.ahead_of_time")
    found = set()
    for n, p in ((64, 4000), (65, 4016), (64, 4027), (63, 4039)):
        k = 2
        teachers = [meta(n, 64)] * k, [meta(p, 64)] * k, meta(k, dtype=torch.float32)
        target, mask = meta(n, dtype=torch.int64), meta(p, dtype=torch.bool)
        options = None, target, mask, 2.0, 1.0, 0.0, 1.0, True
        arguments = *operands(n, p), *teachers, *options
        for one in launches("teacher_kl", *arguments, wanted=(True, False, False)):
            variant = ahead_of_time._variant("", one, "sm_90", "bf16")
            parts = variant.kernel, variant.signature, variant.constants, variant.attributes
            found.add(repr(parts))
    assert len(found) == len({one.split(",")[0] for one in found})


def test_launches_of_every_operator_can_be_recorded():
    """On tensors without storage: nothing reads a value on the host."""
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    ahead_of_time = importlib.import_module("benchmarks.kernels.ahead_of_time")
    kernels_of = {}
    for key in itertools.product(("sm_90", "gfx942"), ahead_of_time.NUMBER_FORMATS):
        names = kernels_of[key] = set()
        for variant in ahead_of_time.variants(*key):
            names.add(variant.kernel.__name__)
            assert list(variant.signature) == variant.kernel.arg_names, variant.name
            assert variant.options["enable_fp_fusion"] is False
            json.dumps(list(variant.constants.values()))  # as Triton hands them to its hooks
            for i, (name, kind) in enumerate(variant.signature.items()):
                if not isinstance(kind, tuple):
                    assert ((i,) in variant.constants) == (kind == "constexpr"), name
    everywhere = {
        *("pair_gradient", "pair_rows", "project", "row_count", "row_inverse_norms"),
        *("row_totals", "siglip_rows", "stored_rows", "whole_rows"),
    }
    for (_, number_format), names in kernels_of.items():
        assert names == ({"scaled", "whole_rows"} if number_format == "fp16" else everywhere)
    assert len(kernels_of) == 10


def test_in_a_cuda_graph_the_library_multiplies(launches, monkeypatch):
    """What saves the host launches takes longer on the GPU."""
    rest = meta(64, dtype=torch.int64), None, 0.0, -100
    for capturing, wanted in ((False, "whole_rows"), (True, "stored_rows")):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing
        )
        made = launches("prototype_cross_entropy", *operands(64, 100, 512), *rest)
        assert wanted in [one.kernel.__name__ for one in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ce", "kl", "pairs", "contrastive", "siglip"])
def test_gradients_wait_in_the_dtype_that_every_backend_has(name, dtype):
    """bfloat16 has the range of float32. The library writes it where a gradient is one product."""
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    launch = importlib.import_module("mulki.kernels.launch")
    case = make(name, dtype, 6)
    values = tree_map_only(torch.Tensor, lambda t: t.to("meta"), case.args)
    of_operands = torch.float32 if dtype == torch.float16 else dtype
    wanted = [of_operands] * 2 + [torch.float32] * (case.leaves - 2)
    request = Request(None, "mean", [True] * case.leaves)
    x = OPERATORS[case.op].arguments(*values)
    with launch.recording("sm_90") as made:
        found = [lookup.kernel(case.op)(x, request)]
    found.append(backends.BACKENDS["chunked"].kernel(case.op)(x, request))
    found.append(getattr(torch.ops.mulki, case.op)(*x, *request))
    for one in found:
        assert [gradient.dtype for gradient in one[-case.leaves :]] == wanted
    *_, of_prototypes = (one.out.dtype for one in made if isinstance(one, launch.Product))
    assert of_prototypes == of_operands


WANTED = [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1)]  # gradients of X, W and the scale


def recorded(case, wanted, reduction="mean", grad=None):
    """All that a call launches, and its products."""
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    launch = importlib.import_module("mulki.kernels.launch")
    values = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (*case.args, grad))
    gradients = [*map(bool, wanted), *[False] * (case.leaves - 3)]
    with launch.recording("sm_90") as made:
        x = OPERATORS[case.op].arguments(*values[:-1])
        lookup.kernel(case.op)(x, Request(values[-1], reduction, gradients))
    return made, [one for one in made if isinstance(one, launch.Product)]


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(("name", "p"), [("ce", 35), ("ce", 1000), ("kl", 35), ("kl", 1000)])
def test_no_product_is_formed_that_nobody_wants(name, p, wanted):
    made, products = recorded(make(name, torch.bfloat16, 16, p, 64), wanted)
    whole_rows = importlib.import_module("mulki.kernels.whole_rows")
    products = [tuple(one.out.shape) for one in products]
    if p == 35:  # with those of the kernel, which writes dX itself
        (whole,) = (o.arguments for o in made if getattr(o, "kernel", 0) is whole_rows.whole_rows)
        of_whole = [whole[name] is not None for name in ("dx_ptr", "g_ptr")]
        assert of_whole == list(wanted[:2])
        assert products == [(p, 64)] * wanted[1]
    else:
        models = 3 if name == "kl" else 1
        assert products == [(16, p)] * models + [(16, 64)] * wanted[0] + [(p, 64)] * wanted[1]


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(("name", "models"), [("contrastive", 1), ("pairs", 3), ("siglip", 1)])
def test_no_product_of_pairs_is_formed_that_nobody_wants(name, models, wanted):
    _, products = recorded(make(name, torch.bfloat16, 48, d=64), wanted)
    shapes = [tuple(one.out.shape) for one in products]
    assert shapes == [(48, 48)] * models + [(48, 64)] * sum(wanted[:2])
    # dX is G W, and dW is G^T X.
    transposed = [one.a.stride(1) != 1 for one in products[models:]]
    assert transposed == [False] * wanted[0] + [True] * wanted[1]


@pytest.mark.parametrize("wanted", WANTED)
def test_no_product_of_similarity_is_formed_that_nobody_wants(wanted):
    case = make("similarity", torch.bfloat16, 16, 1000, 64)
    _, products = recorded(case, (0, 0, 0), "none")
    assert [tuple(one.out.shape) for one in products] == [(16, 1000)]
    _, products = recorded(case, wanted, "none", case.upstream())
    # The gradient of the scale is a sum over either of them.
    of_x = wanted[0] or not wanted[1]
    assert [tuple(one.out.shape) for one in products] == [(16, 64)] * of_x + [(1000, 64)] * wanted[
        1
    ]
