from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mulki.stages import connecting


class TestConnecting:
    @settings(max_examples=30, deadline=None)
    @given(every=st.integers(1, 5), steps=st.integers(0, 17))
    def test_running_mean_is_the_mean_of_start_and_samples(self, every, steps):
        def weights(step):
            return {"a": torch.full((2,), float(step**2)), "b": torch.tensor(-1.5 * step)}

        mean = connecting.RunningMean(weights(0), every)
        for step in range(1, steps + 1):
            mean.observe(weights(step), step)
        members = [weights(step) for step in range(0, steps + 1, every)]
        for name in ("a", "b"):
            expected = torch.stack([m[name] for m in members]).mean(dim=0)
            torch.testing.assert_close(mean.mean[name], expected)

    def test_running_mean_is_a_copy_without_graph(self):
        live = {"a": torch.nn.Parameter(torch.ones(2))}
        mean = connecting.RunningMean(live, 1)
        with torch.no_grad():
            live["a"].add_(4)
        assert mean.mean["a"].tolist() == [1, 1]
        mean.observe(live, 1)
        assert mean.mean["a"].tolist() == [3, 3]
        assert live["a"].tolist() == [5, 5]
        assert not mean.mean["a"].requires_grad

    @pytest.mark.parametrize("every", [0, -1])
    def test_running_mean_wants_a_positive_period(self, every):
        with pytest.raises(ValueError, match=f"^every: got {every}"):
            connecting.RunningMean({}, every)

    def test_interpolation_and_its_end_points(self):
        old, new = {"a": torch.tensor([0.1, 3.0])}, {"a": torch.tensor([0.7, -1.0])}
        assert connecting.interpolate(old, new, 0.0)["a"].equal(old["a"])
        assert connecting.interpolate(old, new, 1.0)["a"].equal(new["a"])
        torch.testing.assert_close(
            connecting.interpolate(old, new, 0.25)["a"], torch.tensor([0.25, 2.0])
        )
        assert old["a"].tolist() == pytest.approx([0.1, 3.0])

    def test_a_running_mean_of_half_precision_is_interpolated(self):
        weights = {"a": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}
        connections = connecting.Connections(weights, every=1, alpha=0.5)
        with torch.no_grad():
            weights["a"] += 2
        connections.after_step(1)
        connections.end_task()
        assert weights["a"].tolist() == [0.5, 0.5]

    def test_anchor_sums_squared_differences(self):
        weights = {
            "a": torch.tensor([1.0, 2.0], requires_grad=True),
            "b": torch.tensor(5.0, requires_grad=True),
        }
        loss = connecting.distance_from_anchor(
            weights, {"a": torch.tensor([0.0, 4.0]), "b": torch.zeros(())}
        )
        assert loss == 1 + 4 + 25
        loss.backward()
        assert weights["a"].grad.tolist() == [2, -4]
        assert weights["b"].grad == 10

    def test_snapshot_is_a_detached_copy(self):
        live = {"a": torch.nn.Parameter(torch.ones(2))}
        copy = connecting.snapshot(live)
        with torch.no_grad():
            live["a"].zero_()
        assert copy["a"].tolist() == [1, 1]
        assert not copy["a"].requires_grad


class TestConnections:
    @pytest.fixture
    def weights(self):
        return {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.zeros(()))}

    def learn(self, weights, steps, **options):
        connections = connecting.Connections(weights, **options)
        for step in range(1, steps + 1):
            with torch.no_grad():
                for weight in weights.values():
                    weight.add_(1.0)
            connections.after_step(step)
        return connections

    @pytest.mark.parametrize(
        ("options", "moved"),
        [
            ({}, 4.0),
            ({"every": 2}, (0 + 2 + 4) / 3),
            # No member but the start.
            ({"every": 5}, 4.0),
            ({"alpha": 0.25}, 1.0),
            ({"every": 2, "alpha": 0.25}, 0.5),
            ({"every": 2, "alpha": 0.25, "l2": 3.0}, 0.5),
        ],
    )
    def test_the_result_of_four_steps(self, weights, options, moved):
        live = weights["a"]
        self.learn(weights, 4, **options).end_task()
        assert weights["a"] is live and live.tolist() == [1 + moved, 1 + moved]
        assert weights["b"] == moved

    def test_another_base_is_taken_in_place_of_the_start(self, weights):
        base = {"a": torch.full((2,), -3.0), "b": torch.tensor(8.0)}
        self.learn(weights, 4, alpha=0.75, base=base).end_task()
        assert weights["a"].tolist() == [3, 3]
        assert weights["b"] == 5
        assert base["b"] == 8

    def test_the_anchor_is_the_start_whatever_the_base(self, weights):
        base = {name: weight.detach() + 9 for name, weight in weights.items()}
        connections = self.learn(weights, 2, alpha=0.5, l2=0.5, base=base)
        (loss,) = connections.penalties().values()
        assert list(connections.penalties()) == ["anchor_loss"]
        assert loss == 0.5 * 3 * 2.0**2
        loss.backward()
        assert weights["a"].grad.tolist() == [2, 2]

    def test_without_a_coefficient_there_is_no_anchor(self, weights):
        assert self.learn(weights, 1, alpha=0.5).penalties() == {}
