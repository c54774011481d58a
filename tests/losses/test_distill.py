"""Distillation from one teacher and from two: gates, temperatures, and what teachers may be."""

from __future__ import annotations

import warnings

import open_clip.loss
import pytest
import torch

from mulki.losses import DistillClipLoss, DualTeacherClipLoss
from tests.losses.two_towers import gradients, outputs, rows_of, truth

GATES = ("uniform", "confidence", "label", "discrepancy")


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


@pytest.mark.parametrize("upstream", [(1.0, 1.0), (8.0, 8.0), (1.0, 3.0), (1.0, None), (None, 2.0)])
@pytest.mark.parametrize("kind", ["distill", "dual"])
def test_losses_of_any_weights(kind, upstream):
    """The sum is one pass; what a user multiplies the losses by beside that is right too."""
    options = {"gate": "label"} if kind == "dual" else {}
    model, out = outputs(kind, **options)
    loss = (DualTeacherClipLoss if kind == "dual" else DistillClipLoss)(
        temperature=2.0, distill_weight=2.0, **options
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):  # tells once
            losses = loss(**out)
            given = [(one, by) for one, by in zip(losses, upstream, strict=True) if by is not None]
            ours = gradients_of(sum(by * one for one, by in given), model)
    about_weights = [one for one in told if "pass distill_weight=" in str(one.message)]
    assert len(about_weights) == (upstream[0] != upstream[1])
    rows = rows_of(kind, out, temperature=2.0, **options)
    weighted = rows["contrastive_loss"].mean(), 2 * rows["distill_loss"].mean()
    torch.testing.assert_close(losses, weighted, rtol=1e-12, atol=0)
    total = sum(by * one for one, by in zip(weighted, upstream, strict=True) if by is not None)
    torch.testing.assert_close(ours, gradients_of(total, model), rtol=1e-9, atol=1e-12)


def gradients_of(total, model):
    leaves = [parameter for name, parameter in model.named_parameters() if name != "logit_bias"]
    return torch.autograd.grad(total, leaves, retain_graph=True)


@pytest.mark.filterwarnings("ignore:.*pass distill_weight", "ignore:Anomaly")
@pytest.mark.parametrize("upstream", [(1.0, 1.0), (1.0, 3.0)])
def test_second_derivatives_are_refused(upstream):
    leaves = [torch.nn.functional.normalize(torch.rand(6, 5), dim=1).requires_grad_() for _ in "it"]
    scale = torch.tensor(9.0)
    with torch.autograd.set_detect_anomaly(True):
        losses = DistillClipLoss()(*leaves, scale, *(leaf.detach() for leaf in leaves), scale)
        total = sum(by * one for one, by in zip(losses, upstream, strict=True))
        first, _ = torch.autograd.grad(total, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward of .* is not supported"):
            torch.autograd.grad(first.sum(), leaves)


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


@pytest.mark.parametrize("gate", ["loss", "discrepancy"])
def test_an_exported_loss_takes_batches_of_other_sizes(gate):
    def pairs(n):
        features = torch.nn.functional.normalize(torch.rand(6, n, 5), dim=-1)
        return [x for k in (0, 2, 4) for x in (features[k], features[k + 1], torch.tensor(9.0))]

    loss, n = DualTeacherClipLoss(gate=gate), torch.export.Dim("n")
    shapes = ({0: n}, {0: n}, None) * 3
    exported = torch.export.export(loss, tuple(pairs(6)), dynamic_shapes=shapes, strict=False)
    another = pairs(9)
    torch.testing.assert_close(exported.module()(*another), loss(*another))


def test_no_gradient_flows_to_a_teacher():
    _, out = outputs("dual")
    teachers = [name for name in out if name.startswith(("dist_", "prev_"))]
    for name in teachers:
        out[name] = out[name].detach().requires_grad_()
    loss = DualTeacherClipLoss()
    with pytest.warns(UserWarning, match="dist_image_features: requires grad"):
        sum(loss(**out)).backward()
    assert all(out[name].grad is None for name in teachers)


def test_float64_goes_with_float64_alone():
    _, out = outputs("dual", dtype=torch.float32)
    for name in ("prev_image_features", "prev_text_features"):
        out[name] = out[name].double()
    with pytest.raises(TypeError, match="^prev_image_features: got dtype torch.float64"):
        DualTeacherClipLoss()(**out)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="^gate: got 'oracle'"):
        DualTeacherClipLoss(gate="oracle")
    for kind, name in (
        (DistillClipLoss, "temperature"),
        (DualTeacherClipLoss, "temperature"),
        (DualTeacherClipLoss, "gate_temperature"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got -1"):
            kind(**{name: -1})
        with pytest.raises(TypeError, match=f"^{name}: got str"):
            kind(**{name: "1"})
    for value, error in ((-1.0, ValueError), (float("inf"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="^distill_weight: got"):
            DistillClipLoss(distill_weight=value)
