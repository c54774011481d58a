"""Streams, graphs, other devices and waits, through the public functions."""

from __future__ import annotations

import pytest
import torch

from mulki.bench import graphs
from tests.kernels.triton_cases import make
from tests.kernels.triton_checks import everything, moved
from tests.kernels.triton_steps import LOSSES, SIZES, Step

pytestmark = pytest.mark.gpu


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_replays_both_passes(name, size):
    step = Step(name, size)
    captured = graphs.capture(step, "cuda")
    first = [t.clone() for t in step()]
    step.draw_again()
    captured.replay()
    torch.cuda.synchronize()
    assert same(captured.outputs, step())
    assert not torch.equal(captured.outputs[0], first[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_gpu(name, size):
    step = Step(name, size)
    step()  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_would_be_noticed():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("size", SIZES)
def test_two_streams_at_once(size):
    steps = [Step("dual_teacher_kl", size), Step("siglip", size)]
    want = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    found = []
    for _ in range(20):
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step())
    torch.cuda.synchronize()
    for i, made in enumerate(found):
        assert same(made, want[i % 2])


def test_a_stream_that_is_not_the_default_one_is_waited_for():
    """The kernels run on the current stream: after what it has queued, and before what follows."""
    step = Step("cross_entropy")
    want = step()
    with torch.no_grad():
        right = step.x.clone()
        step.x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            step.x.copy_(right)
        found = step()
        with torch.no_grad():
            step.x.zero_()
    torch.cuda.synchronize()
    assert same(found, want)


@pytest.mark.parametrize("name", LOSSES)
def test_tensors_on_a_device_that_is_not_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    found = Step(name, device="cuda:1")()
    assert all(t.device == torch.device("cuda:1") for t in found)
    with torch.cuda.device(1):
        assert same(found, Step(name, device="cuda:1")())
    assert torch.cuda.current_device() == 0


def test_a_compiled_step_is_one_graph():
    step = Step("dual_teacher_kl")
    compiled = torch.compile(step.loss, fullgraph=True)
    loss = compiled()
    found = (loss.detach(), *torch.autograd.grad(loss, step.leaves))
    for one, other in zip(found, step(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)


def test_nothing_is_left_in_memory():
    case = moved(make("kl_label", torch.bfloat16, 256, 1000, 512), "cuda")
    upstream = case.upstream().cuda()
    everything(case, upstream)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        everything(case, upstream)
    assert torch.cuda.memory_allocated() == before
