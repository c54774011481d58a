"""Bits, streams, graphs, waits, memory and tensors beyond 2^31 elements, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mulki.bench.cases import VARIANTS, variant
from mulki.kernels.lookup import kernel
from mulki.ops.operators import Request
from mulki.ops.prototype_cross_entropy import PrototypeCrossEntropy
from mulki.ops.similarity import SimilarityMatrix
from tests.ops.oracle import check_case, computed

pytestmark = pytest.mark.gpu

NAMES = ("cosines", "ce_all", "kl_label", "kl_weights", "pairs_label", "contrastive", "siglip")
LOSSES = NAMES[1:]
SHAPES = ((19, 35, 20), (128, 1000, 512), (2500, 1201, 768), (128, 1000, 2048))


def step(name: str, n: int = 256, p: int = 1000, d: int = 512, dtype: str = "bfloat16"):
    """A step of a loss with all of its gradients."""
    inputs = variant(name, n, p, d, dtype, device="cuda").inputs()
    return lambda: list(computed(VARIANTS[name][0], inputs).values())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_values_at_shapes_of_every_schedule(name, shape, dtype):
    check_case(variant(name, *shape, dtype, device="cuda"), "none" if name == "cosines" else "mean")


@pytest.mark.parametrize("name", LOSSES)
def test_results_repeat_bit_for_bit(name):
    one = step(name)
    assert same(one(), one())


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_gpu(name):
    one = step(name)
    one()  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
        one()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_replays_a_step(name):
    one = step(name)
    want = one()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = one()
    for tensor in found:
        tensor.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(found, want)


def test_two_streams_at_once():
    steps = [step("kl_label"), step("siglip")]
    want = [one() for one in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    found = []
    for _ in range(20):
        for one, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(one())
    torch.cuda.synchronize()
    assert all(same(made, want[i % 2]) for i, made in enumerate(found))


@pytest.mark.parametrize("name", LOSSES)
def test_tensors_on_a_device_that_is_not_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = variant(name, 64, 100, 512, "bfloat16", device="cuda:1").inputs()
    found = list(computed(VARIANTS[name][0], inputs).values())
    assert all(t.device == torch.device("cuda:1") for t in found)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", ["kl_label", "ce_all", "siglip"])
def test_a_step_takes_no_memory_of_the_size_of_the_logits(name):
    one = step(name, 8192, 8192)
    one()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = one()
    kept = sum(t.untyped_storage().nbytes() for t in found)
    # G of a block, and dW in float32 beside what is returned.
    most = kept + (64 << 20) + 3 * 4 * 8192 * 512
    assert torch.cuda.max_memory_allocated() - before <= most


D = 512
MANY = 2**31 // D + 1000
LAST = 600  # rows that are compared, all of them beyond 2^31 elements


@pytest.fixture
def large():
    free = torch.cuda.mem_get_info()[0]
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free memory, and {free >> 30} GiB are free")
    yield
    torch.cuda.empty_cache()


def drawn(rows: int, width: int = D) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(rows)
    made = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    return made.normal_(generator=generator).mul_(width**-0.5)


def cross_entropy(x: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of rows, and the gradient of X for upstream gradients of one."""
    given = PrototypeCrossEntropy(x, w, torch.tensor(10.0, device="cuda"), target, None, 0.0, -100)
    run = kernel("prototype_cross_entropy")
    rows = run(given, Request(None, "none", [False] * 3))[0]
    grad = torch.ones(len(x), device="cuda")
    return rows, run(given, Request(grad, "none", [True, False, False]))[1]


def test_many_rows(large):
    x, w = drawn(MANY), drawn(8)
    target = torch.arange(MANY, device="cuda") % 8
    rows, of_x = cross_entropy(x, w, target)
    want, of_last = cross_entropy(x[-LAST:].clone(), w, target[-LAST:].clone())
    torch.testing.assert_close(rows[-LAST:], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_x[-LAST:], of_last, rtol=2e-2, atol=1e-4)


def test_many_prototypes(large):
    x, w = drawn(64), drawn(MANY)
    target = MANY - 1 - torch.arange(64, device="cuda")
    rows, _ = cross_entropy(x, w, target)
    z = torch.cat([10.0 * (x.double() @ part.double().T) for part in w.split(1 << 18)], dim=1)
    want = torch.nn.functional.cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(rows.double(), want, rtol=1e-4, atol=1e-4)


def test_a_large_matrix(large):
    x, w = drawn(65536 + 600, 32), drawn(32768, 32)
    given = SimilarityMatrix(x, w, torch.tensor(3.0, device="cuda"), False)
    z = kernel("similarity")(given, Request(None, "none", [False] * 3))[0]
    want = 3.0 * x[-LAST:].float() @ w.float().T
    torch.testing.assert_close(z[-LAST:].float(), want, rtol=1e-2, atol=1e-2)
