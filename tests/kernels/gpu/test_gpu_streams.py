"""Streams, graphs, other devices and waits, through the public functions."""

from __future__ import annotations

import pytest
import torch
from triton_cases import make
from triton_checks import everything, moved

from mulki import Similarity, functional
from mulki.bench import graphs

pytestmark = pytest.mark.gpu

LOSSES = ("cross_entropy", "dual_teacher_kl", "contrastive", "siglip", "similarity")
SIZES = {"small": (64, 100, 512), "chunked": (4096, 1024, 64)}


class Step:
    """A forward and a backward pass of a public function, on leaves of its own."""

    def __init__(self, name, size="small", device="cuda"):
        n, p, d = SIZES[size]
        generator = torch.Generator(device).manual_seed(0)

        def rows(count, width=d):
            drawn = torch.randn(count, width, generator=generator, device=device)
            return torch.nn.functional.normalize(drawn, dim=1).bfloat16()

        def number(value):
            return torch.tensor(value, device=device).requires_grad_()

        self.name = name
        p = n if name in ("contrastive", "siglip") else p
        self.x, self.w = rows(n).requires_grad_(), rows(p).requires_grad_()
        self.scale, self.bias = number(20.0), number(-5.0)
        self.target = torch.randint(p, (n,), generator=generator, device=device)
        self.mask = torch.ones(p, dtype=torch.bool, device=device)
        self.first, self.second = (Similarity(rows(n, w), rows(p, w), 20.0) for w in (d, 2 * d))
        self.leaves = [self.x, self.w, self.scale]
        if name == "siglip":
            self.leaves.append(self.bias)

    def loss(self):
        pair = self.x, self.w, self.scale
        student = Similarity(*pair)
        if self.name == "cross_entropy":
            return functional.prototype_cross_entropy(
                student, self.target, label_smoothing=0.1, class_mask=self.mask
            )
        if self.name == "dual_teacher_kl":
            return functional.dual_teacher_kl(
                student, self.first, self.second, target=self.target, class_mask=self.mask
            )
        if self.name == "similarity":
            return functional.prototype_similarity(*pair, normalize=True).float().square().mean()
        if self.name == "contrastive":
            return functional.clip_contrastive(*pair)
        return functional.siglip(*pair, self.bias)

    def __call__(self):
        loss = self.loss()
        return (loss.detach(), *torch.autograd.grad(loss, self.leaves))

    def draw_again(self):
        with torch.no_grad():
            self.x.copy_(self.x.flip(0))
            self.w.copy_(self.w.flip(1))
            self.target.copy_(self.target.flip(0))
            self.scale.mul_(1.5)


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
