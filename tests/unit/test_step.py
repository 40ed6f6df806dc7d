"""The metrics that every method reports under the same names."""

import math

import pytest
import torch

from diffalign.train.step import preference_metrics
from diffalign.types import LogProbs

REWARDS = {"reward/chosen", "reward/rejected", "reward/margin", "reward/accuracy"}
REWARDS |= {"logp/chosen", "logp/rejected", "drift/chosen", "drift/rejected"}


def metrics(policy, reference=None, reward=None, *, present=None, gap=None, beta=2.0) -> dict[str, float]:
    """From errors (B, K): log-probs are minus half of them."""
    errors = {"policy": policy} | ({} if reference is None else {"reference": reference})
    by_role = {role: -0.5 * torch.tensor(values)[..., None] for role, values in errors.items()}
    present = None if present is None else torch.tensor(present)
    labels = {} if reward is None else {"reward": torch.tensor(reward)}
    gaps = {} if gap is None else {"reference": torch.tensor(gap)[..., None]}
    mask = torch.ones_like(by_role["policy"])
    return preference_metrics(LogProbs(by_role, mask, gaps, 0.5, present), labels, beta)


def test_values_of_one_pair():
    found = metrics([[0.2, 0.9]], [[0.5, 0.6]], [[1.0, 0.0]], gap=[[0.01, 0.03]])
    assert found == pytest.approx(
        {
            "err/policy": 0.55,
            "err/reference": 0.55,
            "gap": 0.02,
            "reward/chosen": 2.0 * 0.5 * 0.3,  # the winner's error fell by .3
            "reward/rejected": -2.0 * 0.5 * 0.3,
            "reward/margin": 0.6,
            "reward/accuracy": 1.0,
            "logp/chosen": -0.5 * 0.2,
            "logp/rejected": -0.5 * 0.9,
            "drift/chosen": -0.3,  # errors, so below 0 is better than the reference
            "drift/rejected": 0.3,
        },
        rel=1e-5,
    )


def test_orientation_is_by_reward():
    first = metrics([[0.2, 0.9]], [[0.5, 0.6]], [[1.0, 0.0]])
    assert metrics([[0.9, 0.2]], [[0.6, 0.5]], [[0.0, 1.0]]) == first
    against = metrics([[0.2, 0.9]], [[0.5, 0.6]], [[0.0, 1.0]])
    assert against["reward/accuracy"] == 0.0
    assert against["reward/margin"] == -first["reward/margin"]


def test_an_implicit_tie_counts_one_half():
    same = [[0.5, 0.6], [0.5, 0.6]]
    assert metrics(same, same, [[1.0, 0.0]] * 2)["reward/accuracy"] == 0.5
    assert metrics([[0.5, 0.6], [0.4, 0.6]], same, [[1.0, 0.0]] * 2)["reward/accuracy"] == 0.75


def test_tied_rewards_do_not_count():
    one = metrics([[0.2, 0.9]], [[0.5, 0.6]], [[1.0, 0.0]])
    both = metrics([[0.2, 0.9], [9.0, 1.0]], [[0.5, 0.6], [0.5, 0.6]], [[1.0, 0.0], [0.5, 0.5]])
    assert {name: both[name] for name in REWARDS} == {name: one[name] for name in REWARDS}
    assert both["err/policy"] > one["err/policy"]
    assert set(metrics([[0.2, 0.9]], [[0.5, 0.6]], [[0.5, 0.5]])) == {"err/policy", "err/reference"}


def test_padding_counts_nowhere():
    padded = metrics(
        [[0.2, 0.9, 7.0]], [[0.5, 0.6, 1.0]], [[0.0, -1.0, 5.0]], present=[[1.0, 1.0, 0.0]], gap=[[0.1, 0.3, 9.0]]
    )
    plain = metrics([[0.2, 0.9]], [[0.5, 0.6]], [[0.0, -1.0]], gap=[[0.1, 0.3]])
    assert padded == plain


def test_of_many_the_best_meets_the_worst():
    policy, reference = [[0.5, 0.2, 0.3, 0.9]], [[0.5] * 4]
    found = metrics(policy, reference, [[0.1, 0.9, 0.5, 0.0]])
    assert found["drift/chosen"] == pytest.approx(-0.3)
    assert found["drift/rejected"] == pytest.approx(0.4)


def test_units_are_averaged_in_errors_and_summed_in_rewards():
    policy, reference = -0.5 * torch.tensor([[[0.2, 0.4], [1.0, 2.0]]]), -0.5 * torch.tensor([[[0.4, 0.4], [1.0, 1.0]]])
    lp = LogProbs({"policy": policy, "reference": reference}, torch.ones(1, 2, 2), scale=0.5)
    found = preference_metrics(lp, {"reward": torch.tensor([[1.0, 0.0]])}, 10.0)
    assert found["err/policy"] == pytest.approx((0.3 + 1.5) / 2)
    assert found["drift/chosen"] == pytest.approx(-0.1)
    assert found["reward/chosen"] == pytest.approx(10 * 0.5 * 0.2)


@pytest.mark.parametrize("reward", [None, [[1.0]]])
def test_without_a_pair_there_are_no_rewards(reward):
    found = metrics([[0.2]], [[0.5]], reward)
    assert set(found) == {"err/policy", "err/reference"}
    assert all(map(math.isfinite, found.values()))


def test_without_a_reference_only_the_policy_is_reported():
    assert metrics([[0.2, 0.4]], None, [[1.0, 0.0]]) == pytest.approx({"err/policy": 0.3})
