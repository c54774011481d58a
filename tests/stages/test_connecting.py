from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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

    def test_anchor_sums_squared_differences(self):
        weights = {
            "a": torch.tensor([1.0, 2.0], requires_grad=True),
            "b": torch.tensor(5.0, requires_grad=True),
        }
        loss = connecting.anchor_loss(
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
