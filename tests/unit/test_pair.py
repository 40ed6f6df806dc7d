"""The sigmoid objective: value, gradient, orientation, ties, padding, extremes."""

import math

import pytest
import torch

from diffalign.objectives.pair import oriented_margin, sigmoid
from diffalign.types import LogProbs, Loss

ONE, ZERO = [1.0, 0.0], [0.0, 1.0]


def make(policy, reference=None, mask=None, present=None) -> LogProbs:
    """From nested lists (B, 2) or (B, 2, U) in float64; the policy takes gradient."""
    policy = torch.tensor(policy, dtype=torch.float64)
    reference = torch.zeros_like(policy) if reference is None else torch.tensor(reference, dtype=torch.float64)
    if policy.ndim == 2:
        policy, reference = policy[..., None], reference[..., None]
    mask = torch.ones_like(policy) if mask is None else torch.tensor(mask, dtype=torch.float64)
    present = None if present is None else torch.tensor(present)
    return LogProbs({"policy": policy.requires_grad_(), "reference": reference}, mask, present=present)


def run(lp: LogProbs, reward, **params) -> tuple[Loss, torch.Tensor]:
    """The loss, and the gradient of its reduction (B, 2) in the policy's log-probs."""
    loss = sigmoid(lp, {"reward": torch.tensor(reward)}, **params)
    (gradient,) = torch.autograd.grad(loss.reduce(), lp.by_role["policy"])
    return loss, gradient.sum(-1)


def test_ln_2_at_policy_equals_reference_with_a_gradient():
    same = [[0.3, -2.0], [-1.0, 5.0]]
    loss, gradient = run(make(same, same), [ONE, ONE], beta=2.0)
    assert loss.value.tolist() == [math.log(2)] * 2
    assert gradient.tolist() == [[-0.5, 0.5], [-0.5, 0.5]]  # beta / 2 / B: up for the winner, down for the loser


def test_values_are_the_formula():
    loss, _ = run(make([[1.0, -0.5], [0.2, 0.9]], [[0.4, 0.1], [0.0, 0.3]]), [ONE, ZERO], beta=3.0)
    margins = [(1.0 - 0.4) - (-0.5 - 0.1), (0.9 - 0.3) - (0.2 - 0.0)]
    assert loss.value.tolist() == pytest.approx([math.log1p(math.exp(-3.0 * m)) for m in margins], rel=1e-12)
    assert loss.weight.tolist() == [1.0, 1.0]


def test_a_larger_margin_is_a_smaller_loss():
    loss, gradient = run(make([[1.0, 0.0], [2.0, 0.0]]), [ONE, ONE], beta=1.0)
    assert loss.value[1] < loss.value[0] < math.log(2)
    assert (gradient[:, 0] < 0).all()
    assert (gradient[:, 1] > 0).all()


def test_the_larger_reward_wins_in_either_order():
    policy, swapped = [[0.7, -0.2]], [[-0.2, 0.7]]
    first, gradient = run(make(policy), [[0.9, 0.1]], beta=1.5)
    second, mirrored = run(make(swapped), [[0.1, 0.9]], beta=1.5)
    assert torch.equal(first.value, second.value)
    assert torch.equal(gradient, mirrored.flip(1))
    against, _ = run(make(policy), [[0.1, 0.9]], beta=1.5)
    assert against.value > math.log(2) > first.value


def test_only_the_order_of_rewards_counts():
    near, _ = run(make([[0.7, -0.2]]), [[0.1, 0.0999]], beta=1.5)
    far, _ = run(make([[0.7, -0.2]]), [[-3.0, -50.0]], beta=1.5)
    assert torch.equal(near.value, far.value)
    assert torch.equal(near.weight, far.weight)


def test_ties_have_no_weight_and_do_not_dilute():
    lp = make([[0.7, -0.2], [9.0, 1.0], [-0.1, 0.4]])
    loss, gradient = run(lp, [ONE, [0.5, 0.5], ZERO], beta=1.0)
    assert loss.weight.tolist() == [1.0, 0.0, 1.0]
    alone, _ = run(make([[0.7, -0.2], [-0.1, 0.4]]), [ONE, ZERO], beta=1.0)
    assert loss.reduce().item() == alone.reduce().item()
    assert gradient[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("absent", [0, 1])
def test_a_padding_candidate_takes_its_row_out(absent):
    present = [[1.0, 1.0], [1.0, 1.0]]
    present[1][absent] = 0.0
    loss, gradient = run(make([[0.7, -0.2], [4.0, -4.0]], present=present), [ONE, ONE], beta=1.0)
    assert loss.weight.tolist() == [1.0, 0.0]
    assert gradient[1].tolist() == [0.0, 0.0]


def test_units_are_summed_and_padding_units_ignored():
    policy = [[[1.0, 2.0, 77.0], [0.5, -9.0, -9.0]]]
    lp = make(policy, mask=[[[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
    margin, weight = oriented_margin(lp, {"reward": torch.tensor([ONE])})
    assert margin.tolist() == [2.5]
    assert weight.tolist() == [1.0]
    (gradient,) = torch.autograd.grad(
        sigmoid(lp, {"reward": torch.tensor([ONE])}, beta=1.0).reduce(), lp.by_role["policy"]
    )
    pull = 1 / (1 + math.exp(2.5))
    assert gradient.flatten().tolist() == pytest.approx([-pull, -pull, 0.0, pull, 0.0, 0.0], rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_label_smoothing_mixes_both_orders(epsilon):
    policy = [[0.7, -0.2], [-1.0, 0.4]]
    loss, _ = run(make(policy), [ONE, ONE], beta=2.0, label_smoothing=epsilon)
    right, _ = run(make(policy), [ONE, ONE], beta=2.0)
    wrong, _ = run(make(policy), [ZERO, ZERO], beta=2.0)
    torch.testing.assert_close(loss.value, (1 - epsilon) * right.value + epsilon * wrong.value, rtol=1e-12, atol=0)


def test_label_smoothing_has_its_minimum_at_the_flip_odds():
    """Conservative DPO stops at ``beta margin = log((1 - e) / e)``."""
    odds = math.log(0.8 / 0.2)
    _, gradient = run(make([[odds, 0.0], [odds + 0.1, 0.0]]), [ONE, ONE], beta=1.0, label_smoothing=0.2)
    assert gradient[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-15)
    assert gradient[1, 0] > 0  # too sure: pulled back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_margins_of_sixty_stay_finite(dtype, smoothing):
    policy = torch.tensor([[60.0, 0.0], [-60.0, 0.0]], dtype=dtype)[..., None].requires_grad_()
    lp = LogProbs({"policy": policy, "reference": torch.zeros(2, 2, 1, dtype=dtype)}, torch.ones(2, 2, 1, dtype=dtype))
    loss, gradient = run(lp, [ONE, ONE], beta=1.0, label_smoothing=smoothing)
    assert loss.value.dtype == dtype
    expected = [60 * smoothing, 60 * (1 - smoothing)]
    assert loss.value.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-20)
    assert gradient[:, 0].tolist() == pytest.approx([smoothing / 2, (smoothing - 1) / 2], rel=1e-6, abs=1e-20)
    if smoothing == 0.0:
        assert loss.value[0].item() == pytest.approx(math.exp(-60), rel=1e-5, abs=0)  # not rounded to 0: log1p, not log
