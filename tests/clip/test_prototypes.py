from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mulki.clip import prototypes
from mulki.clip.prototypes import Prototypes, class_means, class_sums


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=20))
def test_class_sums_and_counts_equal_a_loop(labels):
    features = torch.arange(3 * len(labels), dtype=torch.float64).reshape(-1, 3)
    sums, counts = class_sums(features, torch.tensor(labels, dtype=torch.int64), 5)
    assert counts.tolist() == [labels.count(c) for c in range(5)]
    for c in range(5):
        rows = [features[i] for i, label in enumerate(labels) if label == c]
        assert sums[c].tolist() == torch.stack([torch.zeros(3).double(), *rows]).sum(0).tolist()


def test_class_sums_are_not_rounded_under_autocast(unit):
    features, target = unit(9, 4).float(), torch.arange(9) % 3
    expected, _ = class_sums(features, target, 3)
    with torch.autocast("cpu", torch.bfloat16):
        sums, _ = class_sums(features, target, 3)
    assert sums.dtype == torch.float32
    assert sums.equal(expected)


def test_class_means_are_unit_rows_along_the_means(unit):
    features, target = unit(7, 4), torch.tensor([1, 0, 1, 2, 2, 2, 0])
    means = class_means(features, target, 3)
    for c in range(3):
        mean = features[target == c].mean(dim=0)
        torch.testing.assert_close(means[c], mean / mean.norm())


def test_class_means_refuse_a_target_that_is_no_class(unit):
    for label in (-1, 3):
        with pytest.raises(ValueError, match="^target: got values"):
            class_means(unit(4, 4), torch.tensor([0, 1, 2, label]), 3)
    with pytest.raises(TypeError, match="^target: got torch.float32"):
        class_means(unit(3, 4), torch.tensor([0.0, 1.0, 2.0]), 3)
    with pytest.raises(TypeError, match="^target: got list"):
        class_means(unit(3, 4), [0, 1, 2], 3)


def test_class_means_refuse_a_class_without_samples(unit):
    with pytest.raises(ValueError, match="^target: .*class 1 "):
        class_means(unit(2, 4), torch.tensor([0, 2]), 3)


def test_ema_moves_the_classes_of_the_batch_alone(unit, target):
    start, features = unit(4, 5), unit(6, 5)
    prototypes = Prototypes(start, "ema", momentum=0.75)
    prototypes.observe(features, target)
    for c in range(3):
        moved = 0.75 * start[c] + 0.25 * features[target == c].mean(dim=0)
        torch.testing.assert_close(prototypes()[c], moved / moved.norm())
    assert prototypes()[3].equal(start[3])


def test_ema_end_points_of_the_momentum(unit, target):
    start, features = unit(4, 5), unit(6, 5)
    stays, follows = Prototypes(start, "ema", 1.0), Prototypes(start, "ema", 0.0)
    stays.observe(features, target)
    follows.observe(features, target)
    torch.testing.assert_close(stays(), start)
    torch.testing.assert_close(follows()[:3], class_means(features, target, 4 - 1))


def test_ema_does_not_spoil_a_graph_that_saved_the_prototypes(unit, target):
    prototypes, features = Prototypes(unit(4, 5)), unit(6, 5).requires_grad_()
    before = prototypes()
    kept = before.clone()
    loss = (features @ before.T).square().sum()
    prototypes.observe(features, target)
    assert before.equal(kept)
    loss.backward()
    torch.testing.assert_close(features.grad, 2 * (features @ kept.T @ kept).detach())


def test_ema_takes_half_precision_features_in_its_own_dtype(unit, target):
    start = unit(4, 5).float()
    prototypes = Prototypes(start)
    prototypes.observe(unit(6, 5).bfloat16().requires_grad_(), target)
    assert prototypes().dtype == torch.float32
    assert not prototypes().requires_grad


def test_batch_compares_a_batch_with_the_prototypes_it_has_moved(unit, target):
    start, features = unit(4, 5), unit(6, 5).requires_grad_()
    averaged, moved = Prototypes(start, "ema", 0.8), Prototypes(start, "batch", 0.8)
    assert averaged.with_batch(features, target).equal(start)
    seen = moved.with_batch(features, target)
    assert moved().equal(start)
    averaged.observe(features, target)
    moved.observe(features, target)
    torch.testing.assert_close(seen, averaged())
    torch.testing.assert_close(moved(), averaged())
    assert not moved().requires_grad
    (grad,) = torch.autograd.grad(seen[:, 0].sum(), features)
    # Class 3 has no image in the batch.
    assert (grad.abs().sum(dim=1) > 1e-3).all() and seen[3].equal(start[3])


@pytest.mark.parametrize("update", ["fixed", "learnable"])
def test_observe_moves_only_ema(unit, target, update):
    start = unit(4, 5)
    prototypes = Prototypes(start, update)
    prototypes.observe(unit(6, 5), target)
    torch.testing.assert_close(prototypes(), start)


def test_learnable_prototypes_are_one_parameter_read_as_unit_rows(unit):
    prototypes = Prototypes(3 * unit(4, 5), "learnable")
    (parameter,) = prototypes.parameters()
    torch.testing.assert_close(prototypes(), F.normalize(parameter, dim=1))
    prototypes()[:, 0].sum().backward()
    # Along a row its unit vector does not change.
    assert parameter.grad.abs().max() > 0.01
    torch.testing.assert_close((parameter.grad * parameter).sum(dim=1), torch.zeros(4).double())


@pytest.mark.parametrize("update", ["ema", "batch", "fixed"])
def test_other_prototypes_are_state_without_parameters(unit, update):
    prototypes = Prototypes(unit(4, 5), update)
    assert not list(prototypes.parameters())
    assert list(prototypes.state_dict()) == ["value"]


@pytest.mark.parametrize("update", ["ema", "batch", "learnable", "fixed"])
def test_the_initial_tensor_is_copied_without_its_graph(unit, update):
    leaf = unit(4, 5).requires_grad_()
    initial = leaf * 1
    prototypes = Prototypes(initial, update)
    assert prototypes.value.is_leaf
    assert prototypes.value.data_ptr() != initial.data_ptr()


def test_errors(unit):
    with pytest.raises(ValueError, match="^update: got 'mean'"):
        Prototypes(unit(2, 3), "mean")
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="^momentum: got"):
            Prototypes(unit(2, 3), momentum=momentum)


def test_class_sums_of_many_rows_are_those_of_their_parts(monkeypatch, unit):
    features, target = unit(9, 4), torch.arange(9) % 3
    whole = class_sums(features, target, 3)
    monkeypatch.setattr(prototypes, "_ROWS", 2)
    torch.testing.assert_close(class_sums(features, target, 3), whole)
