"""The losses in open_clip's place, in one process: calls, values, gradients, what is refused."""

from __future__ import annotations

import warnings

import open_clip.loss
import pytest
import torch

from mulki.losses import ClipLoss, DistillClipLoss, DualTeacherClipLoss, SigLipLoss
from tests.losses.two_towers import (
    OPEN_CLIP,
    OURS,
    TwoTowers,
    batch,
    extra,
    gradients,
    rows_of,
    truth,
)

KINDS = tuple(OURS)
GATES = ("uniform", "confidence", "label", "discrepancy")


def outputs(kind, n=6, gate="label", dtype=torch.float64):
    """A model, and what it and the teachers return."""
    model = TwoTowers().to(dtype)
    images, texts = batch(n, dtype)
    return model, model(images, texts) | extra(kind, images, texts, gate)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_the_kernels_of_the_cpu(kind, dtype):
    model, out = outputs(kind, n=70, dtype=torch.float32)
    out = {name: v.to(dtype) if "features" in name else v for name, v in out.items()}
    sum(OURS[kind]()(**out, output_dict=True).values()).backward()
    rounding = 1e-5 if dtype == torch.float32 else 3e-2
    for name, want in truth(kind, 70)[1].items():
        got = gradients(model)[name].double()
        assert (got - want).norm() <= rounding * want.norm() + 1e-7, name


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


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_two_teachers(gate, temperature):
    model, out = outputs("dual", gate=gate)
    options = {"gate": gate, "temperature": temperature}
    losses = DualTeacherClipLoss(**options)(**out, output_dict=True)
    sum(losses.values()).backward()
    rows, want = truth("dual", 6, **options)
    for name, value in losses.items():
        torch.testing.assert_close(value, rows[name].mean(), rtol=1e-12, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-9, atol=1e-12)


def test_two_equal_teachers_are_one():
    _, out = outputs("distill")
    twice = {k.replace("dist_", "prev_"): v for k, v in out.items() if "dist_" in k}
    one = DistillClipLoss(temperature=2.0)(**out)
    for gate in ("uniform", "confidence", "label"):
        both = DualTeacherClipLoss(gate=gate)(**out, **twice)
        torch.testing.assert_close(both, one, rtol=1e-12, atol=0)


def test_a_temperature_and_a_teacher_of_another_width():
    _, out = outputs("distill")
    assert out["dist_image_features"].shape[1] != out["image_features"].shape[1]
    loss = DistillClipLoss(temperature=2.5)
    _, distilled = loss(**out)
    want = rows_of("distill", out, temperature=2.5)["distill_loss"].mean()
    torch.testing.assert_close(distilled, want, rtol=1e-12, atol=0)
    z, teacher = (
        out[p + "logit_scale"] * out[p + "image_features"] @ out[p + "text_features"].T
        for p in ("", "dist_")
    )
    by_hand = (loss.dist_loss(teacher, z) + loss.dist_loss(teacher.T, z.T)) / 2
    torch.testing.assert_close(by_hand, want, rtol=1e-12, atol=0)
    theirs = open_clip.loss.DistillClipLoss().dist_loss(teacher, z)
    torch.testing.assert_close(DistillClipLoss().dist_loss(teacher, z), theirs)


def test_no_gradient_flows_to_a_teacher():
    _, out = outputs("dual")
    teachers = [name for name in out if name.startswith(("dist_", "prev_"))]
    for name in teachers:
        out[name] = out[name].detach().requires_grad_()
    sum(DualTeacherClipLoss()(**out)).backward()
    assert all(out[name].grad is None for name in teachers)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_may_be_floats_or_of_one_element(kind):
    _, out = outputs(kind)
    numbers = [name for name in out if "logit" in name]
    want = OURS[kind]()(**out, output_dict=True)
    for change in (lambda v: v.item(), lambda v: v.reshape(1)):
        got = OURS[kind]()(**out | {n: change(out[n]) for n in numbers}, output_dict=True)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value)


def test_siglip_without_a_bias():
    _, out = outputs("siglip")
    out["logit_bias"] = None
    torch.testing.assert_close(SigLipLoss()(**out), OPEN_CLIP["siglip"]()(**out))


