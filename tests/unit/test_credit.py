"""Rewards to advantages and preferences, and how slowly anchors follow."""

import pytest
import torch
from torch import Tensor

from diffalign import anchors, credit

NAN = float("nan")
PROMPTS = ["a", "b", "a", "c", "b", "a"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


REWARDS = tensor(1.0, 0.5, 0.0, 0.7, 0.9, 0.5)


def test_a_group_is_centred_on_its_own_mean():
    centred = credit.standardised(REWARDS, PROMPTS, spread="none")
    torch.testing.assert_close(centred, tensor(0.5, -0.2, -0.5, 0.0, 0.2, 0.0), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("ddof", "deviation"), [(0, (1 / 6) ** 0.5), (1, 0.5)])
def test_the_groups_own_deviation(ddof, deviation):
    found = credit.standardised(REWARDS, PROMPTS, ddof=ddof, eps=0.1)
    assert found[0].item() == pytest.approx(0.5 / (deviation + 0.1), rel=1e-12)
    assert found[3].item() == 0.0  # a group of one


def test_the_deviation_of_the_round():
    found = credit.standardised(REWARDS, PROMPTS, spread="all", eps=0.0)
    torch.testing.assert_close(found * REWARDS.std(correction=0), credit.standardised(REWARDS, PROMPTS, spread="none"))


def test_the_order_of_samples_means_nothing():
    order = [3, 5, 0, 2, 4, 1]
    for spread in ("group", "all"):
        direct = credit.standardised(REWARDS, PROMPTS, spread=spread)
        shuffled = credit.standardised(REWARDS[order], [PROMPTS[i] for i in order], spread=spread)
        torch.testing.assert_close(direct[order], shuffled)


def test_a_constant_group_has_no_advantage_even_when_unbiased():
    found = credit.standardised(tensor(0.1, 0.1, 0.1, 0.4), [0, 0, 0, 1], ddof=1, eps=1e-8)
    assert found.abs().max() < 1e-6  # the mean of three 0.1 is off in the last digit


def test_equal_rewards_are_alike_up_to_rounding():
    """Comparing the advantage with exactly zero lets this group through."""
    rewards = torch.stack([tensor(0.1, 0.1, 0.1), tensor(0.4, 0.5, 0.5), tensor(0.5, NAN, NAN)])
    assert (rewards[0] - rewards[0].mean() != 0).any()
    for scale in (1.0, 1e-9):
        assert credit.alike(scale * rewards).tolist() == [True, False, True]
    assert credit.alike(torch.zeros(2, 3)).all()


def test_a_buffered_prompt_uses_its_own_history_once_it_is_long_enough():
    tracker = credit.Buffered(buffer_size=3, min_count=3, eps=0.0)
    first = tracker.update(["x", "y", "x"], tensor(1.0, 2.0, 3.0))
    torch.testing.assert_close(first, tensor(-1.0, 0.0, 1.0) / (2 / 3) ** 0.5)
    second = tracker.update(["x", "x"], tensor(5.0, 7.0))  # the history is 3, 5, 7
    torch.testing.assert_close(second, tensor(0.0, 2.0) / (8 / 3) ** 0.5)
    assert list(tracker.history["x"]) == [3.0, 5.0, 7.0]
    assert list(tracker.history["y"]) == [2.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all", [0.0, 0.4, 0.5, 0.7]),
        ("positive_only", [0.5, 0.5, 0.5, 0.7]),
        ("negative_only", [0.0, 0.4, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6]),
    ],
)
def test_the_probability_of_being_optimal(kind, expected):
    found = credit.optimality_probability(tensor(-9.0, -1.0, 0.0, 2.0), kind=kind)
    torch.testing.assert_close(found, tensor(*expected))


def test_no_reward_dominates_by_its_scale_when_each_is_normalised_first():
    small, large = tensor(0.0, 1.0, 0.0, 1.0), tensor(0.0, 0.0, 1000.0, 1000.0)
    rewards, weights = torch.stack([small, large], 1)[None], tensor(1.0, 1.0)
    summed, first = (credit.total(rewards, weights, how)[0] for how in ("sum", "normalised"))
    assert summed.tolist() == [0.0, 1.0, 1000.0, 1001.0]
    assert abs(first[1] - first[2]) < 1e-3


def test_a_pareto_preference_needs_no_component_to_be_worse():
    rewards = torch.tensor(
        [
            [[1.0, 1.0], [1.0, 0.0]],  # as good and better
            [[0.0, 0.0], [0.0, 0.1]],
            [[1.0, 0.0], [0.0, 1.0]],  # incomparable
            [[1.0, 1.0], [1.0, 1.0]],
        ]
    )
    assert credit.pareto_preference(rewards).tolist() == [[1, -1], [-1, 1], [0, 0], [0, 0]]
    assert credit.pareto_preference(torch.tensor([[2.0, 1.0], [3.0, 3.0]])).tolist() == [[1, -1], [0, 0]]


# --- anchors


def followed(counts: list[int], decay) -> float:
    """An average of a policy that moves by one per update."""
    average = 0.0
    for n in counts:
        average = decay(n) * average + (1 - decay(n)) * n
    return average


def test_accumulation_does_not_change_an_average():
    """A released trainer steps its average once per micro-batch: twice the accumulation, another average."""
    updates = list(range(1, 30))
    per_micro_batch = [n for n in updates for _ in range(4)]
    once = followed(updates, anchors.average_decay)
    assert followed(per_micro_batch, anchors.average_decay) - once > 1
    assert anchors.average_decay(7) == anchors.average_decay(7) == 8 / 17


def test_old_policies_copy_then_slow_down_to_their_cap():
    slow = {"rate": 0.0075, "cap": 0.999, "start": 75}
    assert [anchors.linear_decay(n, **slow) for n in (0, 75, 76, 1000)] == [0.0, 0.0, 0.0075, 0.999]
    assert [anchors.linear_decay(n) for n in (0, 100, 1000)] == [0.0, 0.1, 0.3]


def test_the_average_for_evaluation_moves_every_eighth_update():
    assert [n for n in range(20) if anchors.is_due(n, 8)] == [7, 15]
    assert all(anchors.is_due(n, 1) for n in range(5))
