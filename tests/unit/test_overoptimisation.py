"""When to stop: rules on curves with a known truth."""

import math

import numpy as np
import pytest

from diffalign.comparison import common, wins
from diffalign.errors import UserError
from diffalign.overoptimisation import follow, stop_rule, verdict

STEPS = (0, 10, 20, 30, 40)


def outcomes(mean: float, noise: float = 0.3, prompts: int = 60):
    """Per-prompt difficulty and noise are shared by all steps, as with shared seeds."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(prompts)
    return {"all": {f"p{i}": [mean + float(base[i]) * noise] for i in range(prompts)}}


def curve(values):
    return {step: outcomes(value) for step, value in zip(STEPS, values, strict=True)}


class TestStopRule:
    def test_both_rise(self):
        assert stop_rule(curve([0, 1, 2, 3, 4]), curve([0, 1, 2, 3, 4])) == (40, None)

    def test_held_out_falls_while_trained_rises(self):
        assert stop_rule(curve([0, 1, 2, 3, 4]), curve([0, 1, 2, 1, 0.5])) == (20, 30)

    def test_both_fall_is_no_over_optimisation(self):
        assert stop_rule(curve([0, 1, 2, 1, 0]), curve([0, 1, 2, 1, 0])) == (20, None)

    def test_a_fall_within_the_noise_does_not_count(self):
        rng = np.random.default_rng(1)
        held_out = {
            step: {"all": {f"p{i}": [float(rng.normal(0.0 if step else -5.0))] for i in range(60)}} for step in STEPS
        }
        assert stop_rule(curve([0, 1, 2, 3, 4]), held_out)[1] is None

    def test_held_out_that_only_falls_keeps_the_start(self):
        assert stop_rule(curve([0, 1, 2, 3, 4]), curve([0, -1, -2, -3, -4])) == (0, 10)


class TestFollow:
    def measured(self, **curves):
        return {step: {label: outcomes(values[n]) for label, values in curves.items()} for n, step in enumerate(STEPS)}

    def test_rewards_of_different_scales_count_alike(self):
        found = follow(
            "run",
            self.measured(trained=[0, 1, 2, 3, 4], small=[0, 0.1, 0.2, 0.0, -0.3], diversity=[0.5] * 5),
            "trained",
        )
        assert (found.trained, found.held_out) == ("trained", ["small"])
        assert (found.best, found.stop) == (20, 30)
        assert found.points[2].values["small"].difference == pytest.approx(0.2)
        assert found.points[0].values["trained"].difference == 0.0
        assert "stop at step 20: by step 30 trained has risen further" in verdict(found)

    def test_without_over_optimisation(self):
        found = follow("run", self.measured(trained=[0, 1, 2, 3, 4], other=[0, 1, 2, 3, 4]), "trained")
        assert "no over-optimisation seen" in verdict(found)

    def test_without_held_out_rewards_nothing_can_be_seen(self):
        found = follow("run", self.measured(trained=[0, 1, 2, 3, 4], picture_sharpness=[1] * 5), "trained")
        assert (found.held_out, found.best, found.stop) == ([], 40, None)
        assert "cannot be seen" in verdict(found)


class TestPairs:
    def test_failures_leave_out_the_sample_of_both(self):
        one = {"t": {"a": [1.0, math.nan, 0.0], "b": [math.nan]}}
        two = {"t": {"a": [0.0, 1.0, math.nan], "b": [1.0]}}
        (left, right), failed = common(one, two)
        assert (left, right, failed) == ({"t": {"a": [1.0]}}, {"t": {"a": [0.0]}}, 3)

    def test_nothing_is_left(self):
        with pytest.raises(UserError, match="failed on every sample"):
            common({"t": {"a": [math.nan]}})

    def test_wins(self):
        one, two = {"t": {"a": [1.0, 0.0, 2.0]}}, {"t": {"a": [0.0, 0.0, 3.0]}}
        assert wins(one, two) == {"t": {"a": [1.0, 0.5, 0.0]}}
