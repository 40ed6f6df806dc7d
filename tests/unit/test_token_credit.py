"""Credit per token: sums, segments, dense rewards; masked tokens may hold anything."""

import math

import pytest
import torch

from diffalign.token_credit import cumulative, rto_rewards, segment_sums, step_advantages, token_rewards

POLICY = torch.tensor([[-1.0, -2.0, -3.0, math.nan], [-1.0, -1.0, math.inf, 5.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-2.0, -1.0, -1.0, 7.0], [-1.5, -3.0, 0.0, math.nan]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_rewards_are_scaled_log_ratios_and_add_up():
    rewards = token_rewards(POLICY, REFERENCE, MASK, 0.5)
    assert rewards.tolist() == [[0.5, -0.5, -1.0, 0.0], [0.25, 1.0, 0.0, 0.0]]
    assert cumulative(rewards, MASK).tolist() == [[0.5, 0.0, -1.0, 0.0], [0.25, 1.25, 0.0, 0.0]]


def test_segments_hold_what_their_counted_tokens_earn():
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, math.nan, 64.0]])
    segments = torch.tensor([[0, 2, 2, 9], [1, -1, 0, 0]])
    assert segment_sums(rewards, MASK, segments).tolist() == [[1.0, 0.0, 6.0], [0.0, 16.0, 0.0]]
    assert segment_sums(rewards, MASK, torch.full_like(segments, -1)).shape == (2, 0)


def test_dense_rewards_end_in_the_bounded_score():
    found = rto_rewards(
        POLICY, REFERENCE, POLICY, MASK, torch.tensor([30.0, -3.0]).double(), scale=0.5, clip=0.6, kl_coef=0.1
    )
    assert found.dense.tolist() == [[0.5, -0.5, -0.6, 0.0], [0.25, 0.6, 0.0, 0.0]]
    torch.testing.assert_close(found.kl[0], torch.tensor([-0.1, 0.1, 0.2, 0.0], dtype=torch.float64))
    assert (found.total - found.dense - found.kl)[:, :3].flatten().tolist() == pytest.approx([0, 0, 10, 0, -3, 0])
    torch.testing.assert_close(found.returns, found.total.sum(-1))
    free = rto_rewards(POLICY, REFERENCE, POLICY, MASK, torch.zeros(2).double(), scale=0.5, clip=0.0, kl_coef=0.5)
    assert not free.total.any()  # the dense reward is unclipped and equals the penalty


def test_an_empty_completion_earns_nothing():
    found = rto_rewards(POLICY, REFERENCE, POLICY, MASK * 0, torch.ones(2).double())
    assert not found.total.any()


def test_a_terminal_step_is_worth_its_outcome():
    before, after = torch.tensor([0.4, 0.4]), torch.tensor([0.7, 0.7])
    found = step_advantages(before, after, torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.3, -0.4]))
