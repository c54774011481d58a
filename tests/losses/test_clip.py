"""The contrastive loss of CLIP alone: what open_clip's flags mean, and its matrices of logits."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mulki.losses import ClipLoss
from tests.losses.two_towers import OPEN_CLIP, UNEVEN, TwoTowers, batch, gradients, outputs, own
from tests.ranks import run_ranks


@pytest.mark.parametrize("bias", [None, torch.tensor(-3.0, dtype=torch.float64)])
def test_helpers_are_those_of_open_clip(bias):
    _, out = outputs("clip")
    operands = out["image_features"], out["text_features"], out["logit_scale"], bias
    for mine, theirs in ((ClipLoss(), OPEN_CLIP["clip"]()), (ClipLoss(cache_labels=True),) * 2):
        matrices = zip(mine.get_logits(*operands), theirs.get_logits(*operands), strict=True)
        for a, b in matrices:
            torch.testing.assert_close(a, b)
            a /= 2  # and leaves the other one as it is
        for _ in range(2):
            assert torch.equal(mine.get_ground_truth("cpu", 6), theirs.get_ground_truth("cpu", 6))


def test_cached_labels_are_of_use_in_training_too():
    loss = ClipLoss(cache_labels=True)
    with torch.inference_mode():
        loss.get_ground_truth("cpu", 6)
    assert not loss.get_ground_truth("cpu", 6).is_inference()


def flags_warned_of(rank: int, world: int) -> dict[str, list[str]]:
    images, texts = batch(3)
    out = TwoTowers().double()(images, texts)
    del out["logit_bias"]
    said = {}
    for name, flags in {
        "copied": {"rank": rank, "world_size": world},
        "local": {"local_loss": True},
        "gathered": {"local_loss": True, "gather_with_grad": True, "rank": rank},
        "plain": {},
    }.items():
        loss = ClipLoss(**flags)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                loss(**out)
        said[name] = [str(w.message) for w in caught]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alone = {n: v[: 1 - rank] if v.ndim else v for n, v in out.items()}
        ClipLoss()(**alone)
    said["one pair"] = [str(w.message) for w in caught]
    return said


def test_flags_that_open_clip_would_be_biased_by_are_warned_of_once():
    first, second = run_ranks(2, flags_warned_of)
    assert not any(second.values())  # one rank says it for all
    assert [len(first[name]) for name in ("copied", "local", "gathered", "plain")] == [1, 1, 0, 0]
    assert "1/2 as large" in first["copied"][0] and "biased" in first["local"][0]
    (one,) = first["one pair"]
    assert "a batch of one pair" in one


def helpers(rank: int, world: int) -> None:
    sizes = UNEVEN[world]
    images, texts = batch(sum(sizes))
    whole = TwoTowers().double()(images, texts)
    z = whole["logit_scale"] * whole["image_features"] @ whole["text_features"].T
    for local in (False, True):
        loss = ClipLoss(local_loss=local, gather_with_grad=True)
        model = TwoTowers().double()
        ddp = DistributedDataParallel(model)
        out = ddp(own(images, sizes, rank), own(texts, sizes, rank))
        bias = out.pop("logit_bias")
        per_image, per_text = loss.get_logits(**out, logit_bias=bias)
        labels = loss.get_ground_truth(images.device, len(per_image))
        want = (z + bias, z.T + bias)
        if local:
            want = tuple(own(one, sizes, rank) for one in want)
        torch.testing.assert_close((per_image, per_text), want)
        start = sum(sizes[:rank]) if local else 0
        assert labels.tolist() == list(range(start, start + len(per_image)))
        # A loss of one's own on the matrix: what all ranks compute, or each for its rows.
        share = world / sum(sizes)
        picked = per_image.log_softmax(1).gather(1, labels.unsqueeze(1)).sum() * share
        (-picked / (1 if local else world)).backward()
        got = gradients(model)
        reference = TwoTowers().double()
        of_all = reference(images, texts)
        logits = of_all["logit_scale"] * of_all["image_features"] @ of_all["text_features"].T
        (-logits.log_softmax(1).diagonal().mean() + 0 * of_all["logit_bias"]).backward()
        for name, gradient in gradients(reference).items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_logits_of_all_ranks():
    run_ranks(3, helpers)