@pytest.mark.parametrize("bias", [None, torch.tensor(-3.0, dtype=torch.float64)])
def test_helpers_are_those_of_open_clip(bias):
    _, out = outputs("clip")
    operands = out["image_features"], out["text_features"], out["logit_scale"], bias
    for mine, theirs in ((ClipLoss(), OPEN_CLIP["clip"]()), (ClipLoss(cache_labels=True),) * 2):
        matrices = zip(mine.get_logits(*operands), theirs.get_logits(*operands), strict=True)
        for a, b in matrices:
            torch.testing.assert_close(a, b)
        for _ in range(2):
            assert torch.equal(mine.get_ground_truth("cpu", 6), theirs.get_ground_truth("cpu", 6))
    mine, theirs = SigLipLoss(), OPEN_CLIP["siglip"]()
    torch.testing.assert_close(mine.get_logits(*operands), theirs.get_logits(*operands))
    for negative_only in (False, True):
        arguments = "cpu", torch.float32, 4, negative_only
        assert torch.equal(mine.get_ground_truth(*arguments), theirs.get_ground_truth(*arguments))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ClipLoss(use_horovod=False), ["use_horovod"]),
        (lambda: ClipLoss(False, True, True, 0, 1, False), ["use_horovod"]),
        (lambda: ClipLoss(smoothing=0.1, use_horovod=True), ["smoothing", "use_horovod"]),
        (lambda: DistillClipLoss(False, True, False, 0, 1, False), ["use_horovod"]),
        (lambda: DualTeacherClipLoss(use_horovod=False, other=1), ["use_horovod", "other"]),
        (lambda: SigLipLoss(chunk_size=128), ["chunk_size"]),
        (lambda: SigLipLoss(False, 0, 1, True, False), ["bidir", "chunk_size"]),
        (lambda: SigLipLoss(bidir=False, use_horovod=False), ["bidir", "use_horovod"]),
    ],
)
def test_legacy_keywords_are_accepted_with_one_warning(make, names):
    with pytest.warns(UserWarning) as caught:
        loss = make()
    (warning,) = caught
    assert all(name in str(warning.message) for name in names)
    if "bidir" in names:
        assert loss.dist_impl in ("bidir", "shift")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClipLoss(True, True, True, 0, 1),
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


def test_bidir_of_older_versions_chooses_the_ring():
    with pytest.warns(UserWarning):
        made = [SigLipLoss(bidir=True), SigLipLoss(bidir=False), SigLipLoss(False, 0, 1, False)]
    with pytest.warns(UserWarning, match=r"bidir \(read as dist_impl='shift'\)"):
        SigLipLoss(bidir=False)
    assert [loss.dist_impl for loss in made] == ["bidir", "shift", "shift"]
    assert SigLipLoss().dist_impl == "bidir"


def test_rows_that_are_not_normalised_are_warned_of_once():
    _, out = outputs("dual")
    out["prev_text_features"] = 3 * out["prev_text_features"]
    loss = DualTeacherClipLoss()
    with pytest.warns(UserWarning, match=r"prev_text_features: got rows of norm 3 to 3, wanted 1"):
        loss(**out)
    out["image_features"] = 2 * out["image_features"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(**out)
        half = {
            k: v.to(torch.bfloat16) if "features" in k else v for k, v in outputs("dual")[1].items()
        }
        DualTeacherClipLoss()(**half)  # rounding is no reason


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


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("clip", {"image_features": [1.0]}, TypeError, "image_features: got list"),
        ("clip", {"image_features": torch.ones(6)}, ValueError, "image_features: got shape"),
        ("clip", {"text_features": torch.ones(5, 5)}, ValueError, "text_features: got shape"),
        ("clip", {"text_features": torch.ones(6, 4)}, ValueError, "text_features: got shape"),
        ("clip", {"logit_scale": torch.ones(2)}, ValueError, "logit_scale: got shape"),
        ("siglip", {"logit_bias": "high"}, TypeError, "logit_bias: got str"),
        ("distill", {"dist_text_features": torch.ones(6, 3)}, ValueError, "dist_text_features"),
        ("distill", {"dist_text_features": None}, TypeError, "dist_text_features: got NoneType"),
        ("distill", {"dist_logit_scale": None}, TypeError, "dist_logit_scale: got NoneType"),
        ("dual", {"prev_logit_scale": torch.ones(3)}, ValueError, "prev_logit_scale: got shape"),
    ],
)
def test_what_does_not_fit_is_named(kind, change, error, message):
    _, out = outputs(kind, dtype=torch.float32)
    with pytest.raises(error, match=message):
        OURS[kind]()(**out | change)


def test_a_teacher_of_another_batch_is_refused():
    _, out = outputs("distill")
    for name in ("dist_image_features", "dist_text_features"):
        out[name] = out[name][:4]
    with pytest.raises(ValueError, match="dist_image_features: got 4 rows, wanted 6"):
        DistillClipLoss()(**out)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="dist_impl: got 'ring', wanted one of bidir"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="gate: got 'oracle', wanted one of uniform"):
        DualTeacherClipLoss(gate="oracle")
    _, out = outputs("distill")
    with pytest.raises(ValueError, match="temperature: got -1"):
        DistillClipLoss(temperature=-1)(**out)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_no_pairs_are_refused(kind):
    _, out = outputs(kind, n=0)
    with pytest.raises(ValueError, match="got no rows on any rank"):
        OURS[kind]()(**out)


@pytest.mark.parametrize(("name", "value"), [("rank", 1), ("world_size", 2)])
def test_ranks_without_a_process_group_are_refused(name, value):
    _, out = outputs("clip")
    with pytest.raises(ValueError, match=f"{name}: got {value}, but there is no process group"):
        ClipLoss(**{name: value})(**out)


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
