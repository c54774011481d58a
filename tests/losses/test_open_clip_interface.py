"""All losses in open_clip's place, in one process: constructors, calls, values, gradients."""

from __future__ import annotations

import warnings

import pytest
import torch

from mulki.losses import ClipLoss, DistillClipLoss, DualTeacherClipLoss, SigLipLoss
from tests.losses.two_towers import OPEN_CLIP, OURS, gradients, outputs, truth

KINDS = tuple(OURS)


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_values_and_gradients_are_those_of_open_clip(kind):
    found = []
    for losses in (OURS, OPEN_CLIP):
        model, out = outputs(kind)
        if kind == "distill":  # open_clip's takes no bias
            out = {name: v for name, v in out.items() if "bias" not in name}
        value = losses[kind]()(**out, output_dict=True)
        sum(value.values()).backward()
        found.append((value, gradients(model)))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=0)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forms_of_a_call(kind):
    _, out = outputs(kind)
    loss = OURS[kind]()
    named = loss(**out, output_dict=True)
    plain = loss(**out)
    values = plain if isinstance(plain, tuple) else (plain,)
    assert list(named) == ["contrastive_loss", "distill_loss"][: len(values)]
    assert all(v.shape == () and v.requires_grad for v in values)
    assert all(torch.equal(a, b) for a, b in zip(values, named.values(), strict=True))
    with torch.no_grad():
        for name, value in loss(**out, output_dict=True).items():
            torch.testing.assert_close(value, named[name].detach())
            assert not value.requires_grad
    bias = out.pop("logit_bias")
    if kind == "siglip":
        positional = loss(*out.values(), bias, True)
    elif kind == "clip":
        positional = loss(*out.values(), bias, True)
    else:
        out = {name: v for name, v in out.items() if "bias" not in name}
        positional = loss(*out.values(), True)
    for name, value in named.items():
        torch.testing.assert_close(positional[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_may_be_floats_or_of_one_element(kind):
    _, out = outputs(kind)
    numbers = [name for name in out if "logit" in name]
    want = OURS[kind]()(**out, output_dict=True)
    for change in (lambda v: v.item(), lambda v: v.reshape(1)):
        got = OURS[kind]()(**out | {n: change(out[n]) for n in numbers}, output_dict=True)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ClipLoss(use_horovod=True), ["use_horovod"]),
        (lambda: DistillClipLoss(False, True, False, 0, 1, True), ["use_horovod"]),
        (lambda: DualTeacherClipLoss(use_horovod=True), ["use_horovod"]),
        (lambda: SigLipLoss(chunk_size=128), ["chunk_size"]),
        (lambda: SigLipLoss(False, 0, 1, True, False), ["bidir", "chunk_size"]),
        (lambda: SigLipLoss(bidir=False, use_horovod=True), ["bidir", "use_horovod"]),
    ],
)
def test_legacy_keywords_are_accepted_with_one_warning(make, names):
    with pytest.warns(UserWarning) as caught:
        loss = make()
    (warning,) = caught
    assert all(name in str(warning.message) for name in names)
    if "bidir" in names:
        assert loss.dist_impl in ("bidir", "shift")


@pytest.mark.parametrize("loss", [ClipLoss, DistillClipLoss, DualTeacherClipLoss, SigLipLoss])
def test_a_keyword_that_open_clip_never_had_is_an_error(loss):
    with pytest.raises(TypeError, match="smoothing"):
        loss(smoothing=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClipLoss(True, True, True, 0, 1, False),
        lambda: ClipLoss(local_loss=False, gather_with_grad=True, cache_labels=True),
        lambda: DistillClipLoss(rank=0, world_size=1),
        lambda: SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl=None),
        lambda: SigLipLoss(True, 0, 1, "gather"),
    ],
)
def test_constructors_of_open_clip_do_not_warn(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = make()
        assert (loss.rank, loss.world_size) == (0, 1)
        kind = {ClipLoss: "clip", SigLipLoss: "siglip"}.get(type(loss), "distill")
        loss(**outputs(kind)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one(kind):
    model, out = outputs(kind, n=1)
    loss = OURS[kind]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = [loss(**out, output_dict=True) for _ in range(2)]
    assert len(caught) == (0 if kind == "siglip" else 1)
    assert all("a batch of one pair" in str(w.message) for w in caught)
    sum(values[0].values()).backward()
    rows, want = truth(kind, 1)
    for name, value in values[0].items():
        torch.testing.assert_close(value, rows[name].mean())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_rounds_features_alone(kind):
    model, out = outputs(kind, n=40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = OURS[kind]()(**out, output_dict=True)
    for name, rows in truth(kind, 40)[0].items():
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(rows.mean().item(), rel=1e-2)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["siglip", "distill"])
def test_a_compiled_loss_is_one_graph(kind):
    _, out = outputs(kind, dtype=torch.float32)
    loss = OURS[kind]()
    compiled = torch.compile(OURS[kind](), backend="aot_eager", fullgraph=True)
    for a, b in zip(*(f(**out, output_dict=True).values() for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_losses_with_other_gates_are_one_graph_each():
    """Numbers that differ between two losses of one kind are not known when they are compiled."""
    _, out = outputs("dual", dtype=torch.float32)
    for gate_temperature in (1.0, 0.5):
        loss = DualTeacherClipLoss(gate_temperature=gate_temperature)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for a, b in zip(compiled(**out), loss(**out), strict=True):
            torch.testing.assert_close(a, b)
